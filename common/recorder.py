"""Everything a run writes while it goes: the run folder first, the tracker second. Silent on ranks other than 0."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from common import metrics
from common.distributed import barrier, rank
from common.evaluate import Evaluation
from common.report import figures
from common.run_folder import RunFolder
from common.tracking import Tracker
from common.types import Answers, Result, Step

log = logging.getLogger(__name__)
COMPLETIONS_EVERY = 25  # updates between two writes of sampled completions


class Recorder:
    """Writes updates, evaluations and the result of one run."""

    def __init__(self, place: RunFolder, tracker: Tracker, table_every: int) -> None:
        """
        Args:
            place: The run folder.
            tracker: Mirror of the metrics.
            table_every: Updates between two completions tables of the tracker.
        """
        self.place, self.tracker, self.table_every = place, tracker, table_every
        self.writes = rank() == 0
        self.rows: list[dict[str, Any]] = []
        self.measured: dict[str, float] = {}

    def rewind(self, update: int, lengths: dict[str, int]) -> None:
        """Continue after `update`: what an interrupted attempt wrote beyond it will be computed again."""
        if self.writes:
            self.place.rewind(update, lengths)
        barrier()

    def update(self, number: int, step: Step, last: bool) -> None:
        """One update; `number` counts from 1."""
        if not self.writes:
            return
        self.place.log("metrics.jsonl", {"step": number, **step.metrics})
        self.place.log("timings.jsonl", {"step": number, **step.seconds, **step.counts})
        phases = {f"time/{phase}_s": seconds for phase, seconds in step.seconds.items()}
        self.tracker.log(step.metrics | step.counts | phases | {"step_time": sum(step.seconds.values())}, number)
        self.rows += step.rows
        if step.rows and (number % self.table_every == 0 or last):
            self.tracker.completions(step.rows, number)
        if number % COMPLETIONS_EVERY == 0:
            self.flush(number)

    def flush(self, number: int) -> None:
        """Put everything up to update `number` on the disk."""
        if self.rows:
            self.place.write_completions(self.rows, number)
            self.rows = []

    def seconds(self) -> dict[str, float]:
        """Seconds of all updates by phase, over all attempts."""
        spent: dict[str, float] = {}
        for row in self.place.read_log("timings.jsonl"):
            for phase, seconds in row.items():
                if phase != "step" and "/" not in phase:
                    spent[phase] = spent.get(phase, 0.0) + seconds
        return spent

    def kept(self, phase: str, split: str) -> Answers | None:
        """What an earlier attempt finished."""
        return self.place.read_predictions(phase, split)

    def keep(self, phase: str, split: str, found: Answers) -> None:
        """Keep a finished split."""
        if self.writes:
            self.place.write_predictions(phase, split, found)

    def evaluation(self, number: int, found: Evaluation) -> None:
        """What was measured after `number` updates."""
        self.measured = found.scalars
        log.info("after %d updates: %s", number, found.scalars)
        if self.writes:
            self.place.log("metrics.jsonl", {"step": number, **found.scalars})
            self.tracker.log(found.scalars, number)

    def finish(self, result: Result, after: Evaluation, names: Mapping[str, Sequence[str]]) -> None:
        """Tables, pictures, and last the result, whose presence means that the run is finished.

        `names`: of the classes of each split.
        """
        if not self.writes:
            return
        self.place.merge_completions()
        self.place.merge_predictions()
        title = f"{result.method}, {result.data}, {result.setting}, {result.shots} shots, seed {result.seed}"
        title += f"\n{result.model}, {result.protocol}, {', '.join(dict.fromkeys(result.origins.values()))}"
        figures.curves(self.place.read_log("metrics.jsonl"), title, self.place.path / "curves.png")
        for split in (split for split in after.summary if split != "val"):
            summary = after.summary[split]
            note = f"{title}\n{split} accuracy {100 * summary['accuracy']:.1f} % of {summary['n']}"
            table = metrics.confusion(after.predictions[split], names[split])
            figures.confusion(table, names[split], note, self.place.path / f"confusion-{split}.png")
        self.place.write_result(result)

    def close(self, failed: bool) -> None:
        """End the tracker's run and release the files."""
        self.tracker.close(self.measured, failed)
        self.place.close()
