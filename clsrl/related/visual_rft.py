"""Visual-RFT (Liu et al. 2025, arXiv 2503.01785): think, then name the class, without a list; substrings count.

Its accuracy reward accepts an answer that contains the label, and one that the label contains: an empty answer earns as
much as the right one, and so does a list of all names. `python -m common.report audit <run>` shows it. `match=strict`
closes the hole; the evaluation reports both.
"""

from __future__ import annotations

from collections.abc import Sequence

from clsrl.prompting import ClassListPrompt
from clsrl.rewards import Match, accuracy_reward, rewarded_answer
from common.types import Sample


def contains_either_way(completion: str, label: str) -> bool:
    """Return whether the answer contains the label or the label the answer, without blanks, underscores and case.

    The answer is the first `<answer>` pair on one line, else the whole reply, as in the authors' reward and evaluation.

    >>> contains_either_way("<answer>Arctic_Fox</answer>", "arctic fox"), contains_either_way("a fox or an owl", "owl")
    (True, True)
    >>> contains_either_way("<answer></answer>", "owl"), contains_either_way("<answer>fox</answer>", "arctic fox")
    (True, True)
    """
    answer, name = (_joined(text) for text in (rewarded_answer(completion), label))
    return name in answer or answer in name


def _joined(text: str) -> str:
    return text.replace(" ", "").replace("_", "").lower()


class VisualRFTPrompt(ClassListPrompt):
    """Prompting without a list, whose official matching is the authors' two-way substring."""

    def matches_officially(self, completion: str, label: str) -> bool:
        return contains_either_way(completion, label)


def accuracy(samples: Sequence[Sample], *, match: Match = "official") -> list[float]:
    """Return 1 when the answer is the label, else 0.

    Args:
        samples: Completions to score. Length: N.
        match: `official`: symbolic verification by `math_verify` first, then `contains_either_way`. `strict`:
            normalised equality of the one answer.
    """
    if match == "strict":
        return accuracy_reward(samples, match="strict")
    from math_verify import parse, verify

    return [
        float(
            bool(verify(parse(s.completion), parse(f"<answer>{s.label}</answer>")))
            or contains_either_way(s.completion, s.label)
        )
        for s in samples
    ]
