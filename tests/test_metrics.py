"""Intervals and tests against independent implementations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, confusion_matrix, top_k_accuracy_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from common.evaluation import metrics
from common.evaluation.evaluate import Evaluation
from common.evaluation.metrics import Summary
from common.report.statistics import newcombe_interval
from common.types import Answers, Prediction, Probabilities, Reply

NAMES = ["one", "six", "nine"]


def prediction(label: str, answer: str, correct: bool | None = None) -> Prediction:
    right = label == answer if correct is None else correct
    place = NAMES.index(label) if label in NAMES else 0
    return Prediction("0", label, place, answer, right, right, Reply(answer, 2, False, True, right))


def summarize(predictions, probabilities=None, scoring=0.0):
    answers = Answers(predictions, 1.5, probabilities, scoring)
    return metrics.summarize(answers, NAMES)


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (1, 7), (50, 100), (1442, 1637), (10, 10)])
def test_wilson_equals_scipy(successes, total):
    expected = binomtest(successes, total).proportion_ci(method="wilson")
    assert metrics.wilson_interval(successes, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("total", [1, 7, 1757, 50_000])
def test_no_interval_leaves_out_its_own_share(total):
    for right in (0, 1, total - 1, total):
        low, high = metrics.wilson_interval(right, total)
        assert low <= right / total <= high, "not even by a last digit: pictures draw the distance"


def test_newcombes_interval_equals_statsmodels():
    generator = np.random.default_rng(0)
    for _ in range(50):
        n, m = (int(count) for count in generator.integers(2, 3000, 2))
        right, other = int(generator.integers(n + 1)), int(generator.integers(m + 1))
        expected = confint_proportions_2indep(right, n, other, m, method="newcomb", compare="diff")
        assert newcombe_interval((right, n), (other, m)) == pytest.approx(expected, abs=1e-9)


def test_wilson_and_mcnemar_equal_statsmodels():
    generator = np.random.default_rng(1)
    for _ in range(50):
        n = int(generator.integers(1, 3000))
        right = int(generator.integers(n + 1))
        expected = proportion_confint(right, n, method="wilson")
        assert metrics.wilson_interval(right, n) == pytest.approx(expected, abs=1e-9)
        fixed, broken = (int(count) for count in generator.integers(0, 60, 2))
        p = mcnemar([[5, fixed], [broken, 5]], exact=True).pvalue
        assert metrics.exact_p(fixed, broken) == pytest.approx(min(1.0, p), abs=1e-12)


def changed(fixed, broken, same=0):
    """What two classifiers said of `fixed + broken + same` images; an even number of `same` is half right."""
    before = [False] * fixed + [True] * broken + [True, False] * (same // 2)
    after = [True] * fixed + [False] * broken + [True, False] * (same // 2)
    return metrics.paired_test(before, after)


@pytest.mark.parametrize(
    ("fixed", "broken", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 / 2
        (3, 0, 0.25),  # 2 / 8
        (0, 5, 0.0625),  # 2 / 32
        (1, 3, 0.625),  # 2 (1 + 4) / 16
        (10, 1, 24 / 2048),  # 2 (1 + 11) / 2048
        (3, 3, 1.0),  # 2 (1 + 6 + 15 + 20) / 64 is above 1
        (499, 499, 1.0),
        (500, 500, 1.0),
        (7000, 7000, 1.0),
        (1000, 0, 2.0**-999),
        (0, 1000, 2.0**-999),
    ],
)
def test_mcnemar_by_hand(fixed, broken, p_value):
    found = changed(fixed, broken, same=40)
    assert (found["fixed"], found["broken"]) == (fixed, broken)
    assert found["difference"] == pytest.approx((fixed - broken) / (fixed + broken + 40))
    assert found["p_value"] <= 1 and found["p_value"] == pytest.approx(p_value, rel=1e-9, abs=0)


@pytest.mark.parametrize(("fixed", "broken"), [(446, 22), (30, 45), (600, 700), (1100, 1000)])
def test_mcnemar_adds_up_the_binomial_tail(fixed, broken):
    whole = fixed + broken
    tail = Fraction(sum(math.comb(whole, k) for k in range(min(fixed, broken) + 1)), 2**whole)
    assert changed(fixed, broken)["p_value"] == pytest.approx(float(2 * tail), rel=1e-9, abs=0)


@pytest.mark.parametrize(
    ("fixed", "broken", "same", "low", "high"),
    [
        # n + 2 = 22, shares 11/22 and 2/22: 9/22 -+ 1.96 sqrt((13/22 - 81/484) / 22) = 0.4091 -+ 0.2720; Wald: 0.19, 0.71
        (10, 1, 9, 0.1371, 0.6810),
        # n + 2 = 10, shares 1/10 and 1/10: 0 -+ 1.96 sqrt((0.2 - 0) / 10) = 0.2772; Wald: 0, 0
        (0, 0, 8, -0.2772, 0.2772),
        # n + 2 = 7, shares 1/7 and 6/7: -5/7 -+ 1.96 sqrt((1 - 25/49) / 7) = 0.5185, cut at -1; Wald: -1, -1
        (0, 5, 0, -1.0, -0.1958),
    ],
)
def test_interval_of_the_difference_by_hand(fixed, broken, same, low, high):
    before = [False] * fixed + [True] * broken + [True] * same
    after = [True] * fixed + [False] * broken + [True] * same
    assert metrics.paired_test(before, after)["ci95"] == pytest.approx([low, high], abs=5e-5)


def test_paired_test_refuses_other_images():
    with pytest.raises(ValueError):
        metrics.paired_test([True], [True, False])


def test_summarize():
    found = [prediction("six", "six"), prediction("six", "nine"), prediction("one", "one"), prediction("one", "one")]
    summary = summarize(found)
    assert (summary.n, summary.accuracy, summary.seconds, summary.accuracy_official) == (4, 0.75, 1.5, 0.75)
    assert list(summary.per_class.items()) == [("one", 1.0), ("six", 0.5)]
    assert (summary.well_formed, summary.mean_tokens, summary.truncated) == (1.0, 2.0, 0.0)


def test_classes_of_unequal_sizes_have_a_mean_of_their_own():
    """Ten of a class that is always named are 10 of 13 right, and one class and a third of two."""
    pairs = [("one", "one")] * 10 + [("six", "one"), ("nine", "one"), ("nine", "nine")]
    summary = summarize([prediction(*pair) for pair in pairs])
    assert summary.accuracy_macro == pytest.approx(balanced_accuracy_score(*zip(*pairs, strict=True)))
    assert summary.accuracy_macro == pytest.approx((1 + 0 + 0.5) / 3) and summary.accuracy == pytest.approx(11 / 13)
    assert summary.images_per_class == {"one": 10, "six": 1, "nine": 2}
    scalars = Evaluation({}, {"test": summary}).scalars
    assert scalars["eval/test/accuracy_macro"] == summary.accuracy_macro and scalars["eval/test/n"] == 13
    even = summarize([prediction("one", "one"), prediction("six", "one")])
    assert even.accuracy_macro is None and "accuracy_macro" not in even.to_json()
    assert "eval/test/accuracy_macro" not in Evaluation({}, {"test": even}).scalars


def test_two_classes_of_one_name_are_two():
    """As many images of each class, though twice as many of the name."""
    first = [replace(prediction("one", "one"), label_index=label) for label in (0, 1)]
    summary = summarize([*first, replace(prediction("six", "six"), label_index=2)])
    assert summary.accuracy_macro is None and summary.images_per_class == {"one": 2, "six": 1}


def test_a_classifier_has_no_replies_to_sum_up():
    found = [replace(prediction("six", "six"), reply=None), replace(prediction("one", "six"), reply=None)]
    summary = summarize(found)
    assert summary.accuracy == 0.5 and summary.well_formed is None and "mean_tokens" not in summary.to_json()


def test_without_an_official_match_there_is_no_official_accuracy():
    found = [replace(p, reply=replace(p.reply, correct_official=None)) for p in (prediction("six", "six"),)]
    assert summarize(found).accuracy_official is None and "ci95_official" not in summarize(found).to_json()


def test_a_summary_is_read_back_as_it_was():
    table = Probabilities(("six", "one"), np.array([[0, 1]]), np.array([[0.3, 0.7]], "f"), np.array([[0.6, 0.4]], "f"))
    summary = replace(summarize([prediction("six", "six")], table, 2.0), facts={"draft": {"k": 2}})
    assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary
    assert summary.to_json()["draft"] == {"k": 2}


def test_confusion_equals_scikit_learn():
    names = ["one", "six", "nine"]
    pairs = [("six", "six"), ("six", "nine"), ("one", "**Six**."), ("nine", "nine"), ("one", "no idea")]
    table = metrics.confusion([prediction(*pair) for pair in pairs], names)
    expected = confusion_matrix([p[0] for p in pairs[:4]], [p[1].lower().strip("*.") for p in pairs[:4]], labels=names)
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
    found = metrics.probability_metrics(probabilities, truths)
    one_vs_rest = [brier_score_loss(truths == k, probabilities[:, k]) for k in range(7)]
    assert found.brier == pytest.approx(sum(one_vs_rest), abs=1e-12)
    assert found.brier == pytest.approx(((probabilities - np.eye(7)[truths]) ** 2).sum(1).mean(), abs=1e-12)
    assert found.top1 == pytest.approx(top_k_accuracy_score(truths, probabilities, k=1))
    assert found.top5 == pytest.approx(top_k_accuracy_score(truths, probabilities, k=5))


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
    found = metrics.probability_metrics(probabilities, truths)
    order = np.argsort(-probabilities.max(1))
    wrong = (probabilities.argmax(1) != truths)[order]
    risks = [wrong[:k].mean() for k in range(1, 401)]
    assert found.aurc == pytest.approx(np.mean(risks))
    assert found.risk_coverage == [[pytest.approx(t / 10), pytest.approx(risks[40 * t - 1])] for t in range(1, 11)]
    assert found.risk_coverage[-1][1] == pytest.approx(1 - found.top1)


def test_equal_confidence_in_any_order():
    right = [True, False, True, True, False, False]
    confidences = [0.5, 0.5, 0.9, 0.5, 0.9, 0.5]
    expected = metrics.selective_risks(confidences, right)
    assert metrics.selective_risks(confidences[::-1], right[::-1]) == pytest.approx(expected)
    assert expected[0] == 0.5 and expected[-1] == pytest.approx(0.5)


def test_a_truth_that_was_not_offered_is_an_error():
    found = metrics.probability_metrics(np.array([[0.6, 0.4], [0.9, 0.1]]), np.array([-1, 0]))
    assert (found.top1, found.top5) == (0.5, 0.5)
    assert found.brier == pytest.approx(((1 + 0.36 + 0.16) + (0.01 + 0.01)) / 2)


def test_summary_says_how_good_the_probabilities_are():
    found = [prediction("six", "nine"), prediction("one", "one")]
    assert summarize(found).probability is None
    table = Probabilities(
        ("six", "one"),
        np.array([[0, 1], [0, 1]]),
        np.array([[0.3, 0.7], [0.2, 0.8]], np.float32),
        np.array([[0.6, 0.4], [0.3, 0.7]], np.float32),
    )
    summary = summarize(found, table, scoring=2.0)
    assert (summary.accuracy, summary.seconds) == (0.5, 1.5)
    assert (summary.probability.top1, summary.probability.raw.top1) == (0.5, 1.0)
    assert summary.probability.seconds == 2.0


def test_lists_of_different_length_and_order_find_their_truth():
    # the second image was offered "nine" and "six" alone, the third never its own class
    table = Probabilities(
        ("one", "six", "nine"),
        np.array([[0, 1, 2], [2, 1, -1], [0, 1, -1]]),
        np.array([[0.2, 0.5, 0.3], [0.4, 0.6, 0.0], [0.5, 0.5, 0.0]], np.float32),
    )
    assert metrics.truth_places(table, ["nine", "six", "nine"]).tolist() == [2, 1, -1]
    found = [prediction("nine", "six"), prediction("six", "six"), prediction("nine", "one")]
    assert summarize(found, table).probability.top1 == pytest.approx(1 / 3)
