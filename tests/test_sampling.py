"""Few-shot picks against CoOp's own, and the digits."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from common.data import digits, sampling
from common.data.sampling import Sampling
from common.types import Item, Source, UserError
from tests import published_picks

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


TEST = (Item("t", 0, "a"),)


def source(train=TRAIN, val=VAL, test=TEST, names=("a", "b", "c")):
    return Source(names, tuple(train), tuple(val), tuple(test), digits.Digits(), "", "CoOp split")


def keys(items):
    return [item.image for item in items]


@pytest.mark.parametrize(("seed", "shots", "train", "val"), GOLDEN)
def test_draw_equals_coop(seed, shots, train, val):
    picks = sampling.draw(source(), Sampling(shots, seed))
    assert (keys(picks.train), keys(picks.val), keys(picks.test)) == (train.split(), val.split(), ["t"])


def digest(positions):
    return hashlib.sha256(json.dumps(positions, separators=(",", ":")).encode()).hexdigest()[:16]


def blocks(sizes):
    """A list in which every class is one block, labels ascending, and keys are the places."""
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    return [Item(str(place), label, str(label)) for place, label in enumerate(labels)]


EUROSAT = [1500, 1500, 1500, 1250, 1250, 1000, 1250, 1500, 1250, 1500]
AIRCRAFT = [34 if label % 3 == 0 else 33 for label in range(100)]
# Places in the train and val lists of the published few-shot files, and the digest of the whole lists.
PUBLISHED = [
    ([500] * 101, [200] * 101, 1, 1, "68 791 1433 1910 2391 2532", "150 327 529 700", "8cc39be9fe790da8 483ee891556f92ac"),
    ([500] * 101, [200] * 101, 1, 4, "68 291 433 410 891 532", "83 144 34 86", "ae8f33802be16136 95d4a8aef5ce03cc"),
    ([500] * 101, [200] * 101, 1, 16, "68 291 433 410 391 32", "110 5 151 94", "4dc1a476a9184941 87e8f98811fbe6e5"),
    ([500] * 101, [200] * 101, 2, 16, "489 441 485 434 28 46", "133 158 118 169", "3e66ea04e75ad6f8 012e7f157f2dff4f"),
    ([500] * 101, [200] * 101, 3, 16, "121 303 278 66 189 468", "92 141 8 125", "06cbc340912d0d2e ca2b2a5b816a4959"),
    ([40] * 397, [10] * 397, 1, 1, "8 76 84 136 167 231", "3 15 21 38", "65e299bb7af94845 07aade599b845fff"),
    ([40] * 397, [10] * 397, 1, 16, "8 36 4 16 7 31", "9 7 4 2", "e66c480a6895f2f3 29514cc7b73d4fcc"),
    ([60] * 47, [24] * 47, 1, 4, "8 36 54 51 108 64", "15 11 13 0", "bdc6e63d3eb0d1a1 f677fd4fe30d9617"),
    ([60] * 47, [24] * 47, 2, 16, "55 54 3 5 56 23", "15 3 4 6", "d41fb72545649447 69a0b69a38f5147e"),
    (EUROSAT, [n * 2 // 5 for n in EUROSAT], 1, 4, "275 1165 129 522 1741 2514", "566 238 353 236", "bd1cd08c25d7d28d db2b7e20a27b669f"),
    (EUROSAT, [n * 2 // 5 for n in EUROSAT], 1, 16, "275 1165 129 522 241 1014", "463 14 287 255", "7a741414b7ae8741 5ca7e3d61d7827d8"),
    (AIRCRAFT, [1] * 100, 1, 1, "8 38 83 107 165 195", None, "095d04a459a84374"),
    (AIRCRAFT, [1] * 100, 1, 16, "8 4 16 3 15 24", None, "868c2f67442b5a66"),
    (AIRCRAFT, [1] * 100, 3, 16, "15 8 23 29 19 33", None, "a338b3d0b3946307"),
]  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize(("sizes", "val_sizes", "seed", "shots", "train", "val", "digests"), PUBLISHED)
def test_picks_equal_the_published_lists(sizes, val_sizes, seed, shots, train, val, digests):
    whole = source(blocks(sizes), blocks(val_sizes), names=tuple(map(str, range(len(sizes)))))
    whole = replace(whole, val=tuple(replace(item, image=f"v{item.image}") for item in whole.val))
    picks = sampling.draw(whole, Sampling(shots, seed))
    places = [int(key) for key in keys(picks.train)]
    val_places = [int(key[1:]) for key in keys(picks.val)]
    assert places[:6] == [int(place) for place in train.split()]
    assert digest(places) == digests.split()[0]
    if val:
        assert val_places[:4] == [int(place) for place in val.split()]
        assert digest(val_places) == digests.split()[1]


def sizes_of(runs):
    """`80x7 77`: seven classes of 80, one of 77."""
    pairs = [run.partition("x") for run in runs.split()]
    return [int(size) for size, _, times in pairs for _ in range(int(times or 1))]


@pytest.mark.slow
@pytest.mark.parametrize("name", published_picks.PUBLISHED)
def test_all_published_lists_of_ten_datasets(name):
    train, val, expected = published_picks.PUBLISHED[name]
    whole = source(blocks(sizes_of(train)), blocks(sizes_of(val)))
    lists = []
    for seed in (1, 2, 3):
        for shots in (1, 2, 4, 8, 16):
            picks = sampling.draw(whole, Sampling(shots, seed))
            lists.append([[int(key) for key in keys(part)] for part in (picks.train, picks.val)])
    assert digest(lists) == expected


def test_classes_with_too_few_images_are_taken_whole_and_named():
    picks = sampling.draw(source(), Sampling(4, 1))
    assert picks.short == {"c": 2}, "c has two images"
    assert sampling.draw(source(), Sampling(2, 1)).short == {}


def test_all_shots_keep_the_lists():
    picks = sampling.draw(source(), Sampling(None, 1))
    assert (picks.train, picks.val, picks.short) == (tuple(TRAIN), tuple(VAL), {})


@pytest.mark.parametrize(("validation", "number"), [("few", 3), ("full", 12), ("none", 0)])
def test_validation(validation, number):
    assert len(sampling.draw(source(), Sampling(1, 1, validation=validation)).val) == number


def test_official_test_rows_hold_val():
    picks = sampling.draw(source(), Sampling(1, 1, test_rows="val_and_test"))
    assert keys(picks.test) == [*keys(VAL), "t"] and picks.val == ()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_global_shuffle_takes_each_class_until_it_is_full(seed):
    # the plain statement of the authors' notebook: shuffle, walk, count
    shuffled = list(TRAIN)
    random.Random(seed).shuffle(shuffled)
    counter, expected = {"a": 0, "b": 0, "c": 0}, []
    for item in shuffled:
        if counter[item.name] < 4:
            counter[item.name] += 1
            expected.append(item.image)
    picks = sampling.draw(source(), Sampling(4, seed, sampler="clsrl"))
    assert keys(picks.train) == expected and picks.short == {"c": 2}


def test_global_shuffle_counts_by_name():
    items = [Item(f"{label}-{i}", label, "missile") for label in (0, 1) for i in range(10)]
    found = sampling.pick_globally(items, 4, random.Random(1))
    assert len(found) == 8, "two classes of one name share twice the shots"


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("sampler", ["coop", "clsrl"])
def test_digits_split_is_complete_and_disjoint(shots, seed, sampler):
    picks = sampling.draw(digits.read(None), Sampling(shots, seed, sampler))
    train, test = set(keys(picks.train)), set(keys(picks.test))
    assert len(picks.train) == len(train) == 10 * shots
    assert not train & test and len(train | test) == 1797
    assert Counter(item.label for item in picks.train) == dict.fromkeys(range(10), shots)


def test_digits_equal_scikit_learn():
    import numpy as np
    from sklearn.datasets import load_digits

    reference = load_digits()
    found = digits.read(None)
    assert [item.label for item in found.train] == reference.target.tolist()
    for index in (0, 5, 1796):
        picture = np.asarray(found.images.open(str(index)))
        assert picture.shape == (8, 8, 3)
        assert np.array_equal(picture[..., 0], np.round(reference.images[index] * 255 / 16))


@pytest.mark.parametrize("shots", [174, None])
def test_too_many_shots_name_the_class(shots):
    with pytest.raises(UserError, match=f"shots={shots or 'all'}.*'eight' has only 174 images.*shots=173"):
        sampling.draw(digits.read(None), Sampling(shots, 1))


@pytest.mark.parametrize(("classes", "base"), [(1000, 500), (397, 199), (101, 51), (47, 24), (37, 19), (5, 3), (1, 1)])
def test_base_is_the_larger_half(classes, base):
    first, rest = sampling.halves([""] * classes)
    assert first == list(range(base)) and rest == list(range(base, classes))


POOL = tuple(Item(f"{name}{i}", label, name) for label, name in enumerate("ab") for i in range(6))


def pool(items=POOL):
    return Source(("a", "b"), tuple(items), (), (), digits.Digits(), "", "own images")


@pytest.mark.parametrize("sampler", ["coop", "clsrl"])
def test_without_training_all_of_a_pool_are_tested(sampler):
    picks = sampling.draw(pool(), Sampling(16, 1, sampler, trains=False))
    assert (picks.train, picks.val, picks.test, picks.short) == ((), (), POOL, {})


@pytest.mark.parametrize("sampler", ["coop", "clsrl"])
def test_without_training_the_other_parts_stay(sampler):
    trained, alone = (sampling.draw(source(), Sampling(2, 1, sampler, trains=trains)) for trains in (True, False))
    assert trained.train and (alone.train, alone.val, alone.test) == ((), trained.val, trained.test)


def test_what_a_model_was_trained_on_is_not_tested():
    trained = sampling.draw(pool(), Sampling(2, 1))
    again = sampling.draw(pool(), Sampling(2, 1, trains=False, held_out=frozenset(keys(trained.train))))
    assert (again.train, again.test) == ((), trained.test)


@pytest.mark.parametrize("sampler", ["coop", "clsrl"])
def test_unusable_images_are_left_out_after_the_draw(sampler):
    whole = sampling.draw(source(), Sampling(2, 1, sampler))
    gone = frozenset((whole.train[0].image, whole.val[0].image))
    picks = sampling.draw(source(), Sampling(2, 1, sampler, unusable=gone))
    assert (picks.train, picks.val, picks.test) == (whole.train[1:], whole.val[1:], whole.test)
    assert picks.short == {whole.train[0].name: 1} and picks.refilled == {}, "the field's picks are not replaced"


def test_a_class_without_a_usable_pick_is_short():
    (gone,) = [item for item in sampling.draw(source(), Sampling(1, 1)).train if item.name == "c"]
    assert sampling.draw(source(), Sampling(1, 1, unusable=frozenset((gone.image,)))).short == {"c": 0}


def test_unusable_images_of_a_pool_are_not_tested_either():
    whole = sampling.draw(pool(), Sampling(2, 1))
    gone = frozenset((whole.train[0].image, whole.test[0].image))
    picks = sampling.draw(pool(), Sampling(2, 1, unusable=gone))
    assert (picks.train, picks.test) == (whole.train[1:], whole.test[1:])


@pytest.mark.parametrize("shots", [1, 2, 3])
@pytest.mark.parametrize("sampler", ["coop", "clsrl"])
@pytest.mark.parametrize("test", [TEST, ()], ids=["own test part", "pool"])
def test_own_photos_are_replaced_in_their_class(sampler, shots, test):
    data = replace(pool(), test=test)
    whole = sampling.draw(data, Sampling(shots, 1, sampler))
    bad = whole.train[-1]
    picks = sampling.draw(data, Sampling(shots, 1, sampler, unusable=frozenset((bad.image,)), refill=True))
    fresh = picks.train[-1]
    assert picks.train[:-1] == whole.train[:-1] and fresh.label == bad.label and fresh not in whole.train
    assert (picks.short, picks.refilled) == ({}, {bad.name: 1})
    assert picks.test == (test or tuple(item for item in whole.test if item != fresh))
    # one more that cannot be used changes nothing else; if it is the new one, the next takes its place
    more = {bad.image, fresh.image}
    third = sampling.draw(data, Sampling(shots, 1, sampler, unusable=frozenset(more), refill=True))
    assert third.train[:-1] == whole.train[:-1] and third.train[-1] not in (*whole.train, fresh)
    unpicked = next(item for item in POOL if item not in (*whole.train, fresh) and item.label == bad.label)
    others = sampling.draw(
        data, Sampling(shots, 1, sampler, unusable=frozenset((bad.image, unpicked.image)), refill=True)
    )
    assert others.train == picks.train


def test_no_class_of_a_pool_loses_its_last_test_image():
    whole = sampling.draw(pool(), Sampling(4, 1))
    bad = frozenset(item.image for item in whole.train if item.name == "a")
    picks = sampling.draw(pool(), Sampling(4, 1, unusable=bad, refill=True))
    assert Counter(item.name for item in picks.train) == {"a": 1, "b": 4}, "of two others one stays"
    assert Counter(item.name for item in picks.test) == {"a": 1, "b": 2}
    assert (picks.short, picks.refilled) == ({"a": 1}, {"a": 1})


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_part_that_cannot_be_used_at_all_is_refused(part):
    data = replace(source(), test=tuple(replace(item, image=f"t{item.image}") for item in TRAIN))
    whole = sampling.draw(data, Sampling(1, 1))
    gone = frozenset(item.image for item in getattr(whole, part))
    with pytest.raises(UserError, match=rf"leave out all of a part \({len(gone)} images\), first: .*; repair"):
        sampling.draw(data, Sampling(1, 1, unusable=gone))


def test_a_class_of_one_image_gets_advice_that_can_be_followed():
    with pytest.raises(
        UserError, match="'a' has only 1 image .*; add images of this class, set a share .*method=zeroshot"
    ) as error:
        sampling.draw(pool(POOL[5:]), Sampling(1, 1))
    assert "shots=0" not in str(error.value)
