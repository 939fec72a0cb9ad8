"""Answers, strictly and officially."""

from __future__ import annotations

import pytest

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
    assert parsing.tagged_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "label", "strict", "official"),
    [
        ("six", "six", True, True),
        ("It is six.", "six", False, True),  # the whole reply is searched when there is no tag
        ("zero, one, two, six", "six", False, True),  # listing all classes scores officially
        ("arctic fox", "ox", False, True),
        ("car side", "car_side", True, True),  # second try with '_' as space
        ("<answer>nine</answer> six", "six", False, False),  # only the tag counts
        ("", "six", False, False),
    ],
)
def test_strict_and_official_match(completion, label, strict, official):
    assert parsing.matches_strictly(completion, label) is strict
    assert parsing.matches_officially(completion, label) is official
