"""Record a run while it goes: the run folder first, the tracker second. Ranks other than 0 write nothing."""

from __future__ import annotations

import logging
from typing import Any

from common.evaluation.evaluate import Evaluation
from common.run.checkpoint import State
from common.run.result import Result
from common.run.run_folder import RunFolder, best_effort
from common.run.tracking import Tracker
from common.runtime.distributed import barrier, rank
from common.runtime.progress import Stopwatch
from common.training.base import Step
from common.types import Answers

log = logging.getLogger(__name__)
COMPLETIONS_EVERY = 25  # updates between two writes of sampled completions


class Recorder:
    """Writes updates, evaluations and the result of one run."""

    def __init__(
        self, files: RunFolder, tracker: Tracker, table_every: int, clock: Stopwatch, state: State | None = None
    ) -> None:
        """
        Args:
            files: The run folder.
            tracker: Tracker that mirrors the metrics.
            table_every: Updates between two tables of completions in the tracker.
            clock: Stopwatch of the run.
            state: State of the checkpoint that the run resumes from; what was written after it is computed again.
        """
        self.files, self.tracker, self.table_every, self.clock = files, tracker, table_every, clock
        self.writes = rank() == 0
        self.rows: list[dict[str, Any]] = []
        if self.writes:
            files.rewind(*((0, {}) if state is None else (state.update, state.lines)))
        barrier()

    def update(self, number: int, step: Step, last: bool) -> None:
        """Record one update; `number` counts from 1."""
        if not self.writes:
            return
        self.files.log("metrics.jsonl", {"step": number, **step.metrics})
        self.files.log("timings.jsonl", {"step": number, **step.seconds, **step.counts})
        phases = {f"time/{phase}_s": seconds for phase, seconds in step.seconds.items()}
        self.tracker.log(step.metrics | step.counts | phases | {"step_time": sum(step.seconds.values())}, number)
        self.rows += step.rows
        if step.rows and (number % self.table_every == 0 or last):
            self.tracker.completions(step.rows, number)
        if number % COMPLETIONS_EVERY == 0:
            self.flush(number)

    def flush(self, number: int) -> None:
        """Write all completions up to update `number` to disk."""
        if self.rows:
            self.files.write_completions(self.rows, number)
            self.rows = []

    def seconds(self) -> dict[str, float]:
        """Return the seconds of all updates by phase, over all attempts."""
        spent: dict[str, float] = {}
        for row in self.files.read_log("timings.jsonl"):
            for phase, seconds in row.items():
                # names with a slash are counts, not seconds
                if phase != "step" and "/" not in phase:
                    spent[phase] = spent.get(phase, 0.0) + seconds
        return spent

    def kept(self, phase: str, split: str) -> Answers | None:
        """Return the predictions of a split that an earlier attempt finished; None if it did not."""
        return self.files.read_predictions(phase, split)

    def keep(self, phase: str, split: str, answers: Answers) -> None:
        """Save the predictions of a finished split."""
        if self.writes:
            self.files.write_predictions(phase, split, answers)

    def held_out(self, source: str, answers: Answers) -> None:
        """Save the answers that confidences are calibrated by; `source` as in `Calibration`."""
        if self.writes:
            self.files.write_held_out(source, answers)

    def evaluation(self, number: int, evaluation: Evaluation) -> None:
        """Record an evaluation after `number` updates."""
        log.info("after %d updates: %s", number, evaluation.scalars)
        if self.writes:
            self.files.log("metrics.jsonl", {"step": number, **evaluation.scalars})
            self.tracker.log(evaluation.scalars, number)

    def finish(self, result: Result, evaluation: Evaluation) -> None:
        """Write the tables, then the result, whose presence marks the run as finished, then inform the tracker.

        `evaluation`: the last one.
        """
        if self.writes:
            self.files.merge_completions()
            self.files.merge_predictions()
            self.files.write_result(result)
            with best_effort("the tracker"):
                self.tracker.result(result, evaluation)

    def close(self, failed: bool) -> None:
        """End the tracker's run and close the files."""
        with best_effort("the tracker"):
            self.tracker.close(failed)
        self.files.close()
