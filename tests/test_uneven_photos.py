"""Own photos in uneven classes: a share of each class to test on, short classes, classes that are left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from common.config.composition import validate
from common.data import sampling, task
from common.data.sampling import Sampling, set_apart
from common.types import Item, UserError
from tests.test_sampling import POOL, pool, source

SIZES = {"bee": 10, "cat": 1, "dog": 2, "fox": 7, "owl": 60}
# round(0.2 n), at least 1, and never the only one
TESTED = {"bee": 2, "dog": 1, "fox": 1, "owl": 12}


def items(sizes=SIZES):
    return [Item(f"{name}{n}", label, name) for label, (name, count) in enumerate(sizes.items()) for n in range(count)]


def counts(found):
    return dict(Counter(item.name for item in found))


def test_a_share_of_every_class_is_set_apart():
    rest, tested = set_apart(items(), 0.2, 1)
    assert counts(tested) == TESTED
    assert counts(rest) == {name: count - TESTED.get(name, 0) for name, count in SIZES.items()}
    assert {*rest, *tested} == {*items()} and not {*rest} & {*tested}
    assert [item for item in items() if item in rest] == rest, "in their order"


def test_the_share_is_drawn_by_the_seed_and_class_by_class():
    (_, first), (_, again), (_, other) = (set_apart(items(), 0.2, seed) for seed in (1, 1, 2))
    assert first == again != other
    _, fewer = set_apart(items({**SIZES, "fox": 3}), 0.2, 1)
    assert [item for item in fewer if item.name != "fox"] == [item for item in first if item.name != "fox"]
    owls = [{item.image for item in set_apart(items(), 0.2, seed)[1] if item.name == "owl"} for seed in range(200)]
    times = Counter(image for each in owls for image in each)
    assert len(times) == 60 and max(times.values()) < 70, "each of the 60 is tested about 40 times of 200"


def test_a_photo_more_or_under_another_class_moves_hardly_any_other():
    before = {item.image for item in set_apart(items(), 0.2, 1)[1]}
    moved = [replace(item, label=4, name="owl") if item.image == "bee3" else item for item in items()]
    for changed in (moved, [*items(), Item("fox99", 3, "fox")]):
        after = {item.image for item in set_apart(changed, 0.2, 1)[1]}
        assert len(before ^ after) <= 3


@pytest.mark.parametrize("sampler", ["coop", "clsrl"])
@pytest.mark.parametrize(("shots", "trained"), [(5, [5, 1, 1, 5, 5]), (None, [8, 1, 1, 6, 48])])
def test_short_classes_are_taken_as_far_as_they_go(sampler, shots, trained):
    made = sampling.draw(
        source(items(), (), (), tuple(SIZES)), Sampling(shots, 1, sampler, test_share=0.2, validation="none")
    )
    assert list(counts(sorted(made.train, key=lambda item: item.label)).values()) == trained
    assert counts(made.test) == TESTED and not {*made.train} & {*made.test}
    assert made.short == ({} if shots is None else {"cat": 1, "dog": 1})


def test_the_tested_images_do_not_depend_on_shots_validation_or_training():
    made = [
        sampling.draw(source(items(), (), (), tuple(SIZES)), Sampling(*how, test_share=0.2))
        for how in (
            (5, 1),
            (None, 1),
            (5, 1, "clsrl"),
            (5, 1, "coop", "held_out"),
            (5, 1, "coop", "few", "test", False),
        )
    ]
    assert len({each.test for each in made}) == 1
    assert counts(made[3].val) == {"bee": 3, "fox": 1, "owl": 4}, "what is left of at most four"


def test_nothing_that_a_model_was_trained_on_is_tested():
    test = sampling.draw(source(items(), (), (), tuple(SIZES)), Sampling(5, 1, test_share=0.2)).test
    left = sampling.draw(
        source(items(), (), (), tuple(SIZES)), Sampling(5, 1, test_share=0.2, held_out=frozenset({test[0].image}))
    ).test
    assert left == test[1:]


def test_without_a_share_nothing_changes():
    assert sampling.draw(pool(POOL), Sampling(1, 1)) == sampling.draw(pool(POOL), Sampling(1, 1, test_share=None))


@pytest.fixture
def folder(tmp_path, write_photos):
    return write_photos(tmp_path / "pets", SIZES)


@pytest.fixture
def write_photos():
    """`write_photos(root, sizes)`: one folder per class with so many small pictures."""
    from PIL import Image

    def write(root, sizes):
        for label, (name, count) in enumerate(sizes.items()):
            (root / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (label * 40, number * 4, 99)).save(root / name / f"{number}.png")
        return root

    return write


def config(compose, folder, *words):
    chosen = ("data=folder", f"data.folder={folder}", "method=nearest_mean", "clip=none", "visual=pixels", *words)
    return validate(compose(*chosen))


def test_a_run_says_which_classes_are_short_untested_and_left_out(compose, folder):
    made = task.build(config(compose, folder, "shots=5", "test_share=0.2", "min_per_class=1"))
    assert made.manifest["short_classes"] == {"cat": 1, "dog": 1}
    assert made.manifest["notes"] == ["1 class has one image, which is trained on and not tested: cat"]
    assert sampling.too_few(made.manifest["short_classes"], 5) == (
        "2 classes have fewer training images than shots=5: cat 1, dog 1"
    )
    made = task.build(config(compose, folder, "shots=5", "test_share=0.2", "min_per_class=3"))
    assert made.task.train.names == ("bee", "fox", "owl") and made.manifest["short_classes"] == {}
    assert {item.name: item.label for item in made.task.train.items} == {"bee": 0, "fox": 1, "owl": 2}
    assert {item.name: item.label for item in made.task.evaluation["test"].items} == {"bee": 0, "fox": 1, "owl": 2}
    assert made.manifest["notes"] == ["data=folder: 2 classes left out by min_per_class=3: cat 1, dog 2"]


def test_a_left_out_class_is_another_dataset(compose, folder):
    prints = {
        task.build(config(compose, folder, f"min_per_class={n}", "test_share=0.2")).task.fingerprint for n in (1, 2, 3)
    }
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("test_share=1",), "test_share=1.0 must be a share between 0 and 1"),
        (("test_share=0",), "test_share=0.0 must be a share between 0 and 1"),
        (("min_per_class=0",), "min_per_class=0 must be above 0"),
        (("min_per_class=11", "test_share=0.2"), "min_per_class=11 leaves 1 class, .* the largest has 60 images"),
        (("shots=20",), "shots=20, but class 'cat' has only 1 image .* test_share=0.2"),
        (("shots=all",), "shots=all, but class 'cat' has only 1 image .* test_share=0.2"),
    ],
)
def test_what_cannot_be_is_refused(compose, folder, words, said):
    with pytest.raises(UserError, match=said):
        task.build(config(compose, folder, *words))


def test_a_test_split_of_its_own_is_not_split_again(compose):
    with pytest.raises(
        UserError, match="test_share=0.2, but data=fashion has a test split of its own; set test_share=null"
    ):
        task.build(validate(compose("data=fashion", "test_share=0.2")))
