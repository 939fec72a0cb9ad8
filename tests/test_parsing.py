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
