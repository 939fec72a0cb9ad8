"""Intervals and tests against independent implementations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix, top_k_accuracy_score

from common import metrics
from common.types import Prediction


def prediction(label: str, answer: str, correct: bool | None = None) -> Prediction:
    right = label == answer if correct is None else correct
    return Prediction("0", label, answer, answer, right, right, right, True, 2, False)


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (1, 7), (50, 100), (1442, 1637), (10, 10)])
def test_wilson_equals_scipy(successes, total):
    expected = binomtest(successes, total).proportion_ci(method="wilson")
    assert metrics.wilson_interval(successes, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("fixed", "broken"), [(10, 1), (3, 3), (0, 5), (446, 22)])
def test_mcnemar_equals_the_binomial_test(fixed, broken):
    before = [False] * fixed + [True] * broken + [True, False] * 20
    after = [True] * fixed + [False] * broken + [True, False] * 20
    result = metrics.paired_test(before, after)
    assert (result["fixed"], result["broken"]) == (fixed, broken)
    assert result["p_value"] == pytest.approx(binomtest(fixed, fixed + broken).pvalue, rel=1e-9)
    assert result["difference"] == pytest.approx((fixed - broken) / len(before))
    low, high = result["ci95"]
    assert low < result["difference"] < high


def test_mcnemar_without_disagreement():
    assert metrics.paired_test([True, False], [True, False])["p_value"] == 1.0


def test_many_disagreements_use_the_chi_square_form():
    before, after = [False] * 700 + [True] * 600, [True] * 700 + [False] * 600
    exact = binomtest(700, 1300).pvalue
    assert metrics.paired_test(before, after)["p_value"] == pytest.approx(exact, rel=0.02)


def test_paired_test_refuses_other_images():
    with pytest.raises(ValueError):
        metrics.paired_test([True], [True, False])


def test_summarize():
    found = [prediction("six", "six"), prediction("six", "nine"), prediction("one", "one"), prediction("one", "one")]
    summary = metrics.summarize(found, ["one", "six", "nine"], seconds=1.5)
    assert (summary["n"], summary["accuracy"], summary["seconds"]) == (4, 0.75, 1.5)
    assert list(summary["per_class"].items()) == [("one", 1.0), ("six", 0.5)]


def test_confusion_equals_scikit_learn():
    names = ["one", "six", "nine"]
    pairs = [("six", "six"), ("six", "nine"), ("one", "Six"), ("nine", "nine"), ("one", "no idea")]
    table = metrics.confusion([prediction(*pair) for pair in pairs], names)
    expected = confusion_matrix([p[0] for p in pairs[:4]], [p[1].lower() for p in pairs[:4]], labels=names)
    assert [row[:3] for row in table] == expected.tolist()
    assert [row[3] for row in table] == [1, 0, 0]


@pytest.fixture
def scored():
    """Probabilities of seven classes for 400 images, often right, and the true classes."""
    rng = np.random.default_rng(0)
    truths = rng.integers(0, 7, 400)
    logits = rng.normal(size=(400, 7)) + 1.5 * np.eye(7)[truths]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities, truths


def test_brier_and_top_5_equal_scikit_learn(scored):
    probabilities, truths = scored
    found = metrics.probability_metrics(probabilities.tolist(), truths.tolist())
    one_vs_rest = [brier_score_loss(truths == k, probabilities[:, k]) for k in range(7)]
    assert found["brier"] == pytest.approx(sum(one_vs_rest), abs=1e-12)
    assert found["brier"] == pytest.approx(((probabilities - np.eye(7)[truths]) ** 2).sum(1).mean(), abs=1e-12)
    assert found["top1"] == pytest.approx(top_k_accuracy_score(truths, probabilities, k=1))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(truths, probabilities, k=5))


def test_calibration_error_equals_scikit_learns_bins(scored):
    probabilities, truths = scored
    confidences, right = probabilities.max(1), probabilities.argmax(1) == truths
    accuracy, confidence = calibration_curve(right, confidences, n_bins=15)
    edges = np.linspace(0, 1, 16)
    weights = np.histogram(confidences, edges)[0] / len(confidences)
    expected = (weights[weights > 0] * np.abs(accuracy - confidence)).sum()
    assert metrics.calibration_error(confidences.tolist(), right.tolist()) == pytest.approx(expected, abs=1e-12)


def test_calibration_of_the_extremes():
    assert metrics.calibration_error([1.0, 1.0], [True, True]) == 0
    assert metrics.calibration_error([1.0, 1.0], [False, False]) == 1
    # edges belong to the bin below: 3/15 and 2.5/15 share one, in which the gaps cancel
    assert metrics.calibration_error([3 / 15, 2.5 / 15], [True, False]) == pytest.approx((1 - 5.5 / 15) / 2)


def test_risk_coverage_by_brute_force(scored):
    probabilities, truths = scored
    found = metrics.probability_metrics(probabilities.tolist(), truths.tolist())
    order = np.argsort(-probabilities.max(1))
    wrong = (probabilities.argmax(1) != truths)[order]
    risks = [wrong[:k].mean() for k in range(1, 401)]
    assert found["aurc"] == pytest.approx(np.mean(risks))
    assert found["risk_coverage"] == [[pytest.approx(t / 10), pytest.approx(risks[40 * t - 1])] for t in range(1, 11)]
    assert found["risk_coverage"][-1][1] == pytest.approx(1 - found["top1"])


def test_equal_confidence_in_any_order():
    right = [True, False, True, True, False, False]
    confidences = [0.5, 0.5, 0.9, 0.5, 0.9, 0.5]
    expected = metrics.selective_risks(confidences, right)
    assert metrics.selective_risks(confidences[::-1], right[::-1]) == pytest.approx(expected)
    assert expected[0] == 0.5 and expected[-1] == pytest.approx(0.5)


def test_a_truth_that_was_not_offered_is_an_error():
    found = metrics.probability_metrics([[0.6, 0.4], [0.9, 0.1]], [None, 0])
    assert (found["top1"], found["top5"]) == (0.5, 0.5)
    assert found["brier"] == pytest.approx(((1 + 0.36 + 0.16) + (0.01 + 0.01)) / 2)


def test_summary_says_how_good_the_probabilities_are():
    plain = [prediction("six", "nine"), prediction("one", "one")]
    assert "probability" not in metrics.summarize(plain, ["one", "six", "nine"], 1.0)
    given = [((0.3, 0.7), (0.6, 0.4)), ((0.2, 0.8), (0.3, 0.7))]
    found = [
        replace(p, choices=("six", "one"), probabilities=normalised, probabilities_raw=raw)
        for p, (normalised, raw) in zip(plain, given, strict=True)
    ]
    summary = metrics.summarize(found, ["one", "six", "nine"], 1.0, 2.0)
    assert (summary["accuracy"], summary["seconds"]) == (0.5, 1.0)
    assert (summary["probability"]["top1"], summary["probability"]["raw"]["top1"]) == (0.5, 1.0)
    assert summary["probability"]["seconds"] == 2.0
