"""ALERT's rewards that need no judge (section 3.5; weights in section 4.1.2).

Strict format and accuracy are those of common/rewards.py in their strict form; the judge's is in alert/judge.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.parsing import LIMIT
from common.types import Sample


def soft_format(samples: Sequence[Sample]) -> list[float]:
    """1 when the completion "at least partially aligns with the reasoning format" (section 3.5), else 0.

    The paper gives no rule; ours: somewhere a complete `<think>…</think>`, and somewhere after it a complete
    `<answer>…</answer>` that is not empty. Whatever stands before, between and after, and further tags, do not matter.
    So a strictly formatted completion with an answer earns both, an answer-less one only the strict reward.

    >>> from common.types import Prompt
    >>> texts = ("Sure! <think>a</think> So: <answer>six</answer>.", "<answer>six</answer>", "<think>a</think> six")
    >>> soft_format([Sample(Prompt("0", "?", "six"), text) for text in texts])
    [1.0, 0.0, 0.0]
    """
    return [float(is_soft_format(sample.completion)) for sample in samples]


def is_soft_format(completion: str) -> bool:
    """A complete thought, and after it a complete answer with content.

    >>> is_soft_format("<think>a</think><answer> </answer>")
    False
    """
    if len(completion) > LIMIT:
        return False
    _, thinks, rest = completion.partition("<think>")
    _, thought, rest = rest.partition("</think>")
    _, answers, rest = rest.partition("<answer>")
    answer, answered, _ = rest.partition("</answer>")
    return all((thinks, thought, answers, answered, answer.strip()))
