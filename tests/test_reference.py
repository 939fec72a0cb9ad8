"""Reference sampling of ALERT against the equations of section 3.3, by enumeration and by hand."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare

from alert.references import class_means, sample_references, similarities, weights
from common.few_shot.candidates import name_groups
from common.types import UserError

DRAWS = 100_000
TAU = 0.1
ROW = (1.0, 0.93, 0.85, 0.9, 0.7, 0.82)  # class 0 is the truth
NAMES = ("zero", "one", "two", "three", "four", "five")
TWINS = ("zero", "one", "Three", "three", "zero ", "five")  # 2 and 3 share a name, 4 has that of the truth


def draws(number, names=NAMES, row=ROW, truth=0, tau=TAU, seed=1, **sizes):
    rng = random.Random(seed)
    return [sample_references(truth, row, names, rng, tau=tau, **sizes) for _ in range(number)]


def exact(names, size, row=ROW, truth=0, tau=TAU):
    """Probability of every set of others: the equation's w over all classes, drawn one by one from what is left."""
    w = np.exp(np.array(row) / tau) / np.exp(np.array(row) / tau).sum()
    label = [name.strip().lower() for name in names]
    found = Counter()
    for others in permutations([c for c in range(len(row)) if label[c] != label[truth]], size - 1):
        if len({label[c] for c in others}) < len(others):
            continue
        gone, probability = {label[truth]}, 1.0
        for c in others:
            probability *= w[c] / sum(w[j] for j in range(len(row)) if label[j] not in gone)
            gone.add(label[c])
        found[frozenset(others)] += probability
    assert sum(found.values()) == pytest.approx(1)
    return found


def p_value(counts, probabilities):
    """Chi-square against probabilities; anything that cannot happen must not have happened."""
    assert set(counts) <= set(probabilities)
    total = sum(counts.values())
    return chisquare([counts[key] for key in probabilities], [p * total for p in probabilities.values()]).pvalue


def uniform(counts, keys):
    keys = list(keys)
    return p_value(counts, dict.fromkeys(keys, 1 / len(keys)))


# --- the two equations


def test_class_means_are_the_equation_by_hand():
    # class 0: mean (4, 0); class 1: mean (1.5, 3) of length 1.5 sqrt(5); normalising images first would give 0.3162
    means = class_means([[3, 0], [0, 2], [5, 0], [3, 4]], [0, 1, 0, 1], classes=2)
    np.testing.assert_allclose(means, [[1, 0], [1 / 5**0.5, 2 / 5**0.5]], rtol=1e-15)
    np.testing.assert_allclose(similarities(means), [[1, 1 / 5**0.5], [1 / 5**0.5, 1]], rtol=1e-15)


def test_similarities_equal_the_equation_written_out():
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 2, 3] * 5)
    features = rng.normal(size=(20, 7)).astype(np.float32)
    found = similarities(class_means(features, labels, classes=4))
    for a in range(4):
        for b in range(4):
            one = sum(features[i].astype(float) for i in np.flatnonzero(labels == a)) / 5
            other = sum(features[i].astype(float) for i in np.flatnonzero(labels == b)) / 5
            assert found[a, b] == pytest.approx(one @ other / (np.sqrt(one @ one) * np.sqrt(other @ other)))


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        ([[1.0, 0.0]], [0], "class 1 has no image"),
        ([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0, 1, 1], "class 1 has length 0.0"),
        ([[1.0, 0.0], [np.nan, 1.0]], [0, 1], "class 1 has length nan"),
        ([[1.0, 0.0], [0.0, 1.0]], [0, 2], "label 2 is not one of 2"),
        ([[1.0, 0.0], [0.0, 1.0]], [0, -1], "label -1 is not one of 2"),
        ([[1.0, 0.0], [0.0, 1.0]], [0], r"expected \[N, D\] and \[N\]"),
    ],
    ids=["no image", "zero mean", "not finite", "label above", "label below", "shapes"],
)
def test_class_means_refuse(features, labels, message):
    with pytest.raises(ValueError, match=message):
        class_means(features, labels, classes=2)


def test_weights_by_hand():
    # e^0, e^-1 and e^-2, divided by 1 + 0.36787944 + 0.13533528
    assert weights([1.0, 0.9, 0.8], 0.1) == pytest.approx([0.66524096, 0.24472847, 0.09003057], abs=1e-8)


@pytest.mark.parametrize("tau", [1e-6, 1e-300], ids=str)
def test_weights_of_a_tiny_tau_do_not_overflow(tau):
    assert weights([0.5, 1.0, 0.999], tau) == [0.0, 1.0, 0.0]


def test_weights_of_equal_similarities_are_equal_at_any_tau():
    assert weights([0.3] * 4, 1e-6) == weights([0.3] * 4, 10.0) == [0.25] * 4


def test_name_groups():
    assert name_groups(("Missile", "crane", "missile", " missile_")) == (0, 1, 0, 0)


# --- frequencies


@pytest.fixture(
    scope="module",
    params=[NAMES, pytest.param(TWINS, marks=pytest.mark.slow)],
    ids=["different names", "shared names"],
)
def named(request):
    """Names, and a large sample with three references beside the truth (two, where names are shared)."""
    several = 4 if request.param == NAMES else 3
    return request.param, draws(DRAWS, request.param, seed=2, smallest=several, largest=several), several


@pytest.fixture(scope="module")
def pairs(named):
    """A large sample with one reference beside the truth."""
    return draws(DRAWS, named[0], smallest=2, largest=2)


def others(sample):
    return Counter(frozenset(drawn) - {0} for drawn in sample)


@pytest.mark.slow
def test_first_draw_follows_the_weights(named, pairs):
    names, _, _ = named
    assert p_value(others(pairs), exact(names, 2)) > 0.01


@pytest.mark.slow
def test_a_slightly_different_temperature_would_be_noticed(named, pairs):
    names, sets, several = named
    assert p_value(others(pairs), exact(names, 2, tau=1.1 * TAU)) < 1e-6
    assert p_value(others(sets), exact(names, several, tau=1.1 * TAU)) < 1e-6


@pytest.mark.slow
def test_sets_follow_draws_without_replacement(named):
    names, sets, several = named
    assert p_value(others(sets), exact(names, several)) > 0.01


@pytest.mark.slow
def test_inclusion_frequencies(named):
    names, sets, several = named
    probabilities = exact(names, several)
    for label in range(1, len(names)):
        expected = sum(p for chosen, p in probabilities.items() if label in chosen)
        found = sum(label in drawn for drawn in sets)
        assert binomtest(found, len(sets), min(expected, 1.0)).pvalue > 0.01 / 5, label


def test_truth_is_there_once_and_nothing_twice(named):
    names, sets, _ = named
    label = [name.strip().lower() for name in names]
    for drawn in set(sets):
        assert drawn.count(0) == 1
        assert len({label[c] for c in drawn}) == len(drawn)


def test_position_of_every_order_is_uniform(named):
    _, sets, several = named
    assert uniform(Counter(drawn.index(0) for drawn in sets), range(several)) > 0.01
    one_set = max(others(sets), key=others(sets).get)
    orders = Counter(drawn for drawn in sets if frozenset(drawn) - {0} == one_set)
    assert uniform(orders, permutations([0, *one_set])) > 0.01


@pytest.mark.parametrize(
    ("classes", "sizes", "expected"),
    [
        (12, {}, range(2, 9)),
        (5, {}, range(2, 6)),
        (12, {"smallest": 4, "largest": 6}, range(4, 7)),
        (2, {}, range(2, 3)),
    ],
    ids=["2 to 8", "capped by the names", "4 to 6", "two classes"],
)
def test_number_of_references_is_uniform(classes, sizes, expected):
    names = tuple(f"class {label}" for label in range(classes))
    row = np.linspace(1, 0, classes)
    counts = Counter(len(drawn) for drawn in draws(10_000, names, row, **sizes))
    assert set(counts) == set(expected)
    assert len(expected) == 1 or uniform(counts, expected) > 0.01


def test_shared_names_lower_the_cap():
    # truth, one, three, five: four names among six classes
    assert {len(drawn) for drawn in draws(500, TWINS)} == {2, 3, 4}


def test_the_truth_keeps_its_index_when_its_name_comes_earlier():
    for drawn in draws(200, TWINS, truth=4):
        assert 4 in drawn and 0 not in drawn


@pytest.mark.parametrize("tau", [1e-6, 1e-300], ids=str)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_tau_near_zero_takes_the_nearest(tau, size):
    nearest = [1, 3, 2, 5, 4][: size - 1]  # ROW from the highest similarity down
    assert {frozenset(d) for d in draws(200, tau=tau, smallest=size, largest=size)} == {frozenset([0, *nearest])}


def test_equal_similarities_are_uniform():
    sample = draws(20_000, row=[0.4] * 6, smallest=3, largest=3)
    assert uniform(others(sample), map(frozenset, combinations(range(1, 6), 2))) > 0.01


# --- determinism


def test_draws_are_the_same_everywhere():
    # recorded; the same on Python 3.11, 3.12 and 3.13
    rng = random.Random("references-1-digits/17")
    found = [sample_references(0, ROW, NAMES, rng, tau=TAU) for _ in range(4)]
    assert found == [(1, 0, 2), (0, 1, 5), (1, 4, 5, 0, 2, 3), (2, 3, 0, 5, 1)]


def test_the_generator_alone_decides():
    first, again = draws(50, seed=3), draws(50, seed=3)
    random.seed(0)
    assert first == again == draws(50, row=np.array(ROW), names=list(NAMES), seed=3)
    assert first != draws(50, seed=4)


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 0.0}, "method.tau=0.0 must be a finite number above 0"),
        ({"tau": float("nan")}, "method.tau=nan must be a finite number above 0"),
        ({"tau": float("inf")}, "method.tau=inf must be a finite number above 0"),
        ({"smallest": 0}, "method.smallest=0 must be 1 or more"),
        ({"smallest": 5, "largest": 4}, "method.largest=4 is below method.smallest=5"),
        ({"smallest": 7}, "method.smallest=7, but there are 6 different class names"),
        ({"smallest": 5, "names": TWINS}, "method.smallest=5, but there are 4 different class names"),
    ],
    ids=["tau 0", "tau nan", "tau inf", "none", "crossed", "too many", "too many names"],
)
def test_values_that_cannot_be_met(arguments, message):
    with pytest.raises(UserError, match=message):
        draws(1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row": ROW[:5]}, r"similarities of shape \(5,\) for 6 names"),
        ({"row": (*ROW[:5], float("nan"))}, "one finite number each"),
        ({"truth": 6}, "class 6 is not one of 6"),
        ({"truth": -1}, "class -1 is not one of 6"),
    ],
    ids=["too short", "nan", "truth above", "truth below"],
)
def test_inputs_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        draws(1, **arguments)
