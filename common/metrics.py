"""Numbers about predictions: accuracy with intervals, per class, paired tests, and how good the probabilities of the
class names are. Pure Python, no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from common.parsing import normalize
from common.types import Prediction


def wilson_interval(successes: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default (Wilson 1927).

    >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    if total == 0:
        return 0.0, 1.0
    share, square = successes / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def overall(accuracies: Mapping[str, float]) -> dict[str, float]:
    """One number for several splits: harmonic mean of base and new (Xian et al. 2017), mean over other datasets.

    >>> overall({"val": 0.9, "base": 0.5, "new": 0.25})
    {'harmonic_mean': 0.3333333333333333}
    >>> overall({"test": 0.9, "dtd": 0.5, "eurosat": 0.25}), overall({"test": 0.9})
    ({'mean_of_targets': 0.375}, {})
    """
    found = {}
    if {"base", "new"} <= accuracies.keys():
        base, new = accuracies["base"], accuracies["new"]
        found["harmonic_mean"] = 2 * base * new / (base + new) if base + new else 0.0
    if targets := [value for name, value in accuracies.items() if name not in ("val", "test", "base", "new")]:
        found["mean_of_targets"] = fmean(targets)
    return found


def paired_test(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Two classifiers on the same images: McNemar's exact test, and the 95 % interval of the accuracy difference.

    The p-value is two-sided, from the binomial distribution of the images on which the two disagree. The interval is
    Bonett and Price's adjusted Wald interval (2012), which adds one disagreement of either kind.

    >>> result = paired_test([True] * 5 + [False] * 15, [True] * 4 + [False] + [True] * 10 + [False] * 5)
    >>> result["fixed"], result["broken"], round(result["p_value"], 4), result["difference"]
    (10, 1, 0.0117, 0.45)
    """
    fixed = sum(not b and a for b, a in zip(before, after, strict=True))
    broken = sum(b and not a for b, a in zip(before, after, strict=True))
    n, disagreements = len(before), fixed + broken
    tail = sum(math.comb(disagreements, k) for k in range(min(fixed, broken) + 1))
    p_value = min(1.0, float(2 * tail / 2**disagreements)) if disagreements < 1000 else _normal_p(fixed, broken)
    up, down = (fixed + 1) / (n + 2), (broken + 1) / (n + 2)
    half = 1.959963984540054 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return {
        "difference": (fixed - broken) / n if n else 0.0,
        "ci95": [max(-1.0, up - down - half), min(1.0, up - down + half)],
        "fixed": fixed,
        "broken": broken,
        "p_value": p_value,
    }


def _normal_p(fixed: int, broken: int) -> float:
    """McNemar's chi-square approximation with continuity correction, for many disagreements."""
    return math.erfc((abs(fixed - broken) - 1) / math.sqrt(2 * (fixed + broken)))


def summarize(
    predictions: Sequence[Prediction], names: Sequence[str], seconds: float, label_seconds: float = 0.0
) -> dict[str, Any]:
    """What metrics.json says about one split.

    Args:
        predictions: Of all its images.
        names: Class names, in the order of `per_class`.
        seconds: Spent on the answers.
        label_seconds: Spent on the probabilities of the class names.

    Returns:
        Shares of 1. `probability` is there if label scoring was on (see `probability_metrics`).
    """
    n = len(predictions)
    correct = sum(p.correct for p in predictions)
    official = sum(p.correct_official for p in predictions)
    count = Counter(p.label for p in predictions)
    right = Counter(p.label for p in predictions if p.correct)
    summary: dict[str, Any] = {
        "n": n,
        "accuracy": correct / n,
        "accuracy_official": official / n,
        "ci95": list(wilson_interval(correct, n)),
        "ci95_official": list(wilson_interval(official, n)),
        "per_class": {name: right[name] / count[name] for name in names if count[name]},
        "well_formed": sum(p.formatted for p in predictions) / n,
        "mean_tokens": sum(p.tokens for p in predictions) / n,
        "truncated": sum(p.truncated for p in predictions) / n,
        "seconds": seconds,
    }
    if all(p.choices for p in predictions):
        truths = [p.choices.index(p.label) if p.label in p.choices else None for p in predictions]
        summary["probability"] = {
            **probability_metrics([p.probabilities for p in predictions], truths),
            "raw": probability_metrics([p.probabilities_raw for p in predictions], truths),
            "seconds": label_seconds,
        }
    return summary


def probability_metrics(probabilities: Sequence[Sequence[float]], truths: Sequence[int | None]) -> dict[str, Any]:
    """How good the probabilities of the offered names are, whatever was generated.

    Args:
        probabilities: Of the names that were offered for each image; they add up to 1.
        truths: Place of the true name among them; None if it was not offered, which counts as an error everywhere.

    Returns:
        `top1` and `top5` accuracy (any list of up to five names has a `top5` of 1), `ece`, `brier`, `aurc`, and
        `risk_coverage`: [coverage, risk] at 10 % to 100 % of the images.
    """
    ranks = [rank_of(row, truth) for row, truth in zip(probabilities, truths, strict=True)]
    confidences = [max(row) for row in probabilities]
    right = [rank == 0 for rank in ranks]
    risks = selective_risks(confidences, right)
    return {
        "top1": fmean(right),
        "top5": fmean(rank < 5 for rank in ranks),
        "ece": calibration_error(confidences, right),
        "brier": fmean(brier(row, truth) for row, truth in zip(probabilities, truths, strict=True)),
        "aurc": fmean(risks),
        "risk_coverage": [[tenth / 10, risks[math.ceil(len(risks) * tenth / 10) - 1]] for tenth in range(1, 11)],
    }


def rank_of(probabilities: Sequence[float], truth: int | None) -> float:
    """How many names come before the true one, the most probable first; of equal ones the first in the list leads.

    >>> rank_of([0.2, 0.5, 0.3], 2), rank_of([0.4, 0.4, 0.2], 1), rank_of([1.0], None)
    (1, 1, inf)
    """
    if truth is None:
        return math.inf
    mine = probabilities[truth]
    return sum(p > mine or (p == mine and place < truth) for place, p in enumerate(probabilities))


def brier(probabilities: Sequence[float], truth: int | None) -> float:
    """Squared distance of the probabilities from the truth's 1 and the others' 0, between 0 and 2 (Brier 1950).

    A truth that was not offered had probability 0.

    >>> round(brier([0.7, 0.2, 0.1], 0), 4), brier([0.0, 1.0], 0), brier([1.0, 0.0], None)
    (0.14, 2.0, 2.0)
    """
    missed = 1.0 if truth is None else 0.0
    return missed + sum((p - (place == truth)) ** 2 for place, p in enumerate(probabilities))


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 15) -> float:
    """Expected calibration error: |accuracy - mean confidence| in bins of equal width, weighted by their images.

    Guo et al. 2017 (arXiv 1706.04599), equation 3. Bins are closed above: (0, 1/15], (1/15, 2/15], ...

    Two images at 0.95, both right, and two at 0.65, one right: 1/2 |1 - 0.95| + 1/2 |0.5 - 0.65| = 0.1.

    >>> round(calibration_error([0.95, 0.65, 0.95, 0.65], [True, True, True, False]), 6)
    0.1
    """
    placed = sorted((math.ceil(c * bins), c, r) for c, r in zip(confidences, right, strict=True))
    gaps = 0.0
    for _, members in groupby(placed, key=lambda image: image[0]):
        gaps += abs(sum(r - c for _, c, r in members))
    return gaps / len(placed)


def selective_risks(confidences: Sequence[float], right: Sequence[bool]) -> list[float]:
    """The risk-coverage curve: the share of errors among the k most confident images, for k = 1 to all.

    Geifman and El-Yaniv 2017 (arXiv 1705.08500); the mean over the curve is AURC (Geifman et al. 2019, arXiv
    1805.08206). Images of equal confidence count with their expected errors, so that their order does not matter.

    >>> [round(risk, 3) for risk in selective_risks([0.9, 0.6, 0.8, 0.7], [True, True, False, True])]
    [0.0, 0.5, 0.333, 0.25]
    >>> selective_risks([0.9, 0.9], [True, False])
    [0.5, 0.5]
    """
    ordered = sorted(zip(confidences, right, strict=True), reverse=True)
    risks: list[float] = []
    errors = 0.0
    for _, equal in groupby(ordered, key=lambda image: image[0]):
        wrong = [not r for _, r in equal]
        for share in [fmean(wrong)] * len(wrong):
            errors += share
            risks.append(errors / (len(risks) + 1))
    return risks


def confusion(predictions: Sequence[Prediction], names: Sequence[str]) -> list[list[int]]:
    """Counts of [true class][answered class]; the last column holds answers that are no class name."""
    place = {normalize(name): i for i, name in enumerate(names)}
    table = [[0] * (len(names) + 1) for _ in names]
    for p in predictions:
        table[place[normalize(p.label)]][place.get(normalize(p.answer), len(names))] += 1
    return table
