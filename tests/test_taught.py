"""The tiny models were taught digits and garments: on other data a run says so before it begins, once."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from common.config.composition import validate
from common.models import checks

PLAIN = "common.models.tiny.recipe"


def asked(*names):
    """Questions whose training split has the first half of the names, the test the others."""
    half = len(names) // 2
    parts = [SimpleNamespace(names=part) for part in (names[:half], names[half:])]
    return SimpleNamespace(train=[], evaluation={}, task=SimpleNamespace(train=parts[0], evaluation={"test": parts[1]}))


@pytest.fixture
def warnings(compose, caplog):
    """What the check of a model says, as warnings."""

    def run(questions, *overrides):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            checks.check(validate(compose(*overrides)), questions)
        return [record.getMessage() for record in caplog.records]

    return run


@pytest.mark.parametrize("model", ["tiny_qwen2_vl", "tiny_gemma3"])
def test_other_names_are_warned_of_once(warnings, model):
    (line,) = warnings(asked("zero", "cat", "dog", "One"), f"model={model}", "data=folder", "data.folder=/x")
    assert f"model={model}" in line and "data=folder" in line and "'cat'" in line
    assert "2 of 4" in line and "use another model" in line


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
    monkeypatch.setattr(checks, "rank", lambda: 1)
    assert warnings(asked("cat", "dog")) == []
