"""Rewards of ALERT that need no judge (section 3.5; weights in section 4.1.2).

The strict format is in common/rewards.py; the judge's reward is in alert/contrastive.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.parsing import ANSWER, LIMIT, TAG, normalize
from common.types import Sample


def soft_format(samples: Sequence[Sample]) -> list[float]:
    """Return 1 when the completion "at least partially aligns with the reasoning format" (section 3.5), else 0.

    The paper gives no rule; ours: somewhere a complete `<think>…</think>`, and somewhere after it a complete
    `<answer>…</answer>` that is not empty. Other text and further tags do not matter. So a strictly formatted
    completion with an answer earns both format rewards, one with an empty answer only the strict reward.

    >>> from common.types import Prompt
    >>> texts = ("Sure! <think>a</think> So: <answer>six</answer>.", "<answer>six</answer>", "<think>a</think> six")
    >>> soft_format([Sample(Prompt("0", "?", "six"), text) for text in texts])
    [1.0, 0.0, 0.0]
    """
    return [float(is_soft_format(sample.completion)) for sample in samples]


def is_soft_format(completion: str) -> bool:
    """Return whether there is a complete thought, and after it a complete answer with content.

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


def tagged_accuracy(samples: Sequence[Sample]) -> list[float]:
    """Return 1 when the one answer in tags is the label, up to case, blanks and underscores (section 3.5), else 0.

    >>> from common.types import Prompt
    >>> texts = ("<think>a</think> So: <answer>Six</answer>.", "six")
    >>> tagged_accuracy([Sample(Prompt("0", "?", "six"), text) for text in texts])
    [1.0, 0.0]
    """
    return [float(tagged_answer(sample.completion) == normalize(sample.label)) for sample in samples]


def tagged_answer(completion: str) -> str | None:
    """Return the one answer in tags, whatever is around it (section 3.5: "the label enclosed within"), or None.

    There must be one `<answer>…</answer>` and no tag after it or in it; an answer inside the thinking does not count.

    >>> tagged_answer("Sure! <think>a loop</think> So: <answer> Six</answer>."), tagged_answer("six")
    ('six', None)
    >>> tagged_answer("<answer>six</answer> or <answer>nine</answer>") is None
    True
    """
    if len(completion) > LIMIT:
        return None
    tags = [tag.lower() for tag in TAG.findall(completion)]
    if tags[-2:] != ["<answer>", "</answer>"] or tags.count("<answer>") != 1:
        return None
    match = ANSWER.search(completion)
    return normalize(match[1]) if match else None
