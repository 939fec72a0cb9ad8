"""The tiny models were taught digits and garments: on other data a run says so before it begins, once, and on a user's
own photos it stops where it earns nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from common.config.composition import validate
from common.run import loop
from common.runtime import progress
from common.types import UserError
from common.vlm import check

PLAIN = "common.models.tiny.recipe"


def asked(*names):
    """A task whose training split has the first half of the names, the test the others."""
    half = len(names) // 2
    parts = [SimpleNamespace(names=part, aliases={}) for part in (names[:half], names[half:])]
    return SimpleNamespace(train=parts[0], evaluation={"test": parts[1]})


@pytest.fixture
def warnings(compose, capsys):
    """What the check of a model says."""

    def run(task, *overrides):
        config = validate(compose(*overrides))
        capsys.readouterr()
        check.check_model(config, task, [])
        return capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("model", ["tiny_qwen2_vl", "tiny_gemma3"])
def test_other_names_are_warned_of_once(warnings, model):
    (line,) = warnings(asked("zero", "cat", "dog", "One"), f"model={model}", "data=folder", "data.folder=/x")
    assert line.startswith(f"warning: model={model}") and "data=folder" in line and "'cat'" in line
    assert "2 of 4" in line
    assert "on a laptop take experiment=photos, on a GPU another model" in line


@pytest.mark.parametrize("model", ["tiny_qwen2_vl", "tiny_gemma3"])
def test_digits_and_garments_are_known(warnings, model):
    assert warnings(asked("zero", "Nine", "three", "one"), f"model={model}") == []
    assert warnings(asked("t-shirt", "Ankle boot", "bag", "coat"), f"model={model}") == []


def test_weights_of_ones_own_may_know_anything(warnings, untrained_folder):
    given = [f"model.path={untrained_folder}", "model.recipe=" + PLAIN]
    assert warnings(asked("cat", "dog"), *given) == []


def test_a_recipe_that_does_not_say_is_believed(warnings, monkeypatch):
    from common.models.tiny import recipe

    monkeypatch.delattr(recipe, "knows")
    assert warnings(asked("cat", "dog")) == []


def test_one_rank_speaks_for_all(warnings, monkeypatch):
    monkeypatch.setattr(progress, "rank", lambda: 1)
    assert warnings(asked("cat", "dog")) == []


def paid(mean, **others):
    return {"reward": mean, "rewards/equality/mean": mean, "rewards/equality/std": 0.1, **others}


def test_a_stranger_that_earns_nothing_stops():
    """10 updates: 0.019 on average is next to nothing, 0.02 is one of fifty, and before the tenth nobody knows."""
    watch = loop.Watch([], is_stranger=True)
    for mean in [0.0] * 5 + [0.038] * 4:
        watch.see(paid(mean))
    with pytest.raises(UserError, match="in 10 updates reward 'equality' had a mean of 0.019, and") as stop:
        watch.see(paid(0.038))
    for way_out in ("experiment=photos", "model=qwen2_vl_2b", "doctor=false"):
        assert way_out in str(stop.value)
    for given in ({"is_stranger": False}, {}):
        watch = loop.Watch([], **given)
        for _ in range(20):
            watch.see(paid(0.0))
    watch = loop.Watch([], is_stranger=True)
    for mean in [0.0] * 5 + [0.04] * 5 + [0.0] * 9:
        watch.see(paid(mean))


def test_well_formed_answers_are_not_right_ones():
    """CLS-RL's format can be earned without knowing a class; a length that takes away says nothing either way."""
    rows = {"rewards/format/mean": 0.9, "rewards/format/std": 0.1}
    rows |= {"rewards/length/mean": -0.01, "rewards/length/std": 0.1}
    watch = loop.Watch([paid(0.5, **rows)] * 9, is_stranger=True)
    watch.see(paid(0.5, **rows))
    with pytest.raises(UserError, match="reward 'equality' had a mean of 0.000"):
        loop.Watch([paid(0.0, **rows)] * 9, is_stranger=True).see(paid(0.0, **rows))


@pytest.mark.parametrize(
    ("overrides", "names", "stranger"),
    [
        (["data=folder"], ("cat", "dog"), True),
        (["data=folder"], ("Bag", "coat"), False),
        (["data=folder", "doctor=false"], ("cat", "dog"), False),
        (["data=dtd"], ("cat", "dog"), False),
    ],
    ids=["own photos", "known names", "all the same", "a benchmark"],
)
def test_who_is_a_stranger(compose, overrides, names, stranger):
    assert loop.is_stranger(validate(compose(*overrides)), asked(*names)) is stranger
