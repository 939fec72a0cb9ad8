"""Few-shot picks against CoOp's own, and the digits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from common.data import digits, sampling
from common.types import Item, Source, UserError

# A list in mixed order with classes a (6), b (5), c (2); picks computed with the original Dassl/CoOp code.
TRAIN = [
    Item(name, {"b": 1, "a": 0, "c": 2}[name[0]], name[0])
    for name in ["b0", "a0", "b1", "c0", "a1", "a2", "c1", "b2", "a3", "b3", "a4", "b4", "a5"]
]
VAL = [
    Item(name, {"b": 1, "a": 0, "c": 2}[name[1]], name[1])
    for name in ["va0", "vb0", "va1", "vc0", "vb1", "va2", "vb2", "va3", "vb3", "va4", "vb4", "vc1"]
]
GOLDEN = [
    (1, 1, "b1 a4 c0", "va2 vb0 vc1"),
    (1, 2, "b1 b0 a2 a0 c1 c0", "va3 va4 vb1 vb0 vc1 vc0"),
    (1, 4, "b1 b0 b4 b3 a3 a5 a4 a2 c0 c1", "va3 va1 va0 va4 vb0 vb3 vb1 vb4 vc0 vc1"),
    (1, 16, "b0 b1 b2 b3 b4 a0 a1 a2 a3 a4 a5 c0 c1", "va1 va0 va4 va3 vb3 vb4 vb1 vb2 vc0 vc1"),
    (2, 1, "b0 a0 c0", "va2 vb1 vc1"),
    (2, 4, "b0 b4 b3 b1 a1 a2 a4 a3 c0 c1", "va1 va0 va2 va3 vb3 vb4 vb2 vb1 vc0 vc1"),
    (3, 1, "b1 a4 c0", "va2 vb4 vc1"),
    (3, 4, "b1 b4 b3 b2 a5 a4 a0 a2 c0 c1", "va0 va3 va1 va4 vb1 vb3 vb2 vb4 vc0 vc1"),
]


@pytest.mark.parametrize(("seed", "shots", "train", "val"), GOLDEN)
def test_picks_equal_coop(seed, shots, train, val):
    rng = random.Random(seed)
    assert [item.image for item in sampling.pick(TRAIN, shots, rng)] == train.split()
    assert [item.image for item in sampling.pick(VAL, min(shots, 4), rng)] == val.split()


def test_few_shot_draws_train_then_val():
    source = Source(("a", "b", "c"), tuple(TRAIN), tuple(VAL), (Item("t", 0, "a"),), digits.open_digit, "")
    task = sampling.few_shot(source, 4, 1)
    assert [item.image for item in task.train] == GOLDEN[2][2].split()
    assert [item.image for item in task.evaluation["val"]] == GOLDEN[2][3].split()


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_digits_split_is_complete_and_disjoint(shots, seed):
    task = sampling.few_shot(digits.read(), shots, seed)
    train, test = {i.image for i in task.train}, {i.image for i in task.evaluation["test"]}
    assert len(task.train) == len(train) == 10 * shots
    assert not train & test and len(train | test) == 1797
    assert {name: len(group) for name, group in sampling.by_label(task.train).items()} == dict.fromkeys(
        range(10), shots
    )


def test_digits_equal_scikit_learn():
    import numpy as np
    from sklearn.datasets import load_digits

    reference = load_digits()
    source = digits.read()
    assert [item.label for item in source.train] == reference.target.tolist()
    for index in (0, 5, 1796):
        picture = np.asarray(source.open(str(index)))
        assert picture.shape == (8, 8, 3)
        assert np.array_equal(picture[..., 0], np.round(reference.images[index] * 255 / 16))


def test_too_many_shots_name_the_class():
    with pytest.raises(UserError, match="'eight' has only 174 images.*shots=173"):
        sampling.few_shot(digits.read(), 174, 1)


def test_overlap_of_train_and_test_is_refused():
    items = tuple(Item(str(i), 0, "a") for i in range(4))
    source = Source(("a",), items, (), (replace(items[0]),), digits.open_digit, "")
    with pytest.raises(UserError, match="1 training images are also in test"):
        sampling.few_shot(source, 4, 1)
