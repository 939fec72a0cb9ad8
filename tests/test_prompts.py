"""The questions of CLS-RL, to the letter."""

from __future__ import annotations

import pytest

from clsrl import prompting
from clsrl.prompting import ClassListPrompt
from common.config.composition import method_arguments, validate
from common.data import digits
from common.types import Item, Split, Task, UserError

# What the authors' data and scripts ask (the list itself is drawn for every image; two names leave no other than these).
LISTED = "What type of pet is in the photo?\n Please choose one from list [ {}, {}]."
OPEN = "What type of animal is in the photo?"
TRAINED = {
    "think": "\n Please output the thinking process in <think> </think> and final answer in <answer> </answer> tags.",
    "no_think": "\n Please directly output the answer.",
}
FIRST = " First output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
PLEASE = " Please output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
NAME = " Please directly output the answer name."
SYSTEM = "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."


def split(*names: str) -> Split:
    items = tuple(Item(f"{name}-{i}", label, name) for label, name in enumerate(names) for i in range(2))
    return Split(items, names, "What type of pet is in the photo?", OPEN)


def task(*evaluated: str) -> Task:
    return Task(split("cat", "dog"), {name: split("cat", "dog") for name in evaluated}, digits.Digits(), "", {})


FEW_SHOT, BASE_TO_NEW, CROSS = task("val", "test"), task("val", "base", "new"), task("val", "test", "dtd")


def texts(asked):
    """Of every prompt, with the listed names put back as places, so that one text is expected of all."""
    return {p.text.replace("[ cat, dog]", "[ {}, {}]").replace("[ dog, cat]", "[ {}, {}]") for p in asked}


@pytest.mark.parametrize("protocol", ["train", "official"])
@pytest.mark.parametrize("instruction", ["think", "no_think"])
@pytest.mark.parametrize(("share", "asked"), [(0.4, LISTED), (0.0, OPEN)], ids=["closed", "open"])
def test_training_prompts(protocol, instruction, share, asked):
    method = ClassListPrompt(instruction=instruction, seed=1, list_share=share, evaluation_prompt=protocol)
    found = method.train_prompts(FEW_SHOT)
    assert texts(found) == {asked + TRAINED[instruction]}
    assert {(p.system, p.image_last) for p in found} == {(None, False)}


OFFICIAL = {
    "few-shot test": (FEW_SHOT, "test", 0.4, LISTED, FIRST),
    "few-shot val": (FEW_SHOT, "val", 0.4, LISTED, FIRST),
    "base": (BASE_TO_NEW, "base", 0.8, LISTED, PLEASE),
    "val, watched for base": (BASE_TO_NEW, "val", 0.8, LISTED, PLEASE),
    "new": (BASE_TO_NEW, "new", 0.8, LISTED, FIRST),
    "another dataset": (CROSS, "dtd", 0.4, LISTED, FIRST),
    "its own": (CROSS, "test", 0.4, LISTED, FIRST),
    "open-set test": (FEW_SHOT, "test", 0.0, OPEN, PLEASE),
    "open-set val": (FEW_SHOT, "val", 0.0, OPEN, PLEASE),
}


@pytest.mark.parametrize(("of", "name", "share", "asked", "thinking"), OFFICIAL.values(), ids=OFFICIAL.keys())
def test_evaluation_prompts(of, name, share, asked, thinking):
    expected = {
        ("train", "think"): asked + TRAINED["think"],
        ("train", "no_think"): asked + TRAINED["no_think"],
        ("official", "think"): asked + thinking,
        ("official", "no_think"): asked + NAME,
    }
    for (wording, instruction), text in expected.items():
        method = ClassListPrompt(instruction=instruction, seed=1, list_share=share, evaluation_prompt=wording)
        found = method.evaluation_prompts(of, name)
        assert texts(found) == {text}
        assert {(p.system, p.image_last) for p in found} == {(None, False)}


SFT = {
    "clean": (LISTED + TRAINED["no_think"], None, False, "cat", LISTED + TRAINED["no_think"]),
    "official": (LISTED, SYSTEM, True, "<answer>cat</answer>", LISTED + NAME),
}


@pytest.mark.parametrize(("protocol", "expected"), SFT.items(), ids=SFT)
def test_supervised_baseline_of_a_protocol(compose, protocol, expected):
    text, system, image_last, target, evaluated = expected
    method = ClassListPrompt(**method_arguments(validate(compose("method=sft", f"protocol={protocol}"))))
    found = method.train_prompts(FEW_SHOT)
    assert texts(found) == {text}
    assert {(p.system, p.image_last) for p in found} == {(system, image_last)}
    assert method.label_response("cat") == target
    asked = method.evaluation_prompts(FEW_SHOT, "test")
    assert texts(asked) == {evaluated} and {(p.system, p.image_last) for p in asked} == {(None, False)}


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("method", ["clsrl", "nothinking", "zeroshot"])
def test_the_other_methods_train_alike_in_both_protocols(compose, method):
    found = [
        ClassListPrompt(**method_arguments(validate(compose(f"method={method}", f"protocol={protocol}"))))
        for protocol in ("clean", "official")
    ]
    assert found[0].train_prompts(FEW_SHOT) == found[1].train_prompts(FEW_SHOT)
    assert found[0].label_response("cat") == found[1].label_response("cat")


SWITCHES = {
    "sft_system_prompt=think": (LISTED + TRAINED["no_think"], SYSTEM, False, "cat"),
    "sft_question=bare": (LISTED, None, False, "cat"),
    "sft_image=last": (LISTED + TRAINED["no_think"], None, True, "cat"),
    "sft_target=tagged": (LISTED + TRAINED["no_think"], None, False, "<answer>cat</answer>"),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("switch", "expected"), SWITCHES.items(), ids=SWITCHES)
def test_each_switch_of_the_supervised_baseline_is_one_difference(compose, switch, expected):
    method = ClassListPrompt(**method_arguments(validate(compose("method=sft", f"protocol.{switch}"))))
    found = method.train_prompts(FEW_SHOT)
    (text,) = texts(found)
    assert (text, found[0].system, found[0].image_last, method.label_response("cat")) == expected


def test_class_lists_belong_to_the_image(digits_task, no_think):
    first = no_think.train_prompts(digits_task)
    assert first == no_think.train_prompts(digits_task)
    assert len({p.choices for p in first}) > 150, "lists differ from image to image"
    other = ClassListPrompt(instruction="no_think", seed=2).train_prompts(digits_task)
    assert [p.choices for p in other] != [p.choices for p in first]
    assert first[0].text.count(f"[ {', '.join(first[0].choices)}]") == 1


def test_list_holds_the_truth_once():
    names = [f"class {i}" for i in range(200)] + ["class 7"]  # two classes of one display name
    for image in range(50):
        drawn = prompting.class_list(names, "class 7", 80, seed=1, image=str(image))
        assert len(drawn) == len(set(drawn)) == 80 and "class 7" in drawn


@pytest.mark.parametrize(
    ("argument", "choices"),
    [
        ("instruction", "no_think, think, think_after, adaptive"),
        ("evaluation_prompt", "train, official"),
        ("train_system_prompt", "default, think"),
        ("train_question", "instructed, bare"),
        ("train_image", "first, last"),
        ("train_target", "label, tagged"),
    ],
)
def test_unknown_values_are_refused(argument, choices):
    with pytest.raises(UserError, match=f"method.{argument}=maybe: choose one of {choices}"):
        ClassListPrompt(**{"instruction": "think", "seed": 1, argument: "maybe"})


@pytest.mark.parametrize(
    ("completion", "direct", "thinking"),
    [("six", True, False), ("<think>x</think><answer>six</answer>", False, True), ("", False, False)],
)
def test_well_formed(no_think, think, completion, direct, thinking):
    assert no_think.well_formed(completion) is direct
    assert think.well_formed(completion) is thinking
