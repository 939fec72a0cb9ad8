"""Temperatures and thresholds from held-out images, against scipy, plain computation and simulated draws."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression

from common.evaluation import calibration
from common.evaluation.calibration import Calibration, threshold, upper_bound
from common.few_shot.learner import probabilities
from common.types import Answers, Prediction, Probabilities


def drawn(seed, n=4000, classes=5, spread=2.0):
    """Logits whose softmax is the truth's own distribution, and truths that are drawn from it."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, spread, (n, classes))
    values = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return logits, (values.cumsum(1) > generator.random((n, 1))).argmax(1)


@pytest.mark.parametrize("factor", [0.05, 0.5, 1, 3, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_distorted_scale_is_found(factor, seed):
    logits, truths = drawn(seed)
    assert calibration.temperature(logits * factor, truths) == pytest.approx(factor, rel=0.08)


def test_it_is_the_minimum_of_the_smoothed_cross_entropy():
    logits, truths = drawn(3, n=50)
    best = calibration.temperature(logits, truths)

    def loss(temperature):
        share, total = 1 / 52, 0.0
        for row, truth in zip(logits / temperature, truths, strict=True):
            logs = row - math.log(sum(math.exp(value) for value in row))
            total -= (1 - share) * logs[truth] + share * logs.mean()
        return total

    assert loss(best) < min(loss(best * 1.01), loss(best / 1.01))


def test_images_without_an_error_do_not_make_it_certain():
    logits = np.eye(3)[np.arange(30) % 3] * 2.0
    temperature = calibration.temperature(logits, np.arange(30) % 3)
    confidence = float(np.exp(2 / temperature) / (np.exp(2 / temperature) + 2))
    # the optimum puts 1 - s + s / 3 on the truth, where s = 1 / 32
    assert confidence == pytest.approx(1 - 2 / 3 / 32, abs=1e-4)


def test_what_was_not_offered_counts_for_nothing():
    logits, truths = drawn(1, n=200)
    wide = np.concatenate([logits, np.full((200, 2), -np.inf)], 1)
    assert calibration.temperature(wide, truths) == pytest.approx(calibration.temperature(logits, truths), rel=1e-3)
    more = np.concatenate([logits, logits[:50] * 100])
    assert calibration.temperature(more, np.concatenate([truths, np.full(50, -1)])) == pytest.approx(
        calibration.temperature(logits, truths), rel=1e-6
    )
    assert calibration.temperature(logits[:0], truths[:0]) == 1.0


def answers(values, truths):
    names = tuple("abcde")[: values.shape[1]]
    made = [
        Prediction(str(n), names[t], int(t), names[int(row.argmax())], bool(row.argmax() == t), False)
        for n, (row, t) in enumerate(zip(values, truths, strict=True))
    ]
    classes = np.broadcast_to(np.arange(values.shape[1], dtype=np.int32), values.shape)
    return Answers(made, 0.0, Probabilities(names, classes, values.astype(np.float32)))


def softmax(logits):
    return np.exp(logits - logits.max(1, keepdims=True)) / np.exp(logits - logits.max(1, keepdims=True)).sum(
        1, keepdims=True
    )


@pytest.mark.parametrize("factor", [0.2, 4])
def test_the_error_falls_on_other_images(factor):
    logits, truths = drawn(5)
    found = calibration.fit(answers(softmax(logits * factor), truths), "val")
    new, labels = drawn(6)
    before, after = calibration.errors(answers(softmax(new * factor), labels), found)
    assert before > 0.08 and after < 0.02
    assert (found.source, found.n) == ("val", len(truths))
    # a temperature is all that is wrong here: the curve adds little
    assert found.slope == pytest.approx(1, abs=0.2) and found.bias == pytest.approx(0, abs=0.2)
    plain = softmax(new * factor / found.temperature)
    table = answers(softmax(new * factor), labels).probabilities
    np.testing.assert_allclose(Calibration(found.temperature)(table), plain, atol=1e-4)


def test_logits_hundreds_apart_are_calibrated_as_the_same_ones_closer_together():
    logits, truths = drawn(7)
    close, far = (
        probabilities((logits * factor).astype(np.float32), tuple("abcde"), tuple("abcde")) for factor in (1, 300)
    )
    assert (far.values == 0).mean() > 0.5
    made = answers(softmax(logits), truths)
    found, expected = (calibration.fit(replace(made, probabilities=table), "val") for table in (far, close))
    assert found.temperature == pytest.approx(300 * expected.temperature, rel=1e-3)
    assert (found.slope, found.bias) == pytest.approx((expected.slope, expected.bias), abs=1e-3)
    np.testing.assert_allclose(found(far), expected(close), atol=1e-4)


def two_classes(odds):
    """Scores of two classes, the first of which has these log-odds."""
    return np.stack([odds, np.zeros_like(odds)], 1)


def test_the_curve_is_platts():
    """Two classes, the first always the more probable: with the temperature's penalty, slope / temperature is a logistic
    regression's slope; scikit-learn as the oracle.
    """
    rng = np.random.default_rng(0)
    odds = np.abs(rng.normal(1, 1.5, 40_000))
    right = rng.random(40_000) < 1 / (1 + np.exp(-(0.6 * odds - 0.4)))
    scale, slope, bias = calibration.by_images(two_classes(odds), np.where(right, 0, 1))
    expected = LogisticRegression(C=np.inf).fit(odds[:, None], right)
    assert (slope / scale, bias) == pytest.approx((expected.coef_[0, 0], expected.intercept_[0]), abs=3e-3)
    assert (slope / scale, bias) == pytest.approx((0.6, -0.4), abs=0.05)


def test_a_table_follows_the_curve():
    """Three classes by hand."""
    table = answers(np.array([[0.2, 0.7, 0.1], [0.3, 0.36, 0.34]]), np.array([1, 0])).probabilities
    found = Calibration(1.0, 2.0, -1.0)(table)
    sure = 1 / (1 + (3 / 7) ** 2 * np.e)
    np.testing.assert_allclose(found[0], [(1 - sure) * 2 / 3, sure, (1 - sure) / 3], rtol=1e-5)
    # sigmoid(2 ln(36 / 64) - 1) = 0.10 is less than one of three can have
    np.testing.assert_allclose(found[1], [1 / 3] * 3)
    # sigmoid(-0.6): the second class, with nine tenths of the others, would have 0.58, and gets no more than the first
    near = answers(np.array([[0.05, 0.5, 0.45]]), np.array([1])).probabilities
    sure = 1 / (1 + np.exp(0.6))
    np.testing.assert_allclose(Calibration(bias=-0.6)(near)[0], [1 - 2 * sure, sure, sure], rtol=1e-5)


def test_few_answers_bend_a_curve_little_and_none_invert_it():
    _, slope, bias = calibration.by_images(two_classes(np.log([9.0, 19.0, 4.0, 7 / 3])), np.zeros(4, int))
    assert 0.8 < slope < 1.3 and abs(bias) < 0.5
    sure = np.linspace(0.51, 0.99, 400)
    _, slope, _ = calibration.by_images(two_classes(np.log(sure / (1 - sure))), np.where(sure < 0.7, 0, 1))
    assert slope > 0, "the order of confidences stays, whatever the images say"


def test_the_fit_is_where_the_slopes_of_loss_and_penalty_cancel():
    """Six answers, four right: Platt's targets are 5/6 and 1/4; the penalty is 2 for each of three squares."""
    sure, right = np.array([0.9, 0.8, 0.7, 0.6, 0.95, 0.55]), np.array([True, True, False, True, True, False])
    scores = two_classes(np.log(sure / (1 - sure)))
    truths = np.where(right, 0, 1)
    scale, slope, bias = calibration.by_images(scores, truths)
    more = math.log(scale / calibration.temperature(scores, truths))
    odds = scores[:, 0] / scale
    excess = 1 / (1 + np.exp(-slope * odds - bias)) - np.where(right, 5 / 6, 1 / 4)
    assert (excess * odds).sum() + 4 * (slope - 1) == pytest.approx(0, abs=1e-3)
    assert excess.sum() + 4 * bias == pytest.approx(0, abs=1e-3)
    assert -(excess * slope * odds).sum() + 4 * more == pytest.approx(0, abs=1e-3)


def test_a_class_that_was_offered_alone_stays_certain():
    classes = np.array([[0, 1], [0, -1]], np.int32)
    table = Probabilities(("a", "b"), classes, np.array([[0.9, 0.1], [1.0, 0.0]], np.float32))
    found = Calibration(1.5, 0.7, -0.2)(table)
    assert found[1].tolist() == [1.0, 0.0] and found[0].sum() == pytest.approx(1) and np.isfinite(found).all()


def test_the_bound_is_clopper_and_pearsons():
    for wrong, n in ((0, 20), (3, 50), (10, 12), (5, 5)):
        bound = upper_bound(wrong, n, 0.95)
        assert bound == 1 if wrong == n else binom.cdf(wrong, n, bound) == pytest.approx(0.05, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("risk", [0.05, 0.1, 0.3])
def test_the_promise_is_kept_in_95_of_100_draws(risk):
    """Confidences are the true probabilities of being right, so the risk above a threshold is known exactly."""
    generator = np.random.default_rng(int(risk * 100))
    everyone = generator.beta(4, 1, 200_000)
    ordered = np.sort(everyone)[::-1]
    true_risk = 1 - np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    broken = answered = 0
    for _ in range(300):
        confidences = generator.beta(4, 1, 400)
        right = generator.random(400) < confidences
        chosen = threshold(confidences.tolist(), right.tolist(), risk)
        above = int((everyone >= chosen).sum())
        answered += above > 0
        broken += above > 0 and true_risk[above - 1] > risk
    assert broken <= 0.05 * 300
    assert answered > 100 or risk == 0.05, "and it does answer"


def test_too_few_images_promise_nothing():
    needed = calibration.images_needed(0.05)
    assert threshold([0.9] * needed, [True] * needed, 0.05) == 0.9
    assert threshold([0.9] * (needed - 1), [True] * (needed - 1), 0.05) == math.inf
    assert threshold([], [], 0.05) == math.inf


def test_equal_confidences_are_accepted_together():
    confidences, right = [0.9] * 120 + [0.8] * 80, [True] * 120 + [False] * 80
    assert threshold(confidences, right, 0.05) == 0.9
    assert threshold(confidences[::-1], right[::-1], 0.05) == 0.9
    assert threshold([0.9] * 200, right, 0.05) == math.inf


def test_the_lowest_risk_is_the_first_that_has_a_threshold():
    sure = [1 - n / 100 for n in range(60)]
    right = [n != 50 for n in range(60)]
    lowest = calibration.lowest_risk(sure, right)
    assert calibration.threshold(sure, right, lowest) < math.inf == calibration.threshold(sure, right, lowest - 0.01)
    assert calibration.lowest_risk([0.9], [False]) is None
