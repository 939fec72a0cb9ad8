"""Abstain: choose the confidence below which too many answers to the held-out images of a run were wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from common.counted import counted
from common.evaluation import calibration, metrics, novelty
from common.parsing import normalize
from common.run.result import Result
from common.run.run_folder import RunFolder
from common.types import Answers, UserError


def threshold_of(run: Path, risk: float) -> float:
    """Choose the threshold of a finished run by its answers to images that it was not trained on.

    Args:
        run: Folder of the run.
        risk: Accepted share of wrong answers among those that are given.

    Returns:
        The threshold of the calibrated confidence; see `calibration.threshold`.

    Raises:
        UserError: The run has no such images, their answers have no probabilities, or they are too few or too often
            wrong to promise that risk.
    """
    if not 0 < risk < 1:
        raise UserError(f"risk={risk} must be a share between 0 and 1, such as 0.05")
    held_out, found = RunFolder(run).read_held_out(), Result.load(run).calibration
    if held_out is None or held_out.probabilities is None or not found:
        raise UserError(
            f"risk={risk}: {run} has no validation images with probabilities to choose a threshold by; train with"
            " validation=held_out (or few) and label_scoring=true"
        )
    confidences = said(held_out, calibration.read(found))
    given = [(c, p.correct) for c, p in zip(confidences, held_out.predictions, strict=True) if c is not None]
    kept, right = [c for c, _ in given], [is_right for _, is_right in given]
    chosen = calibration.threshold(kept, right, risk)
    if chosen == math.inf:
        lowest = calibration.lowest_risk(kept, right)
        possible = "none can be" if lowest is None else f"the lowest that can be is {lowest:g}"
        raise UserError(
            f"risk={risk} cannot be promised by {counted(len(given), 'held-out answer')} of {run}, {possible}: at least"
            f" {calibration.images_needed(risk)} right ones, the surest without exception, are needed; train on more"
            f" photos, or accept {'a higher risk' if lowest is None else f'risk={lowest:g}'}"
        )
    return chosen


def check_unknown(model: Path, share: float) -> None:
    """Check that a share of known photos that may be called unknown can be kept.

    Raises:
        UserError: The share is none, the model has no detector, or too few photos were cross-validated.
    """
    if not 0 < share < 1:
        raise UserError(f"unknown={share} must be a share between 0 and 1, such as 0.05")
    detector = novelty.Detector.load(model)
    if detector is None:
        raise UserError(
            f"unknown={share}: {model.parent} cannot tell unknown classes; few-shot learners can whose photos were"
            " cross-validated: experiment=photos, or calibration=folds"
        )
    if len(detector.known) < (needed := novelty.smallest(share)):
        raise UserError(
            f"unknown={share} needs {needed} cross-validated photos, and {model.parent} has"
            f" {len(detector.known)}; train on more, or accept a higher share"
        )


def said(answers: Answers, calibrated: calibration.Calibration) -> list[float | None]:
    """Return the calibrated probability of every answer; None for one that is no offered name."""
    table = answers.probabilities
    assert table is not None, "checked by the caller"
    places = metrics.truth_places(table, _spelt(table.names, [p.answer for p in answers.predictions]))
    values = calibrated(table)
    return [None if place < 0 else float(row[place]) for place, row in zip(places.tolist(), values, strict=True)]


def _spelt(names: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Return the answers as the names are written."""
    known = {normalize(name): name for name in names}
    return [known.get(normalize(answer), answer) for answer in answers]
