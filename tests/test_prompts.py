"""The questions of CLS-RL."""

from __future__ import annotations

import pytest

from clsrl import prompts
from clsrl.method import ClosedFormQuestion
from common.types import UserError

QUESTION = "What type of digit is in the photo?"


def test_prompt_wording(digits_task, no_think, think):
    direct, thinking = no_think.train_prompts(digits_task)[0], think.train_prompts(digits_task)[0]
    names = ", ".join(direct.choices)
    listed = f"{QUESTION}\nPlease choose one from list [ {names}].\n "
    assert direct.text == listed + "Please directly output the answer."
    assert thinking.text == listed + (
        "Please output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    )


def test_class_lists_belong_to_the_image(digits_task, no_think):
    first = no_think.train_prompts(digits_task)
    assert first == no_think.train_prompts(digits_task)
    assert len({p.choices for p in first}) > 150, "lists differ from image to image"
    other = ClosedFormQuestion(instruction="no_think", seed=2).train_prompts(digits_task)
    assert [p.choices for p in other] != [p.choices for p in first]


def test_list_holds_the_truth_once():
    names = [f"class {i}" for i in range(200)] + ["class 7"]  # two classes of one display name
    for image in range(50):
        drawn = prompts.class_list(names, "class 7", 80, seed=1, image=str(image))
        assert len(drawn) == len(set(drawn)) == 80 and "class 7" in drawn


def test_official_evaluation_wording(digits_task):
    official = {
        kind: ClosedFormQuestion(instruction=kind, seed=1, evaluation_prompt="official")
        for kind in ("think", "no_think")
    }
    assert official["no_think"].evaluation_prompts(digits_task, "test")[0].text.endswith("output the answer name.")
    assert "First output the thinking" in official["think"].evaluation_prompts(digits_task, "test")[0].text
    assert official["think"].train_prompts(digits_task)[0].text.endswith(prompts.THINK)


def test_official_sft_system_prompt_is_for_training_only(digits_task):
    sft = ClosedFormQuestion(instruction="no_think", seed=1, train_system_prompt="think")
    assert "<think>" in sft.train_prompts(digits_task)[0].system
    assert sft.evaluation_prompts(digits_task, "test")[0].system is None


def test_unknown_instruction_is_refused():
    with pytest.raises(UserError, match="method.instruction=maybe: choose one of think, no_think"):
        ClosedFormQuestion(instruction="maybe", seed=1)


@pytest.mark.parametrize(
    ("completion", "direct", "thinking"),
    [("six", True, False), ("<think>x</think><answer>six</answer>", False, True), ("", False, False)],
)
def test_well_formed(no_think, think, completion, direct, thinking):
    assert no_think.well_formed(completion) is direct
    assert think.well_formed(completion) is thinking
