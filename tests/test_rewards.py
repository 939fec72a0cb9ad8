"""Attacks on every reward: in the clean protocol nothing wrong or evasive scores."""

from __future__ import annotations

import time

import pytest

from alert.rewards import soft_format
from clsrl.rewards import accuracy_reward, format_reward, matches_officially
from common.rewards import Reward, accuracy, build_rewards, equality, score, strict_format
from common.types import Prompt, Sample, UserError

NAMES = ("six", "nine", "arctic fox", "ox")


def sample(completion: str, label: str = "six") -> Sample:
    return Sample(Prompt("0", "?", label, NAMES), completion)


GOOD = "<think>a loop</think><answer>six</answer>"

# completions whose answer is right in the sense of the clean protocol
RIGHT = {
    "plain": "six",
    "tags": GOOD,
    "case and space": "<think>x</think>\n<answer> Six\n</answer>",
    "answer tag only": "<answer>six</answer>",
    "full stop": "six.",
    "full stop in tags": "<think>x</think><answer>six.</answer>",
    "quotes": '"six"',
    "typographic quotes in tags": "<answer>“six”</answer>",
    "bold": "**six**",
    "bold with a full stop": "<think>x</think><answer>**Six.**</answer>",
}
# wrong, missing, hedged or hidden answers
EVASIVE = {
    "empty": "",
    "blank": " \n",
    "empty answer": "<think>x</think><answer></answer>",
    "wrong": "<think>x</think><answer>nine</answer>",
    "all classes": ", ".join(NAMES),
    "all classes in tags": f"<think>x</think><answer>{', '.join(NAMES)}</answer>",
    "a or b": "<answer>six or nine</answer>",
    "sentence": "This is a photo of six.",
    "two answers, right first": "<answer>six</answer><answer>nine</answer>",
    "two answers, right last": "<think>x</think><answer>nine</answer><answer>six</answer>",
    "nested answer": "<think>x</think><answer><answer>six</answer></answer>",
    "answer inside think": "<think><answer>six</answer></think>",
    "answer inside think, then wrong": "<think><answer>six</answer></think><answer>nine</answer>",
    "unclosed": "<think>x</think><answer>six",
    "trailing text": GOOD + " or nine",
    "leading text": "nine " + GOOD,
    "swapped tags": "</answer>six<answer>",
    "wrong order": "<answer>six</answer><think>x</think>",
    "upper-case tags hide a second": "<ANSWER>nine</ANSWER><answer>six</answer>",
    "cyrillic look-alike": "ѕіх",
    "long s": "\u017fix",
    "full-width look-alike": "ｓｉｘ",
    "zero-width space": "si\u200bx",
    "right-to-left mark": "\u202exis",
    "combining mark": "six\u0301",
    "nul": "six\x00",
    "article": "a six",
    "article in tags": "<think>x</think><answer>the six</answer>",
    "two full stops": "six..",
    "half a pair of quotes": '"six',
    "half a pair of asterisks": "**six",
    "two quoted answers": '"six" or "nine"',
    "two quoted answers in single quotes": "'six' 'nine'",
    "two bold answers": "**six** **nine**",
    "two sentences": "six. nine.",
    "full stop between": "six.nine",
    "denied": "six, not nine.",
    "quoted hedge": '"six or nine"',
    "nested marks": "**'six'**",
    "full stop behind the tags": GOOD + ".",
    "bold tags": "**<answer>six</answer>**",
    "zero-width space before the full stop": "six\u200b.",
    "left-to-right mark in quotes": '"six\u200e"',
    "ideographic full stop": "six。",
    "full-width quotes": "＂six＂",
    "100 kB of the label": "six " * 25_000,
    "100 kB of tags": "<answer>six</answer>" * 5_000,
    "100 kB of open tags": "<think>" * 15_000,
    "100 kB of blanks, then the label": " " * 100_000 + "six",
}


@pytest.mark.parametrize("completion", RIGHT.values(), ids=RIGHT.keys())
def test_accuracy_accepts_right_answers(completion):
    assert accuracy([sample(completion)]) == [1.0]


@pytest.mark.parametrize("completion", EVASIVE.values(), ids=EVASIVE.keys())
def test_accuracy_refuses_wrong_and_evasive_answers(completion):
    began = time.monotonic()
    assert accuracy([sample(completion)]) == [0.0]
    assert equality([sample(completion)]) == [0.0]
    assert time.monotonic() - began < 5, "a long completion must not stall training"


def test_a_contained_name_is_not_the_name():
    assert accuracy([sample("<answer>arctic fox</answer>", label="ox")]) == [0.0]
    assert accuracy([sample("<answer>ox</answer>", label="arctic fox")]) == [0.0]


def test_a_ligature_is_not_its_letters():
    assert accuracy([sample("\ufb01ve", label="five")]) == [0.0]


def test_underscores_and_spaces_are_one():
    assert accuracy([sample("Arctic_Fox", label="arctic fox")]) == [1.0]


@pytest.mark.parametrize("completion", ["Six", " six", "six ", "six.", "six\n", "<answer>six</answer>"])
def test_equality_is_to_the_letter(completion):
    # section 3.3: "the same as the ground truth label exactly"
    assert equality([sample("six"), sample(completion)]) == [1.0, 0.0]


FORMAT_BROKEN = {
    "plain": "six",
    "no think": "<answer>six</answer>",
    "trailing": GOOD + ".",
    "leading": "." + GOOD,
    "repeated": GOOD + GOOD,
    "tag inside think": "<think><answer>six</answer></think><answer>six</answer>",
    "unclosed think": "<think>x<answer>six</answer>",
    "upper case": GOOD.upper(),
    "100 kB": "<think>" + "x" * 100_000 + "</think><answer>six</answer>",
}


@pytest.mark.parametrize("completion", FORMAT_BROKEN.values(), ids=FORMAT_BROKEN.keys())
def test_strict_format_refuses(completion):
    assert strict_format([sample(completion)]) == [0.0]


def test_strict_format_accepts_line_breaks():
    assert strict_format([sample("<think>a\nb</think>\n\n<answer>six</answer>")]) == [1.0]


SOFT = {
    "strict": (GOOD, 1),
    "words around": (f"Sure. {GOOD} Anything else?", 1),
    "words between": ("<think>x</think> So it is <answer>six</answer>", 1),
    "line breaks": ("<think>\nx\n</think>\n\n<answer>\nsix\n</answer>\n", 1),
    "wrong answer": ("<think>x</think><answer>a cat</answer>", 1),
    "empty thought": ("<think></think><answer>six</answer>", 1),
    "two answers": (GOOD + "<answer>nine</answer>", 1),
    "tag inside think": ("<think><answer>six</answer></think><answer>six</answer>", 1),
    "empty answer": ("<think>x</think><answer> \n</answer>", 0),
    "no answer tag": ("<think>x</think>six", 0),
    "no thought": ("<answer>six</answer>", 0),
    "answer first": ("<answer>six</answer><think>x</think>", 0),
    "answer only inside": ("<think><answer>six</answer></think>", 0),
    "unclosed thought": ("<think>x<answer>six</answer>", 0),
    "unclosed answer": ("<think>x</think><answer>six", 0),
    "closed before opened": ("</think><think><answer>six</answer>", 0),
    "upper case": (GOOD.upper(), 0),
    "plain": ("six", 0),
    "empty": ("", 0),
    "100 kB": ("<think>" * 15_000 + GOOD, 0),
}


@pytest.mark.parametrize(("completion", "expected"), SOFT.values(), ids=SOFT.keys())
def test_soft_format(completion, expected):
    assert soft_format([sample(completion)]) == [expected]


@pytest.mark.parametrize("completion", [*RIGHT.values(), *EVASIVE.values()], ids=[*RIGHT, *EVASIVE])
def test_the_strict_rewards_of_clsrl_are_the_common_ones(completion):
    replies = [sample(completion)]
    assert accuracy_reward(replies) == accuracy(replies) and format_reward(replies) == strict_format(replies)


# By hand from the authors' reward: the first <answer> that stands on one line, else the whole text; equal when
# lower-cased. No digits here: math_verify is asked first, and finds nothing to compare without them.
OFFICIAL = {
    "plain": ("Six", 1),
    "tags": (GOOD, 1),
    "blanks inside the tags": ("<answer> six </answer>", 1),
    "the first answer counts": ("<answer>six</answer><answer>nine</answer>", 1),
    "the second does not": ("<answer>nine</answer><answer>six</answer>", 0),
    "thoughts around": ("Well, <answer>six</answer>.", 1),
    "contained only": ("<answer>a six</answer>", 0),
    "wrong": ("nine", 0),
    "line breaks inside the tags": ("<answer>\nsix\n</answer>", 0),
    "line breaks, then one line": ("<answer>\nnine</answer><answer>six</answer>", 1),
    "line breaks in the thought": ("<think>a\nloop</think>\n<answer>six</answer>", 1),
    "empty answer": ("six<answer></answer>", 0),
}


@pytest.mark.parametrize(("completion", "expected"), OFFICIAL.values(), ids=OFFICIAL.keys())
def test_official_accuracy(completion, expected):
    assert accuracy_reward([sample(completion)], match="official") == [expected]


def test_official_accuracy_and_evaluation_differ_on_an_answer_of_its_own_line():
    reply = "<think>a loop</think><answer>\nsix\n</answer>"
    assert accuracy_reward([sample(reply)], match="official") == [0.0]
    assert matches_officially(reply, "six")


AUDI = ("1994 Audi 100 Wagon", "1994 Audi 100 Sedan")
FORD = ("2012 Ford Fiesta Sedan", "2012 Ford Edge SUV")


@pytest.mark.parametrize("frame", ["{}", "<think>x</think><answer>{}</answer>"], ids=["bare", "tags"])
@pytest.mark.parametrize(("names", "accepted"), [(AUDI, 1), (FORD, 0)], ids=["a number inside", "only the year"])
def test_official_accuracy_asks_math_verify_first(names, accepted, frame):
    # a number inside a name makes two cars one; the year that begins the label stands behind a tag and is not seen
    wrong, label = names
    assert accuracy_reward([sample(frame.format(wrong), label)], match="official") == [accepted]
    assert accuracy_reward([sample(frame.format(wrong), label)]) == [0.0]


def test_official_accuracy_ignores_case_of_the_label():
    assert accuracy_reward([sample("ford edge", "Ford Edge")], match="official") == [1.0]


@pytest.mark.parametrize(
    ("completion", "strict", "official"),
    [
        (GOOD, 1, 1),
        (GOOD + GOOD, 0, 1),
        ("<think>a\nb</think>\n\n<answer>six</answer>", 1, 1),
        (GOOD + "\n", 1, 0),
        ("x" + GOOD, 0, 0),
    ],
    ids=["good", "repeated", "line breaks", "a line break behind", "text before"],
)
def test_format_reward(completion, strict, official):
    assert format_reward([sample(completion)]) == [strict]
    assert format_reward([sample(completion)], match="official") == [official]


def test_score_weighs_and_keeps_components():
    rewards = {"format": Reward(0.5, strict_format), "accuracy": Reward(2.0, accuracy)}
    scores = score([sample(GOOD), sample("six"), sample("nine")], rewards)
    assert scores.parts == {"format": [1.0, 0.0, 0.0], "accuracy": [1.0, 1.0, 0.0]}
    assert scores.total == [2.5, 2.0, 0.0]


def test_score_refuses_a_reward_of_another_length():
    with pytest.raises(ValueError, match="'short' returned 1 value for 2 samples"):
        score([sample("a"), sample("b")], {"short": Reward(1.0, lambda samples: [1.0])})


def test_score_makes_floats_of_whole_numbers():
    scores = score([sample("a")], {"count": Reward(1.0, lambda samples: [1 for _ in samples])})
    assert type(scores.parts["count"][0]) is float  # a column of the completions must not change its type half-way


def test_build_rewards_binds_arguments():
    built = build_rewards({"format": {"weight": 1, "fn": "clsrl.rewards.format_reward", "match": "official"}})
    assert built["format"].function([sample(GOOD + GOOD)]) == [1.0]


class Counting:
    """A reward that keeps something between calls."""

    def __init__(self, *, limit: int) -> None:
        if limit < 0:
            raise UserError(f"limit={limit} must not be negative")
        self.limit, self.calls = limit, 0

    def __call__(self, samples):
        self.calls += 1
        return [float(len(s.completion) <= self.limit) for s in samples]


class Silent:
    """Not a reward: its objects cannot be called."""


def entry(kind, **arguments):
    return {"mine": {"weight": 2.0, "fn": f"{__name__}.{kind}", **arguments}}


def test_a_class_is_built_once_and_keeps_its_state():
    rewards = build_rewards(entry("Counting", limit=3))
    assert [score([sample("six"), sample("nine")], rewards).total for _ in range(2)] == [[2.0, 0.0]] * 2
    assert rewards["mine"].function.calls == 2
    assert build_rewards(entry("Counting", limit=3))["mine"].function.calls == 0


@pytest.mark.parametrize(
    ("kind", "message"),
    [("Counting", "rewards.mine.limit=-1 must not be negative"), ("Silent", "rewards.mine.fn: Silent objects cannot")],
)
def test_a_class_that_refuses_is_named_by_its_key(kind, message):
    with pytest.raises(UserError, match=message):
        build_rewards(entry(kind, **({"limit": -1} if kind == "Counting" else {})))


def test_what_is_no_number_is_named_with_its_reward():
    for value in (None, "high"):
        with pytest.raises(UserError, match="reward 'mine' gave what is no number .*correct rewards.mine.fn"):
            score([sample("six")], {"mine": Reward(1.0, lambda samples, value=value: [value])})
