"""Make confidences mean something: a calibration by held-out images, and a threshold that keeps a promised risk.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599) divides the logits by one number. A curve of two more numbers
(Platt 1999) then maps the probability of the most probable class to its confidence. Both keep the most probable class.
They are fitted where the model has not been trained: on predictions out of cross-validation, or on the validation
images. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.evaluation.metrics import calibration_error, truth_places
from common.types import Answers, Probabilities

BOUNDS = (1e-3, 1e3)  # of the temperature
CONFIDENCE = 0.95  # with which `threshold` keeps its promise
STEPS = 10  # coverages that `threshold` tries: 10 %, 20 %, ... of the images


CURVE = 2.0  # penalty, our choice by 14 learners on garments (docs/log.md)
EDGE = 1e-6  # a probability counts as no closer to 0 or 1 than this


@dataclass(frozen=True)
class Calibration:
    """How the probabilities of a run become confidences.

    temperature: number that the logits are divided by.
    slope, bias: of the curve; the log-odds of the most probable class are multiplied and shifted.
    source: `folds` or `val`; "": none, the probabilities stay.
    n: number of predictions that it was fitted on.
    ece: expected calibration error of each test split, without and with it.
    """

    temperature: float = 1.0
    slope: float = 1.0
    bias: float = 0.0
    source: str = ""
    n: int = 0
    ece: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, table: Probabilities) -> NDArray[np.float64]:
        """Return the calibrated probabilities; each row adds up to 1. Shape: [N, K].

        The other classes share what the most probable one leaves as before, or more evenly where one of them would
        exceed it: it stays the most probable one.

        >>> table = Probabilities(("a", "b"), np.array([[0, 1]]), np.array([[0.8, 0.2]], np.float32))
        >>> Calibration(2.0)(table).round(4).tolist()  # sqrt(0.8) / (sqrt(0.8) + sqrt(0.2))
        [[0.6667, 0.3333]]
        >>> Calibration(slope=0.5)(table).round(4).tolist()  # sigmoid(ln(4) / 2)
        [[0.6667, 0.3333]]
        """
        values = np.exp(log_softmax(log_probabilities(table) / self.temperature))
        if (self.slope, self.bias) == (1.0, 0.0) or values.shape[1] < 2:
            return values
        first = np.zeros(values.shape, bool)
        np.put_along_axis(first, values.argmax(1)[:, None], True, 1)
        offered = (table.classes >= 0).sum(1, keepdims=True)  # [N, 1], as all that follows
        others = np.where(first, 0.0, values)
        others /= np.maximum(others.sum(1, keepdims=True), np.finfo(np.float64).tiny)
        even = ((table.classes >= 0) & ~first) / np.maximum(offered - 1, 1)
        confidence = sigmoid(self.slope * _log_odds(values.max(1, keepdims=True)) + self.bias)
        confidence = np.where(offered > 1, np.maximum(confidence, 1 / offered), 1.0)
        # the second class has (1 - confidence) x its share of the others, and that must not exceed the confidence
        second, most = others.max(1, keepdims=True), confidence / np.maximum(1 - confidence, EDGE)
        mixed = np.where(second > most, (second - most) / np.maximum(second - even.max(1, keepdims=True), EDGE), 0.0)
        return np.where(first, confidence, (1 - confidence) * ((1 - mixed) * others + mixed * even))


def read(values: Mapping[str, Any]) -> Calibration:
    """Return the calibration of a result's entry; none if it is empty."""
    return Calibration(**values)


def temperature(scores: NDArray[np.floating], truths: NDArray[np.integer]) -> float:
    """Return the temperature with the smallest cross entropy; 1 if there is no image to fit on.

    The truth is smoothed as by Platt (1999): it keeps a share 1 / (n + 2) for all classes together, since n images
    without an error do not show that there are none.

    Args:
        scores: Logits or logarithms of probabilities; minus infinity for classes that were not offered. Shape: [N, C].
        truths: Index of the true class; -1 if it was not offered: such images are left out. Shape: [N].
    """
    from scipy.optimize import minimize_scalar  # here, because the import takes a second

    rows = np.flatnonzero(truths >= 0)
    if not len(rows):
        return 1.0
    kept, truths = scores[rows].astype(np.float64), truths[rows]
    offered = np.isfinite(kept)
    share = 1 / (len(rows) + 2)

    def loss(log_temperature: float) -> float:
        logs = log_softmax(kept / math.exp(log_temperature))
        truth = np.take_along_axis(logs, truths[:, None], 1)[:, 0]
        mean = np.where(offered, logs, 0).sum(1) / offered.sum(1)
        return -float(((1 - share) * truth + share * mean).mean())

    low, high = (math.log(bound) for bound in BOUNDS)
    # the loss is convex in 1 / T, hence has one minimum in log T
    return math.exp(float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4}).x))


def log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logarithms of the softmax along the last axis. Shape: [N, C] -> [N, C]."""
    shifted = scores - scores.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def log_probabilities(table: Probabilities) -> NDArray[np.float64]:
    """Return the logarithms of the probabilities; minus infinity where no class was offered. Shape: [N, K]."""
    if table.logs is not None:
        return table.logs.astype(np.float64)
    smallest = np.finfo(np.float32).tiny  # a probability that was rounded to 0 is not impossible
    logs = np.log(np.maximum(table.values.astype(np.float64), smallest))
    return np.where(table.classes >= 0, logs, -np.inf)


def fit(held_out: Answers, source: str) -> Calibration | None:
    """Return the calibration by answers to held-out images; None if they have no probabilities."""
    table = held_out.probabilities
    if table is None:
        return None
    truths = truth_places(table, [p.label for p in held_out.predictions])
    return Calibration(*by_images(log_probabilities(table), truths), source, len(truths))


def by_images(scores: NDArray[np.floating], truths: NDArray[np.integer]) -> tuple[float, float, float]:
    """Return temperature, slope and bias.

    Together they minimise the cross entropy of being right with Platt's smoothed targets (1999), and penalties that
    draw the temperature to the one that is best for all classes, and the curve to the identity (CURVE).

    Args:
        scores: As in `temperature`. Shape: [N, C].
        truths: As in `temperature`; an image whose class was not offered counts as a wrong answer. Shape: [N].
    """
    from scipy.optimize import minimize  # here, because the import takes a second

    alone, kept = temperature(scores, truths), scores.astype(np.float64)
    right = kept.argmax(1) == truths
    hits = int(right.sum())
    targets = np.where(right, (hits + 1) / (hits + 2), 1 / (len(right) - hits + 2))

    def loss(w: NDArray[np.float64]) -> float:
        odds = _log_odds(np.exp(log_softmax(kept / (alone * math.exp(w[2]))).max(1)))
        curved = w[0] * odds + w[1]
        entropy = (np.logaddexp(0, curved) - targets * curved).sum()
        return float(entropy + CURVE * ((w[0] - 1) ** 2 + w[1] ** 2 + w[2] ** 2))

    # a slope above 0 keeps the order of confidences
    bounds = [(1e-3, None), (None, None), (-4.0, 4.0)]
    slope, bias, more = minimize(loss, np.array([1.0, 0.0, 0.0]), method="L-BFGS-B", bounds=bounds).x
    return alone * math.exp(more), float(slope), float(bias)


def _log_odds(values: NDArray[np.float64]) -> NDArray[np.float64]:
    kept = values.clip(EDGE, 1 - EDGE)
    return np.asarray(np.log(kept / (1 - kept)))


def sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 / (1 + exp(-x)) of each value."""
    return np.asarray(1 / (1 + np.exp(-values)))


def errors(answers: Answers, calibrated: Calibration) -> list[float] | None:
    """Return the expected calibration error without and with a calibration; None without probabilities."""
    table = answers.probabilities
    if table is None:
        return None
    truths = truth_places(table, [p.label for p in answers.predictions])
    found = []
    for values in (table.values, calibrated(table)):
        right = values.argmax(1) == truths
        found.append(calibration_error(values.max(1).astype(float).tolist(), right.tolist()))
    return found


def upper_bound(wrong: int, answered: int, confidence: float) -> float:
    """Return the exact upper bound of the share of wrong answers (Clopper and Pearson 1934).

    >>> round(upper_bound(0, 59, 0.95), 4)  # 0.05 ** (1 / 59) = 0.9505
    0.0495
    """
    from scipy.stats import beta

    return 1.0 if wrong >= answered else float(beta.ppf(confidence, wrong + 1, answered - wrong))


def threshold(confidences: Sequence[float], right: Sequence[bool], risk: float) -> float:
    """Return the lowest confidence from which on at most `risk` of the answers are wrong; infinity if there is none.

    Selection with guaranteed risk control (Geifman and El-Yaniv 2017, arXiv 1705.08500): for other images of the same
    kind, the share of wrong answers among those that are given is at most `risk`, with a probability of 95 % over the
    draw of the images that the threshold is chosen by. For each of STEPS coverages the exact upper bound on the share
    of wrong answers is taken at a confidence that allows for having tried all of them (Bonferroni). So many images
    are needed that an unlikely row of right answers is excluded: 104 for a risk of 5 %. That the same images have
    chosen a learner's values, or its temperature, is not allowed for.

    Args:
        confidences: Confidence of each held-out answer.
        right: Whether it is right.
        risk: Accepted share of wrong answers among those that are given.
    """
    ordered = sorted(zip(confidences, right, strict=True), reverse=True)
    best = math.inf
    for step in range(1, STEPS + 1):
        count = len(ordered) * step // STEPS
        if not count:
            continue
        lowest = ordered[count - 1][0]
        answered = [is_right for confidence, is_right in ordered if confidence >= lowest]  # equal ones together
        wrong = len(answered) - sum(answered)
        if upper_bound(wrong, len(answered), 1 - (1 - CONFIDENCE) / STEPS) <= risk:
            best = lowest
    return best


def lowest_risk(confidences: Sequence[float], right: Sequence[bool]) -> float | None:
    """Return the lowest risk in whole percent that `threshold` can promise; None: not even 99 %."""
    risks = (percent / 100 for percent in range(1, 100))
    return next((risk for risk in risks if threshold(confidences, right, risk) < math.inf), None)


def images_needed(risk: float) -> int:
    """Return the smallest number of right answers, without a wrong one, that `threshold` can promise a risk by.

    >>> images_needed(0.05), images_needed(0.2)
    (104, 24)
    """
    return math.ceil(math.log((1 - CONFIDENCE) / STEPS) / math.log(1 - risk))
