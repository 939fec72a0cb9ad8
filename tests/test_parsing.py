"""Answers, strictly and officially."""

from __future__ import annotations

import itertools
import re
from itertools import product

import pytest

from alert.rewards import tagged_answer
from clsrl import rewards
from common import parsing


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("six", "six"),
        ("<answer>six</answer>", "six"),
        ("<think>nine?</think><answer>six</answer>", "six"),
        ("<think>nine?</think>", None),
        ("<think>a</think> six", None),
        ("x" * 20_001, None),
    ],
)
def test_strict_answer(completion, answer):
    assert parsing.strict_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>a</think><answer>Six </answer>", "six"),
        ("Sure! <think>a</think>\n\nSo:\n<answer>six</answer>\nI hope this helps.", "six"),
        ("<answer>six</answer>", "six"),
        ("<think>a <answer>six</answer>", "six"),
        ("six", None),
        ("<think>six</think> six", None),
        ("<answer>six", None),
        ("<think><answer>six</answer></think>", None),
        ("<answer>six</answer><think>or nine</think>", None),
        ("<answer>nine</answer><answer>six</answer>", None),
        ("<ANSWER>nine</ANSWER><answer>six</answer>", None),
        ("<answer>nine<answer>six</answer>", None),
        ("<ANSWER>six</ANSWER>", None),
        ("</answer>six<answer>", None),
        ("<answer>six</answer>" + "x" * 20_000, None),
    ],
)
def test_tagged_answer(completion, answer):
    assert tagged_answer(completion) == answer


# The authors' evaluation, by hand from their rule: the first <answer> over any lines, stripped; the whole reply if that is
# missing or empty; equal to or containing the label, lower-cased; then again with the label's underscores as blanks.
OFFICIAL = {
    "equal": ("six", "six", True, True),
    "whole reply without a tag": ("It is six.", "six", False, True),
    "all names listed": ("zero, one, two, six", "six", False, True),
    "substring": ("arctic fox", "ox", False, True),
    "label longer than the answer": ("ox", "arctic fox", False, False),
    "case": ("<answer>SIX</answer>", "Six", True, True),
    "only the tag counts": ("<answer>nine</answer> six", "six", False, False),
    "only the first tag counts": ("<answer>nine</answer><answer>six</answer>", "six", False, False),
    "line breaks inside the tags": ("<answer>\n six\n</answer>", "six", True, True),
    "line break inside the answer": ("<answer>arctic\nfox</answer>", "arctic fox", True, False),
    "empty answer, six elsewhere": ("<think>six</think><answer></answer>", "six", False, True),
    "blank answer, six elsewhere": ("six <answer> \n</answer>", "six", False, True),
    "empty answer, nothing elsewhere": ("<answer></answer>", "six", False, False),
    "empty answer, then another": ("<answer></answer><answer>six</answer>", "six", False, True),
    "unclosed tag": ("<answer>six", "six", False, True),
    "closed before opened": ("</answer>six<answer>", "six", False, True),
    "tag inside the answer": ("<answer>nine<answer>six</answer>", "six", False, True),
    "upper-case tags are none": ("<ANSWER>nine</ANSWER> six", "six", False, True),
    "underscore in the label, blank in the answer": ("<answer>Car side</answer>", "car_side", True, True),
    "underscore in both": ("car_side", "car_side", True, True),
    "underscore in the answer alone": ("car_side", "car side", True, False),
    "second try, other underscores in the answer": ("a_car side", "car_side", False, True),
    "one underscore of two": ("rear_car side", "rear_car_side", True, False),
    "empty": ("", "six", False, False),
    "100 kB of open tags": ("<answer>" * 12_500, "six", False, False),
    "100 kB of blanks": ("<answer>" + " " * 100_000, "six", False, False),
}


@pytest.mark.parametrize(("completion", "label", "strict", "official"), OFFICIAL.values(), ids=OFFICIAL.keys())
def test_strict_and_official_match(completion, label, strict, official):
    assert parsing.matches_strictly(completion, label) is strict
    assert rewards.matches_officially(completion, label) is official


def test_the_official_answer_is_that_of_the_authors_pattern():
    pattern = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
    parts = ("<answer>", "</answer>", " ", "\n", "six")
    for pieces in itertools.product(parts, repeat=5):
        reply = "".join(pieces)
        found = pattern.search(reply)
        expected = (found[1].strip() if found else "") or reply.strip()
        assert rewards.evaluated_answer(reply) == expected


# marks around an answer that hide nothing
SIX = [
    *("six", " Six\n", "SIX", "six.", "six .", "_six_", "__six__", "*six*", "**six**", "** six **", '"six"', "'six'"),
    *("“six”", "‘six’", "’six’", "„six“", "« six »", '"six".', '"six."', "**six**.", "**six.**", "*six.*"),
]
# everything else around it, and everything beside it
NOT_SIX = [
    *("six..", "six...", ".six", "six. .", '"six.".', "**six.**.", "six,", "six!", "six?", "six:", "- six", "1. six"),
    *(
        '"six',
        'six"',
        "'six",
        "**six",
        "six**",
        "**six*",
        "*six**",
        "“six",
        "“six“",
        '“six"',
        "‘six",
        "'six\"",
        "»six«",
    ),
    *(
        '""six""',
        "''six''",
        "***six***",
        "****six****",
        '**"six"**',
        "\"'six'\"",
        "`six`",
        "(six)",
        "[six]",
        "<b>six</b>",
    ),
    *('"six" or "nine"', "'six' 'nine'", "**six** **nine**", "*six* *nine*", "“six” “nine”", "six. nine.", "six.nine"),
    *("six, nine", "six/nine", "six\nnine", "six or nine.", '"six or nine"', "six, not nine.", "not six", "not six."),
    *("**not** six", "no, six", "six?.", "six six", '"six" "six"', "six.six", "six*six", "answer: six", "It is six."),
    *("a six", "an six", "the six", "The six.", '"the six"', "a **six**"),
    *(
        "si\u200bx",
        "\u200bsix",
        "six\u200b.",
        "si\u00adx",
        "\ufeffsix",
        "\u2060six",
        "\u202exis",
        "\u200fsix",
        "six\u200e",
    ),
    *("six\u0301", "six\x00", "ѕіх", "ѕix", "sіx", "ｓｉｘ", "\u017fix", "𝐬𝐢𝐱", "ⓢⓘⓧ", "s\u0456x", "6", "VI"),
    *("six。", "six․", "six\uff0e", "ʼsix'", "`six'", "＂six＂", "＊six＊", "sIx\u0307", "s i x", "s_ix"),
    *("", " ", ".", "..", "**", "****", '""', "''", "“”", "_", "'", "*.*", '"."'),
]


@pytest.mark.parametrize("completion", SIX)
@pytest.mark.parametrize("form", ["{}", "<answer>{}</answer>", "<think>nine?</think><answer>{}</answer>"])
def test_marks_around_the_whole_answer_do_not_count(completion, form):
    assert parsing.matches_strictly(form.format(completion), "six")
    assert tagged_answer(form.format(completion)) == ("six" if "<answer>" in form else None)


@pytest.mark.parametrize("completion", NOT_SIX)
@pytest.mark.parametrize("form", ["{}", "<answer>{}</answer>", "<think>nine?</think><answer>{}</answer>"])
def test_nothing_else_is_overlooked(completion, form):
    assert not parsing.matches_strictly(form.format(completion), "six")
    assert tagged_answer(form.format(completion)) != "six"
    assert not parsing.matches_strictly(form.format(completion), "nine")


@pytest.mark.parametrize("stray", [".", "**", '"', "<answer>"])
def test_marks_outside_the_tags_are_words_outside_the_tags(stray):
    assert not parsing.matches_strictly(f"{stray}<answer>six</answer>{stray}", "six")


LABELS = [
    *("St. Bernard", "St.", "Washington D.C.", "etc...", '"Weird Al"', "'67 Mustang", "cat's eye", "rock 'n' roll"),
    *(
        "the beatles",
        "beatles",
        "a",
        "An",
        "a the",
        "the_who",
        "*",
        "C*",
        "**kwargs**",
        ".",
        "...",
        '"',
        "Ägyptian mau",
    ),
    *("Ram C/V Cargo Van Minivan 2012", "“quoted”", "dogs’", "__init__", "x.y.", "c++", "10"),
]


@pytest.mark.parametrize("label", LABELS)
def test_labels_with_marks_of_their_own_are_their_own_answers(label):
    for said in (label, f" {label.upper()} ", f"<answer>{label}</answer>", label.replace("'", "’")):
        assert parsing.matches_strictly(said, label)
    assert not parsing.matches_strictly("", label)
    assert parsing.without_article(parsing.normalize(label), LABELS) == parsing.normalize(label)


def test_labels_with_marks_of_their_own_stay_apart():
    assert len(set(map(parsing.normalize, LABELS))) == len(LABELS)


def test_an_answer_is_read_once_and_for_all():
    """A recorded answer is compared again by confusion tables and accounts: reading it twice must change nothing, and
    what is left out is marks alone, from the ends.
    """
    for length in range(6):
        for characters in product("s.\"'*‘’_", repeat=length):
            text = "".join(characters)
            read = parsing.normalize(text)
            assert parsing.normalize(read) == read
            assert read in " ".join(text.replace("_", " ").replace("’", "'").split())
            assert read.count("s") == text.count("s")


@pytest.mark.parametrize(
    ("answer", "names", "expected"),
    [
        ("a six", ["six", "nine"], "six"),
        ("an ox", ["Ox"], "ox"),
        ("the sea or lake", ["Sea_or_Lake"], "sea or lake"),
        ("the the beatles", ["The Beatles"], "the beatles"),
        ("the beatles", ["The Beatles", "beatles"], "the beatles"),  # a name as it stands
        ("beatles", ["The Beatles"], "beatles"),
        ("a a six", ["six"], "a a six"),
        ("asix", ["six"], "asix"),
        ("athe six", ["six"], "athe six"),
        ("a six or a nine", ["six", "nine"], "a six or a nine"),
        ("a not six", ["six"], "a not six"),
        ("a six", ["nine"], "a six"),
        ("a", ["a", ""], "a"),
        ("some six", ["six"], "some six"),
    ],
)
def test_articles(answer, names, expected):
    assert parsing.without_article(answer, names) == expected
