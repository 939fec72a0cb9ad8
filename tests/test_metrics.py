"""Intervals and tests against independent implementations."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from common import metrics
from common.types import Prediction


def prediction(label: str, answer: str, correct: bool | None = None) -> Prediction:
    right = label == answer if correct is None else correct
    return Prediction("0", label, answer, answer, right, right, True, 2, False)


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
