"""Everything a run writes while it goes: the run folder first, the tracker second. Silent on ranks other than 0."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from common import metrics
from common.distributed import rank
from common.evaluate import Evaluation
from common.report import figures
from common.run_folder import RunFolder
from common.tracking import Tracker
from common.types import Result, Step

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

    def update(self, number: int, step: Step, last: bool) -> None:
        """One update; `number` counts from 1."""
        self._metrics(number, {**step.metrics, **{f"time/{phase}_s": s for phase, s in step.seconds.items()}})
        if not self.writes:
            return
        self.rows += step.rows
        if number % self.table_every == 0 or last:
            self.tracker.completions(step.rows, number)
        if self.rows and (number % COMPLETIONS_EVERY == 0 or last):
            self.place.write_completions(self.rows, number)
            self.rows = []
        if last:
            self.place.merge_completions()

    def evaluation(self, number: int, found: Evaluation) -> None:
        """What was measured after `number` updates."""
        self.measured = found.scalars
        log.info("after %d updates: %s", number, found.scalars)
        self._metrics(number, found.scalars)

    def finish(self, result: Result, before: Evaluation, after: Evaluation, names: Sequence[str]) -> None:
        """Predictions, pictures, and last the result, whose presence means that the run is finished."""
        if not self.writes:
            return
        self.place.write_predictions(
            {
                (phase, split): predictions
                for phase, found in (("zero_shot", before), ("eval", after))
                for split, predictions in found.predictions.items()
            }
        )
        title = f"{result.method}, {result.data}, {result.shots} shots, seed {result.seed}"
        title += f" ({result.model}, {result.protocol})"
        figures.curves(self.place.metrics(), title, self.place.path / "curves.png")
        summary = after.summary["test"]
        note = f"{title}\ntest accuracy {100 * summary['accuracy']:.1f} % of {summary['n']}"
        table = metrics.confusion(after.predictions["test"], names)
        figures.confusion(table, names, note, self.place.path / "confusion.png")
        self.place.write_result(result)

    def close(self, failed: bool) -> None:
        """End the tracker's run and release the files."""
        self.tracker.close(self.measured, failed)
        self.place.close()

    def _metrics(self, number: int, values: dict[str, float]) -> None:
        if self.writes:
            self.place.log_metrics({"step": number, **values})
            self.tracker.log(values, number)
