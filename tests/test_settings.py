"""Which images are trained and tested, among which names, in every setting; and contradictions of a dataset."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from clsrl.prompting import ClassListPrompt
from common.config.composition import validate
from common.config.schema import DataConfig
from common.data import digits, source, task
from common.data.sampling import Sampling
from common.data.source import Dataset
from common.evaluation import metrics
from common.types import Item, Source, Task, UserError
from tests.test_sampling import GOLDEN, TRAIN, VAL, keys

NAMES = ("a", "b", "c")
TEST = tuple(Item(f"t{name}{i}", label, name) for label, name in enumerate(NAMES) for i in range(2))


def dataset(name="letters", prefix="", names=NAMES, train=TRAIN, val=VAL, test=TEST, aliases=None):
    moved = [tuple(replace(item, image=prefix + item.image) for item in part) for part in (train, val, test)]
    found = Source(names, *moved, digits.Digits(), "", "CoOp split")
    return Dataset(DataConfig(name=name, question=f"Which {name}?", open_question="What?"), found, aliases or {})


def test_few_shot():
    found = task.few_shot(dataset(), {}, Sampling(4, 1))
    assert keys(found.train.items) == GOLDEN[2][2].split()
    assert keys(found.evaluation["val"].items) == GOLDEN[2][3].split()
    assert found.evaluation["test"].items == TEST and found.evaluation["test"].names == NAMES
    assert found.short == {"c": 2}


def test_base_to_new_leaves_out_after_the_draw():
    found = task.base_to_new(dataset(), {}, Sampling(4, 1))
    drawn = GOLDEN[2][2].split()
    assert keys(found.train.items) == [key for key in drawn if key[0] in "ab"], "as few_shot, without c"
    assert [item.label for item in found.train.items] == [1] * 4 + [0] * 4
    assert found.train.names == found.evaluation["val"].names == found.evaluation["base"].names == ("a", "b")
    assert keys(found.evaluation["base"].items) == ["ta0", "ta1", "tb0", "tb1"]
    assert keys(found.evaluation["val"].items) == [key for key in GOLDEN[2][3].split() if key[1] in "ab"]
    assert found.evaluation["new"].names == ("c",)
    assert found.evaluation["new"].items == (Item("tc0", 0, "c"), Item("tc1", 0, "c")), "labels start anew"
    assert found.short == {}, "c is not trained"


def test_base_to_new_with_all_images():
    found = task.base_to_new(dataset(), {}, Sampling(None, 1))
    assert len(found.train.items) == 11, "13 images, two of them of c"


def test_cross_dataset_asks_each_about_its_own_names():
    other = dataset("others", "o/", names=("c", "b", "x"), train=(), val=(), test=(Item("1", 2, "x"),))
    found = task.cross_dataset(dataset(), {"others": other, "letters": dataset()}, Sampling(1, 1))
    assert list(found.evaluation) == ["val", "test", "others"], "never on itself twice"
    assert found.evaluation["others"].names == ("c", "b", "x") and keys(found.evaluation["others"].items) == ["o/1"]
    assert found.evaluation["others"].question == "Which others?"


def test_shift_refuses_classes_that_were_not_trained():
    target = dataset("others", "o/", names=("c", "x"), train=(), val=(), test=(Item("1", 0, "c"), Item("2", 1, "x")))
    with pytest.raises(UserError, match="setting=shift: 1 class of others is none of data=letters, first: 'x'"):
        task.shift(dataset(), {"others": target}, Sampling(1, 1))
    fewer = dataset("others", "o/", names=("c",), train=(), val=(), test=(Item("1", 0, "c"),))
    assert task.shift(dataset(), {"others": fewer}, Sampling(1, 1)).evaluation["others"].names == ("c",)


def ask(list_share, data=None, build=task.few_shot, **options):
    found = build(data or dataset(), {}, Sampling(1, 1))
    task = Task(found.train, found.evaluation, digits.Digits(), "", {})
    method = ClassListPrompt(instruction="no_think", seed=1, list_share=list_share, **options)
    return {split: method.evaluation_prompts(task, split) for split in task.evaluation}


def test_open_set_lists_nothing():
    prompts = ask(0.0, dataset(aliases={"a": ("alpha",)}))["test"]
    assert {prompt.text for prompt in prompts} == {"What?\n Please directly output the answer."}
    assert {prompt.choices for prompt in prompts} == {()}
    assert [prompt.aliases for prompt in prompts] == [("alpha",)] * 2 + [()] * 4


def test_new_classes_are_listed_among_themselves():
    prompts = ask(0.8, build=task.base_to_new)
    assert {prompt.choices for prompt in prompts["new"]} == {("c",)}
    assert {frozenset(prompt.choices) for prompt in prompts["base"]} == {frozenset("ab")}


def test_one_number_for_several_splits():
    assert metrics.overall({"base": 0.8, "new": 0.4, "val": 1.0}) == {
        "harmonic_mean": pytest.approx(2 / (1 / 0.8 + 1 / 0.4))
    }
    assert metrics.overall({"base": 0.0, "new": 0.0}) == {"harmonic_mean": 0.0}


ITEMS = (Item("1", 0, "a"), Item("2", 1, "b"))
GOOD = Source(("a", "b"), ITEMS, (), tuple(replace(i, image=f"t{i.image}") for i in ITEMS), digits.Digits(), "", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": (*ITEMS, Item("2", 1, "b"))}, "2 is listed twice, the second time in train"),
        ({"val": (Item("1", 0, "a"),)}, "1 is listed twice, the second time in val"),
        ({"train": (*ITEMS, Item("3", 1, "c"))}, "label 1 has two names, 'b' and 'c' (at 3)"),
        ({"train": (*ITEMS, Item("3", 2, "c"))}, "3 has label 2, but there are 2 classes"),
        ({"test": (Item("t1", 0, "a"),)}, "1 class has no image in test, first: 'b'"),
        ({"train": (Item("1", 0, "a"),)}, "1 class has no image in train, first: 'b'"),
    ],
    ids=["twice", "in two parts", "two names", "label", "missing in test", "missing in train"],
)
def test_contradictions_are_named(change, message):
    assert list(source.problems(GOOD)) == []
    assert message in list(source.problems(replace(GOOD, **change)))


def test_no_training_images_is_no_contradiction():
    assert list(source.problems(replace(GOOD, train=()))) == []


def test_unset_data_root_names_the_folder_and_the_page():
    data = DataConfig(name="dtd", folder="dtd", question="?", root=None)
    with pytest.raises(UserError, match=r"data=dtd is read from \$DATA/dtd, but DATA is not set.*docs/datasets.md#dtd"):
        source.find(data)


def test_folders_inside_the_root_or_absolute(tmp_path):
    inside = source.find(DataConfig(name="dtd", folder="dtd", question="?", root=str(tmp_path)))
    assert (inside.folder, inside.root) == (tmp_path / "dtd", tmp_path)
    assert source.find(DataConfig(name="dtd", folder="/x/dtd", question="?", root=None)).folder.as_posix() == "/x/dtd"


def test_fewer_images_of_each_class_are_the_same_ones_whatever_is_trained():
    """Five of a class, by the hashes of their keys; in the order of the split."""
    test = tuple(Item(f"{name}{i}", label, name) for i in range(20) for label, name in enumerate(NAMES))
    whole = task.few_shot(dataset(test=test), {}, Sampling(4, 1))
    found = task.fewer(whole.evaluation["test"], 5)
    for name in "abc":
        first = sorted((f"{name}{i}" for i in range(20)), key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:5]
        assert sorted(item.image for item in found.items if item.name == name) == sorted(first)
    assert found.items == tuple(item for item in whole.evaluation["test"].items if item in found.items)
    assert task.fewer(whole.evaluation["test"], 20) == whole.evaluation["test"]


@pytest.mark.slow
def test_fewer_test_images_by_configuration(compose):
    asked = task.build(validate(compose("method=zeroshot", "setting.test_per_class=7", "data=fashion")))
    assert {name: len(split.items) for name, split in asked.task.evaluation.items()} == {"val": 40, "test": 70}
    assert asked.manifest["test_per_class"] == 7
    other = task.build(
        validate(compose("method=zeroshot", "setting.test_per_class=7", "data=fashion", "seed=3", "shots=1"))
    )
    assert other.task.evaluation["test"].items == asked.task.evaluation["test"].items, "whatever the draw is"
    with pytest.raises(UserError, match="setting.test_per_class=0"):
        validate(compose("setting.test_per_class=0"))
