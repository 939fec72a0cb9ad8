"""When to say nothing: the confidence below which too many answers of the validation images were wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.report.html import transcripts
from common.types import UserError


def threshold_of(run: Path, risk: float) -> float:
    """The threshold of a finished run.

    Args:
        run: Its folder.
        risk: Share of wrong answers that is accepted among those that are given.

    Raises:
        UserError: It has no validation images, or their answers have no probabilities.
    """
    if not 0 <= risk < 1:
        raise UserError(f"risk={risk} must be a share from 0 to below 1, such as 0.05")
    rows = [row for row in transcripts.tests(run, {}) if row.split == "val" and row.sureness is not None]
    if not rows:
        raise UserError(
            f"risk={risk}: {run} has no validation images with probabilities to choose a threshold by; train with"
            " validation=held_out (or few) and label_scoring=true"
        )
    said = [row for row in rows if row.sureness]  # what is no class name is never given as an answer
    return choose([row.sureness or 0.0 for row in said], [bool(row.after) for row in said], risk)


def choose(confidences: Sequence[float], right: Sequence[bool], risk: float) -> float:
    """The lowest confidence from which on at most `risk` of the answers are wrong; infinity if there is none.

    Equal confidences stand or fall together. Geifman and El-Yaniv 2017 (arXiv 1705.08500), without their bound.

    >>> choose([0.9, 0.8, 0.7, 0.6], [True, True, False, True], 0.25)
    0.6
    >>> choose([0.9, 0.8, 0.7, 0.6], [True, True, False, True], 0.1), choose([0.9], [False], 0.5)
    (0.8, inf)
    """
    ordered = sorted(zip(confidences, right, strict=True), reverse=True)
    best, wrong = float("inf"), 0
    for number, (confidence, is_right) in enumerate(ordered, 1):
        wrong += not is_right
        last_of_equals = number == len(ordered) or ordered[number][0] < confidence
        if last_of_equals and wrong <= risk * number:
            best = confidence
    return best
