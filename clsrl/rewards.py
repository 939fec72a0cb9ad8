"""The rewards of CLS-RL (section 3.2), each strictly or as the authors' code computes it.

No-Thinking-CLS-RL (section 3.3) has one, `common.rewards.equality`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from clsrl.matching import is_official_format, is_rewarded
from common.parsing import is_strict_format, matches_strictly
from common.types import Sample

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
