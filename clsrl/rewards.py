"""Rewards of CLS-RL (section 3.2), each computed strictly or like the authors' released code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from common.parsing import (
    FORMAT,
    answer_first,
    is_answer_first,
    is_bare_answer,
    is_strict_format,
    matches_strictly,
    normalize,
)
from common.types import Sample, UserError

# Answers and formats that the authors' code accepts; looser than common/parsing.py. Their evaluation scripts
# (`test_qwen2vl_*.py`) and their training script (`grpo.py`) differ: evaluation searches for the label in the answer,
# the reward compares the two, and only evaluation finds an `<answer>` over several lines.

ONE_LINE_ANSWER = re.compile(r"<answer>(.*?)</answer>")


def is_official_format(completion: str) -> bool:
    """Return whether the format reward's full match succeeds; `.*?` lets tags repeat inside.

    >>> is_official_format("<think>a</think><answer>zero</answer><answer>one</answer>")
    True
    """
    return FORMAT.fullmatch(completion) is not None


def evaluated_answer(completion: str) -> str:
    """Return the answer by the authors' evaluation: the first `<answer>` pair, or without one the whole reply.

    >>> evaluated_answer("<answer>\\nsix\\n</answer> or nine"), evaluated_answer("six <answer></answer>")
    ('six', 'six <answer></answer>')
    """
    _, _, rest = completion.partition("<answer>")
    inside, closing, _ = rest.partition("</answer>")
    return (inside.strip() if closing else "") or completion.strip()


def matches_officially(completion: str, label: str) -> bool:
    """Return the evaluation's match: the answer is or contains the label, lower-cased; then the label's `_` as blanks.

    The answer keeps its underscores. Labels from a dataset have none (`common.data.names.display`), so the second
    comparison is for other labels, and an answer with `_` for a blank does not match.

    >>> matches_officially("arctic fox", "ox"), matches_officially("car side", "car_side")
    (True, True)
    >>> matches_officially("car_side", "car side")
    False
    """
    answer, label = evaluated_answer(completion).lower(), label.lower()
    return label in answer or label.replace("_", " ") in answer


def rewarded_answer(text: str) -> str:
    """Return the text that the accuracy reward compares: the first `<answer>` pair on one line, else the whole text.

    >>> rewarded_answer("well <answer> six </answer>"), rewarded_answer("<answer>\\nsix\\n</answer>")
    ('six', '<answer>\\nsix\\n</answer>')
    """
    match = ONE_LINE_ANSWER.search(text)
    return match[1].strip() if match else text.strip()


def is_rewarded(completion: str, label: str) -> bool:
    """Return the accuracy reward: symbolic verification by `math_verify` first, then lower-cased equality.

    The authors' data hold the label as `<answer>label</answer>`, and `math_verify` gets it in this form: it then
    ignores a number right after the tag, such as the year at the beginning of car names.
    """
    from math_verify import parse, verify

    if verify(parse(completion), parse(f"<answer>{label}</answer>")):
        return True
    return rewarded_answer(completion).lower() == label.strip().lower()


# The rewards of CLS-RL. No-Thinking-CLS-RL (section 3.3) has a single one, `common.rewards.equality`.

Match = Literal["strict", "official"]
Form = Literal["think_first", "answer_first", "either"]


def has_form(completion: str, form: Form) -> bool:
    """Return whether a completion is exactly in a form.

    `think_first`: `<think>…</think><answer>…</answer>`. `answer_first`: the other way round. `either`: think first, or
    `<answer>…</answer>` alone.

    >>> [has_form("<answer>six</answer>", form) for form in ("think_first", "answer_first", "either")]
    [False, False, True]
    """
    if form == "answer_first":
        return is_answer_first(completion)
    return is_strict_format(completion) or (form == "either" and is_bare_answer(completion))


def format_reward(samples: Sequence[Sample], *, match: Match = "strict", form: Form = "think_first") -> list[float]:
    """Return 1 when the reply is `<think>…</think><answer>…</answer>` (section 3.2, first equation), else 0.

    Args:
        samples: Completions to score. Length: N.
        match: `strict` (each tag once) or `official` (the authors' full match, which lets tags repeat).
        form: What the reply must be, see `has_form`.

    Raises:
        UserError: `match=official` with another form than `think_first`, for which the authors' code has no rule.
    """
    if match == "official":
        if form != "think_first":
            raise UserError(f"rewards.format.match=official: the authors' code has no rule for form={form}; use strict")
        return [float(is_official_format(s.completion)) for s in samples]
    return [float(has_form(s.completion, form)) for s in samples]


def first_answer_reward(samples: Sequence[Sample]) -> list[float]:
    """Return 1 when the answer is the label and no thoughts stand before it, else 0. Args: see `accuracy_reward`."""
    return [float(answer_first(s.completion) == normalize(s.label)) for s in samples]


def accuracy_reward(samples: Sequence[Sample], *, match: Match = "strict") -> list[float]:
    """Return 1 when the answer is the label (section 3.2, second equation), else 0.

    Args:
        samples: Completions to score. Length: N.
        match: `strict` (normalised equality of the one answer) or `official` (the authors' reward: symbolic
            verification by `math_verify` first, which accepts some wrong names, then lower-cased equality of the first
            `<answer>` on one line).
    """
    check = {"strict": matches_strictly, "official": is_rewarded}[match]
    return [float(check(s.completion, s.label)) for s in samples]
