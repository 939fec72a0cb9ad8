"""Compute the metrics of a split: accuracy with intervals, per class, paired tests, calibration. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.parsing import normalize
from common.types import Answers, Prediction, Probabilities, Reply

# Entries of metrics.json on one split, as types.


@dataclass(frozen=True)
class ProbabilitySummary:
    """Quality of the probabilities of the offered classes; see `probability_metrics`.

    raw: the same without length normalisation.
    seconds: time to compute the probabilities.
    """

    top1: float
    top5: float
    ece: float
    brier: float
    aurc: float
    risk_coverage: list[list[float]]
    raw: ProbabilitySummary | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        values = {**vars(self), "raw": None if self.raw is None else self.raw.to_json()}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ProbabilitySummary:
        """Build a summary from the output of `to_json`."""
        raw = values.get("raw")
        return cls(**{**values, "raw": None if raw is None else cls.from_json(raw)})


@dataclass(frozen=True)
class Summary:
    """Metrics of one split; shares are from 0 to 1, intervals hold 95 %.

    accuracy_macro: mean of the classes' accuracies; None if all classes have equally many images, since it is then
        the accuracy.
    accuracy_official, accuracy_aliases, well_formed, mean_tokens, truncated, probability: None where they do not
        apply, such as metrics of replies for a classifier.
    per_class: accuracy by class name;
    images_per_class: number of images by class name.
    facts: entries of the method (`Prompting.diagnostics`), beside the others in metrics.json.
    """

    n: int
    accuracy: float
    ci95: list[float]
    per_class: dict[str, float]
    seconds: float
    images_per_class: dict[str, int] = field(default_factory=dict)
    accuracy_macro: float | None = None
    accuracy_official: float | None = None
    ci95_official: list[float] | None = None
    accuracy_aliases: float | None = None
    well_formed: float | None = None
    mean_tokens: float | None = None
    truncated: float | None = None
    probability: ProbabilitySummary | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the entries of metrics.json, without those that are None."""
        own = {name: value for name, value in vars(self).items() if name not in ("facts", "probability")}
        if self.probability is not None:
            own["probability"] = self.probability.to_json()
        return {name: value for name, value in own.items() if value is not None} | self.facts

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Summary:
        """Build a summary from the output of `to_json`; entries that are not fields become facts."""
        known = {each.name for each in fields(cls)} - {"facts", "probability"}
        own = {name: value for name, value in values.items() if name in known}
        probability = values.get("probability")
        return cls(
            **own,
            probability=None if probability is None else ProbabilitySummary.from_json(probability),
            facts={name: value for name, value in values.items() if name not in known | {"probability"}},
        )


# Functions that compute metrics.


def wilson_interval(successes: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, 95 % by default (Wilson 1927).

    >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    if total == 0:
        return 0.0, 1.0
    share, square = successes / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    # exactly 0 or 1 at the ends, where rounding errors would give a tiny difference
    return max(0.0, centre - half) if successes else 0.0, min(1.0, centre + half) if successes < total else 1.0


def overall(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Summarize several splits: harmonic mean of base and new (Xian et al. 2017), mean over other datasets.

    >>> overall({"val": 0.9, "base": 0.5, "new": 0.25})
    {'harmonic_mean': 0.3333333333333333}
    >>> overall({"test": 0.9, "dtd": 0.5, "eurosat": 0.25}), overall({"test": 0.9})
    ({'mean_of_targets': 0.375}, {})
    """
    means = {}
    if {"base", "new"} <= accuracies.keys():
        base, new = accuracies["base"], accuracies["new"]
        means["harmonic_mean"] = 2 * base * new / (base + new) if base + new else 0.0
    if targets := [value for name, value in accuracies.items() if name not in ("val", "test", "base", "new")]:
        means["mean_of_targets"] = fmean(targets)
    return means


def paired_test(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Compare two classifiers on the same images: McNemar's exact test, 95 % interval of the accuracy difference.

    The p-value is two-sided, from the binomial distribution of the images on which the two disagree. The interval is
    Bonett and Price's adjusted Wald interval (2012), which adds one disagreement of either kind.

    >>> result = paired_test([True] * 5 + [False] * 15, [True] * 4 + [False] + [True] * 10 + [False] * 5)
    >>> result["fixed"], result["broken"], round(result["p_value"], 4), result["difference"]
    (10, 1, 0.0117, 0.45)
    """
    fixed = sum(not b and a for b, a in zip(before, after, strict=True))
    broken = sum(b and not a for b, a in zip(before, after, strict=True))
    n = len(before)
    up, down = (fixed + 1) / (n + 2), (broken + 1) / (n + 2)
    half = 1.959963984540054 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return {
        "difference": (fixed - broken) / n if n else 0.0,
        "ci95": [max(-1.0, up - down - half), min(1.0, up - down + half)],
        "fixed": fixed,
        "broken": broken,
        "p_value": exact_p(fixed, broken),
    }


def exact_p(fixed: int, broken: int) -> float:
    """Return McNemar's exact two-sided p-value: a fair coin for every image on which two classifiers disagree.

    >>> exact_p(3, 0), exact_p(500, 500)
    (0.25, 1.0)
    """
    from scipy.stats import binomtest  # here, because the import takes a second

    return float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0


def summarize(
    answers: Answers, names: Sequence[str], aliases: bool = False, facts: Mapping[str, Any] | None = None
) -> Summary:
    """Summarize the answers to one split.

    Args:
        answers: Answers to all its images.
        names: Class names, in the order of `per_class`.
        aliases: Whether classes have aliases, so that the accuracy with aliases is reported.
        facts: Entries of the method.
    """
    predictions = answers.predictions
    n = len(predictions)
    correct = sum(p.correct for p in predictions)
    count = Counter(p.label for p in predictions)
    right = Counter(p.label for p in predictions if p.correct)
    # classes without test images have no accuracy
    per_class = {name: right[name] / count[name] for name in names if count[name]}
    return Summary(
        n=n,
        accuracy=correct / n,
        ci95=list(wilson_interval(correct, n)),
        per_class=per_class,
        images_per_class={name: count[name] for name in per_class},
        accuracy_macro=macro_accuracy(predictions),
        seconds=answers.seconds,
        accuracy_aliases=sum(p.correct_alias for p in predictions) / n if aliases else None,
        probability=_probability_summary(answers),
        facts=dict(facts or {}),
        **_about_replies([p.reply for p in predictions if p.reply is not None]),
    )


def macro_accuracy(predictions: Sequence[Prediction]) -> float | None:
    """Return the mean of the classes' accuracies; None if all have equally many images, since it is then the accuracy.

    Only classes with images count. Two classes of one name (ImageNet's missiles) count as two.
    """
    count = Counter(p.label_index for p in predictions)
    right = Counter(p.label_index for p in predictions if p.correct)
    return fmean(right[label] / n for label, n in count.items()) if len({*count.values()}) > 1 else None


def _about_replies(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return the metrics of replies; empty for a classifier, which gives none."""
    if not replies:
        return {}
    n = len(replies)
    official = [reply.correct_official for reply in replies if reply.correct_official is not None]
    matched = {"accuracy_official": sum(official) / n, "ci95_official": list(wilson_interval(sum(official), n))}
    return {
        **(matched if official else {}),
        "well_formed": sum(reply.well_formed for reply in replies) / n,
        "mean_tokens": sum(reply.tokens for reply in replies) / n,
        "truncated": sum(reply.truncated for reply in replies) / n,
    }


def _probability_summary(answers: Answers) -> ProbabilitySummary | None:
    table = answers.probabilities
    if table is None:
        return None
    truths = truth_places(table, [p.label for p in answers.predictions])
    raw = None if table.raw is None else probability_metrics(table.raw, truths)
    return replace(probability_metrics(table.values, truths, table.logs), raw=raw, seconds=answers.scoring_seconds)


def truth_places(table: Probabilities, labels: Sequence[str]) -> NDArray[np.int64]:
    """Return the position of each image's true class among those offered to it, -1 if it was not offered. [N]."""
    index = {name: number for number, name in enumerate(table.names)}
    truths = np.array([index.get(label, -2) for label in labels])[:, None]  # no class is number -2
    offered = table.classes == truths  # [N, K]
    return np.where(offered.any(1), offered.argmax(1), -1)


def probability_metrics(
    probabilities: NDArray[np.float32], truths: NDArray[np.int64], logs: NDArray[np.float32] | None = None
) -> ProbabilitySummary:
    """Compute the quality of the probabilities of the offered classes, independent of the generated reply.

    Args:
        probabilities: Probabilities of the classes offered for each image; they sum to 1. Shape: [N, K]
        truths: Index of the true class among them; -1 if it was not offered, which counts as an error everywhere. [N]
        logs: Their logarithms, which rank classes whose probabilities are 0 in fp32; None: there are none. [N, K]

    Returns:
        `top1` and `top5` accuracy (any list of up to five names has a `top5` of 1), `ece`, `brier`, `aurc`, and
        `risk_coverage`: [coverage, risk] at 10 % to 100 % of the images.
    """
    ranks = truth_ranks(probabilities if logs is None else logs, truths)
    confidences = probabilities.max(1).astype(float).tolist()
    right = (ranks == 0).tolist()
    risks = selective_risks(confidences, right)
    return ProbabilitySummary(
        top1=fmean(right),
        top5=float((ranks < 5).mean()),
        ece=calibration_error(confidences, right),
        brier=fmean(brier(probabilities, truths).tolist()),
        aurc=fmean(risks),
        risk_coverage=[[tenth / 10, risks[math.ceil(len(risks) * tenth / 10) - 1]] for tenth in range(1, 11)],
    )


def truth_ranks(probabilities: NDArray[Any], truths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the number of classes before the true one, the most probable first; ties are in the order of the list.

    Infinite if the true class was not offered. Shape: [N, K], [N] -> [N].

    >>> rows = np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.5, 0.3, 0.2]])
    >>> truth_ranks(rows, np.array([2, 1, -1])).tolist()
    [1.0, 1.0, inf]
    """
    # -1 is clipped to 0 to be a valid index; such rows become infinite below
    mine = np.take_along_axis(probabilities, truths.clip(0)[:, None], 1)  # [N, 1]
    before = np.arange(probabilities.shape[1]) < truths[:, None]
    ahead = (probabilities > mine) | ((probabilities == mine) & before)
    return np.where(truths < 0, np.inf, ahead.sum(1))


def brier(probabilities: NDArray[Any], truths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the squared distance of the probabilities from the one-hot truth, between 0 and 2 (Brier 1950).

    A true class that was not offered counts as probability 0. Shape: [N, K], [N] -> [N].

    >>> brier(np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), np.array([0, 0, -1])).round(4).tolist()
    [0.14, 2.0, 2.0]
    """
    certain = np.arange(probabilities.shape[1]) == truths[:, None]
    distance = ((probabilities.astype(np.float64) - certain) ** 2).sum(1)
    return np.where(truths < 0, distance + 1, distance)


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 15) -> float:
    """Return the expected calibration error: |accuracy - mean confidence| in bins of equal width, weighted by images.

    Guo et al. 2017 (arXiv 1706.04599), equation 3. Bins are closed above: (0, 1/15], (1/15, 2/15], ...

    Two images at 0.95, both right, and two at 0.65, one right: 1/2 |1 - 0.95| + 1/2 |0.5 - 0.65| = 0.1.

    >>> round(calibration_error([0.95, 0.65, 0.95, 0.65], [True, True, True, False]), 6)
    0.1
    """
    return sum(n * abs(accuracy - mean) for mean, accuracy, n in reliability(confidences, right, bins)) / len(right)


def reliability(confidences: Sequence[float], right: Sequence[bool], bins: int = 15) -> list[tuple[float, float, int]]:
    """Return mean confidence, accuracy and number of images of each non-empty bin (see `calibration_error`).

    >>> reliability([0.9, 0.6, 0.7], [True, False, True], 2)
    [(0.7333333333333334, 0.6666666666666666, 3)]
    """
    placed = sorted((math.ceil(c * bins), c, r) for c, r in zip(confidences, right, strict=True))
    groups = [[(c, r) for _, c, r in members] for _, members in groupby(placed, key=lambda image: image[0])]
    return [(fmean(c for c, _ in each), fmean(r for _, r in each), len(each)) for each in groups]


def selective_risks(confidences: Sequence[float], right: Sequence[bool]) -> list[float]:
    """Return the risk-coverage curve: the share of errors among the k most confident images, for k = 1 to all.

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
    """Count [true class][answered class]; the last column holds answers that are not a class name."""
    column = {normalize(name): i for i, name in enumerate(names)}
    table = [[0] * (len(names) + 1) for _ in names]
    for p in predictions:
        table[column[normalize(p.label)]][column.get(normalize(p.answer), len(names))] += 1
    return table
