"""docs/models.md says what a test tries: every cell of its table against the tests' own parameters."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from common.config.schema import FAMILIES, NO_FAMILY
from common.models.families import family
from tests import (
    test_extra_embeddings,
    test_families,
    test_grpo_options,
    test_label_scores,
    test_vllm,
)

ROOT = Path(__file__).parent.parent
# the test behind each column; those of LoRA and frozen towers are among the kinds of the first
UPDATE = test_families.test_an_update_moves_what_is_trained
COLUMNS = {
    "GRPO": UPDATE,
    "SFT": test_families.test_sft_learns_its_labels,
    "LoRA": UPDATE,
    "frozen tower": UPDATE,
    "ALERT": test_families.test_alert_trains_embeddings_of_an_images_width,
    "label scores": test_label_scores.test_a_name_after_reasoning_is_the_end_of_one_long_reply,
    "shared prefixes": (
        test_extra_embeddings.test_shared_equals_plain_with_categories,
        test_families.test_a_row_of_several_prompts_equals_transformers_forward,
    ),
    "feature cache": test_grpo_options.test_frozen_vision_features_are_the_tower_s,
    "vLLM": test_vllm.test_an_update_reaches_the_sampler_and_nothing_of_before_is_left,
    "export": test_families.test_a_run_is_exported_and_predicts,
}
# what a family cannot do is refused, and a test tries that
REFUSED = {"ALERT": test_families.test_alert_is_refused_before_weights_are_read}


def table():
    """The cells, by family and column."""
    lines = [line for line in (ROOT / "docs" / "models.md").read_text("utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0].strip("`"): dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def tried(test):
    """The families that a test, or any of several, is run with."""
    if isinstance(test, tuple):
        return set.union(*map(tried, test))
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] == "family"]
    (values,) = (mark.args[1] for mark in marks)
    return {getattr(value, "values", (value,))[0] for value in values}


def test_every_family_and_its_options_have_a_row():
    options = defaultdict(set)
    for path in (ROOT / "conf" / "model").glob("*.yaml"):
        options[yaml.safe_load(path.read_text("utf-8"))["family"]].add(path.stem)
    del options[NO_FAMILY]
    assert {name: set(re.findall(r"`(\w+)`", row["options"])) for name, row in table().items()} == options
    assert options.keys() == FAMILIES.keys()
    assert all(family(name).model_type == name for name in FAMILIES)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_cell_says_what_a_test_tries(column):
    families = tried(COLUMNS[column])
    refused = tried(REFUSED[column]) if column in REFUSED else set()
    assert not families & refused
    said = {**dict.fromkeys(FAMILIES, "not tried"), **dict.fromkeys(families, "yes"), **dict.fromkeys(refused, "no")}
    assert {name: row[column] for name, row in table().items()} == said
    assert column != "shared prefixes" or all(family(name).shares_prefixes for name in families)


def test_the_kinds_of_training_are_those_of_the_columns():
    kinds = test_families.KINDS.values()
    assert any("lora" in kind for kind in kinds) and any(kind == {"freeze_vision": True} for kind in kinds)
    assert table().keys() == FAMILIES.keys() and set(next(iter(table().values()))) == {"options", *COLUMNS}
