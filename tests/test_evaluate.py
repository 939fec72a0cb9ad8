"""How one reply is graded, without a model."""

from __future__ import annotations

import pytest
import torch

from alert.prompting import AlertPrompting
from alert.rewards import tagged_accuracy
from common.evaluation import metrics
from common.rewards import accuracy
from common.rollout.base import Completion
from common.types import Prompt, Sample
from common.vlm.replies import grade

NAMES = ("six", "nine", "The Beatles", "St.")


def asked(label="six", choices=NAMES, aliases=()):
    return Prompt("0", "?", label, choices, aliases=aliases)


def graded(method, prompt, text, **options):
    return grade(method, prompt, 0, Completion(torch.tensor([1, 2]), torch.zeros(2), text, truncated=False), **options)


def matches(prediction):
    return prediction.correct, prediction.reply.correct_official, prediction.correct_alias


# label, offered names, other words for it, what is said; strict, official and alias match
OFFERED = {
    "offered and named": ("six", ("nine", "six"), (), "six", (True, True, True)),
    "offered, another named": ("six", ("nine", "six"), (), "nine", (False, False, False)),
    "offered under another spelling": ("sea_or_lake", ("Sea or  Lake",), (), "Sea or Lake", (True, True, True)),
    "offered, in a sentence": ("six", ("nine", "six"), (), "It is six.", (False, True, False)),
    "not offered but named": ("six", ("nine", "one"), (), "six", (False, False, False)),
    "not offered, named in a sentence": ("six", ("nine", "one"), (), "It is six.", (False, False, False)),
    "not offered, named by another word": ("six", ("nine", "vi"), ("vi",), "vi", (False, False, False)),
    "offered, named by another word": ("six", ("nine", "six"), ("vi",), "vi", (False, False, True)),
    "open question": ("six", (), ("vi",), "six", (True, True, True)),
    "open question, another word": ("six", (), ("vi",), "VI", (False, False, True)),
    "open question, another class": ("six", (), ("vi",), "nine", (False, False, False)),
    "several answers": ("six", (), (), "<answer>six</answer><answer>nine</answer>", (False, True, False)),
    "nothing": ("six", (), (), "", (False, False, False)),
}


@pytest.mark.parametrize(("label", "choices", "aliases", "said", "expected"), OFFERED.values(), ids=OFFERED.keys())
def test_a_label_that_was_not_offered_cannot_be_right(no_think, label, choices, aliases, said, expected):
    assert matches(graded(no_think, asked(label, choices, aliases), said)) == expected


def test_alert_grades_as_well_by_what_was_offered():
    said = "<think>x</think><answer>six</answer>"
    assert matches(graded(AlertPrompting(seed=1), asked(choices=("six", "nine")), said)) == (True, None, True)
    assert matches(graded(AlertPrompting(seed=1), asked(choices=("one", "nine")), said)) == (False, None, False)


@pytest.mark.parametrize(
    ("said", "label", "choices", "off", "on"),
    [
        ("a six", "six", NAMES, False, True),
        ("The nine.", "nine", NAMES, False, True),
        ("a nine", "six", NAMES, False, False),
        ("the beatles", "The Beatles", NAMES, True, True),
        ("beatles", "The Beatles", NAMES, False, False),
        ("a beatles", "The Beatles", NAMES, False, False),
        ("an six or a nine", "six", NAMES, False, False),
        ("a not six", "six", NAMES, False, False),
        ("the six", "six", ("nine", "one"), False, False),
        ("a six", "six", (), False, True),
        ("the who", "who", ("who", "The Who"), False, False),
    ],
)
def test_articles_are_a_switch_of_the_evaluation(no_think, said, label, choices, off, on):
    for articles, expected in ((None, off), (False, off), (True, on)):
        options = {} if articles is None else {"articles": articles}
        found = graded(no_think, asked(label, choices), said, names=NAMES, **options)
        assert (found.correct, found.correct_alias) == (expected, expected)
    assert accuracy([Sample(asked(label, choices), said)]) == [float(off)], "a reward never allows it"
    assert tagged_accuracy([Sample(asked(label, choices), f"<answer>{said}</answer>")]) == [float(off)]


def test_articles_hold_for_other_words_and_in_tags(think):
    found = graded(think, asked(aliases=("half a dozen",)), "<answer>a half a dozen</answer>", articles=True)
    assert matches(found) == (False, False, True)
    assert graded(think, asked(), "<think>x</think><answer>a six</answer>", articles=True).correct


SAID = ("six", "Six.", '"six"', "**six**", "six..", "a six", "the six", "nine", "a nine", "“Nine”", "St.", "st", "St..")
SAID += ("beatles", "the beatles", "'The Beatles'.", "six or nine", "", "<answer>six</answer>", "no idea")


@pytest.mark.parametrize("articles", [False, True])
@pytest.mark.parametrize("choices", [NAMES, ()], ids=["list", "open"])
def test_confusion_reads_answers_as_grading_does(no_think, articles, choices):
    for place, label in enumerate(NAMES):
        for said in SAID:
            found = graded(no_think, asked(label, choices), said, names=NAMES, articles=articles)
            row = metrics.confusion([found], NAMES)[place]
            assert sum(row) == 1 and bool(row[place]) is found.correct, (label, said)
            right = [graded(no_think, asked(n, choices), said, names=NAMES, articles=articles).correct for n in NAMES]
            assert row == [*map(int, right), int(not any(right))], "an answer that names a class stands in its column"
