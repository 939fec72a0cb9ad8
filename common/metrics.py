"""Numbers about predictions: accuracy with intervals, per class, and paired tests. Pure Python, no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
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


def summarize(predictions: Sequence[Prediction], names: Sequence[str], seconds: float) -> dict[str, Any]:
    """What metrics.json says about one split. Accuracies are shares of 1; `per_class` is in the order of `names`."""
    n = len(predictions)
    correct = sum(p.correct for p in predictions)
    official = sum(p.correct_official for p in predictions)
    count = Counter(p.label for p in predictions)
    right = Counter(p.label for p in predictions if p.correct)
    return {
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


def confusion(predictions: Sequence[Prediction], names: Sequence[str]) -> list[list[int]]:
    """Counts of [true class][answered class]; the last column holds answers that are no class name."""
    place = {normalize(name): i for i, name in enumerate(names)}
    table = [[0] * (len(names) + 1) for _ in names]
    for p in predictions:
        table[place[normalize(p.label)]][place.get(normalize(p.answer), len(names))] += 1
    return table
