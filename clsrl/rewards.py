"""The rewards of CLS-RL (section 3.2), each computed strictly or as the authors' released code computes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from common.parsing import FORMAT, is_strict_format, matches_strictly
from common.types import Sample

# What the CLS-RL authors' released code accepts as an answer and as a format. Looser than common/parsing.py.
#
# Read in their evaluation scripts (`test_qwen2vl_*.py`) and their training script (`grpo.py`), which differ: evaluation
# searches the answer for the label, the reward compares the two, and an `<answer>` over several lines is only seen by
# evaluation.


ONE_LINE_ANSWER = re.compile(r"<answer>(.*?)</answer>")


def is_official_format(completion: str) -> bool:
    """The full match of the format reward; `.*?` lets tags repeat inside.

    >>> is_official_format("<think>a</think><answer>zero</answer><answer>one</answer>")
    True
    """
    return FORMAT.fullmatch(completion) is not None


def evaluated_answer(completion: str) -> str:
    """What evaluation takes for the answer: the first `<answer>` pair, or the whole reply if that is missing or empty.

    >>> evaluated_answer("<answer>\\nsix\\n</answer> or nine"), evaluated_answer("six <answer></answer>")
    ('six', 'six <answer></answer>')
    """
    _, _, rest = completion.partition("<answer>")
    inside, closing, _ = rest.partition("</answer>")
    return (inside.strip() if closing else "") or completion.strip()


def matches_officially(completion: str, label: str) -> bool:
    """The evaluation's match: the answer is or contains the label, lower-cased; then the label's `_` as blanks.

    The answer keeps its underscores. Labels from a dataset have none (`common.data.names.display`): the second try is
    for other labels, and an answer that writes a blank as `_` does not match.

    >>> matches_officially("arctic fox", "ox"), matches_officially("car side", "car_side")
    (True, True)
    >>> matches_officially("car_side", "car side")
    False
    """
    answer, label = evaluated_answer(completion).lower(), label.lower()
    return label in answer or label.replace("_", " ") in answer


def rewarded_answer(text: str) -> str:
    """What the accuracy reward compares: the first `<answer>` pair on one line, else the whole text.

    >>> rewarded_answer("well <answer> six </answer>"), rewarded_answer("<answer>\\nsix\\n</answer>")
    ('six', '<answer>\\nsix\\n</answer>')
    """
    match = ONE_LINE_ANSWER.search(text)
    return match[1].strip() if match else text.strip()


def is_rewarded(completion: str, label: str) -> bool:
    """The accuracy reward: symbolic verification by `math_verify` first, then lower-cased equality.

    Their data hold the label as `<answer>label</answer>`, and `math_verify` sees it so: it then overlooks a number
    right behind the tag, such as the year that names of cars begin with.
    """
    from math_verify import parse, verify

    if verify(parse(completion), parse(f"<answer>{label}</answer>")):
        return True
    return rewarded_answer(completion).lower() == label.strip().lower()


# The rewards of CLS-RL (section 3.2), each strictly or as the authors' code computes it.
#
# No-Thinking-CLS-RL (section 3.3) has one, `common.rewards.equality`.

Match = Literal["strict", "official"]


def format_reward(samples: Sequence[Sample], *, match: Match = "strict") -> list[float]:
    """1 when the reply is `<think>…</think><answer>…</answer>` (section 3.2, first equation), else 0.

    Args:
        samples: The completions. Length: N.
        match: `strict` (each tag once) or `official` (the authors' full match, which lets tags repeat).
    """
    check = {"strict": is_strict_format, "official": is_official_format}[match]
    return [float(check(s.completion)) for s in samples]


def accuracy_reward(samples: Sequence[Sample], *, match: Match = "strict") -> list[float]:
    """1 when the answer is the label (section 3.2, second equation), else 0.

    Args:
        samples: The completions. Length: N.
        match: `strict` (normalised equality of the one answer) or `official` (the authors' reward: symbolic
            verification by `math_verify` first, which accepts some wrong names, then lower-cased equality of the first
            `<answer>` on one line).
    """
    check = {"strict": matches_strictly, "official": is_rewarded}[match]
    return [float(check(s.completion, s.label)) for s in samples]
