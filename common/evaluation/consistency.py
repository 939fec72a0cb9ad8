"""Compare the name that a reply's reasoning concludes with the name that it answers.

Where the two disagree, CLS-RL's authors found the accuracy below the average (arXiv 2503.16188, version 6). No torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from common.parsing import ANSWER_FIRST, FORMAT, normalize

CLAUSE_END = re.compile(r"[.:;!?]|,(?! (?:which|who|whose|that)\b)|\bbut\b")  # a relative clause belongs to its noun
DENIAL = re.compile(
    r"\b(?:not|no|nor|neither|never|cannot|unlike|without|differ\w*|(?:rather|other) than|instead of)\b|n['’]t\b"
)


def reasoning_agrees(think: str, answer: str, candidates: Sequence[str]) -> bool | None:
    """Return whether the answer is what the reasoning concludes: the last candidate it names without denying it.

    The rule is our choice. Names count as whole words, and a name inside a longer candidate's name does not. A name is
    denied by a word like "not" or "unlike" before it in the same clause: contrasts often end with what the image is
    not. Only words are compared: "foxes" names nothing, and "it can hardly be a fox" names the fox. It serves as a
    statistic, not as a reward.

    Args:
        think: Text of the reasoning.
        answer: Final answer.
        candidates: Names that the prompt offered.

    Returns:
        None if the reasoning names no candidate, or denies all that it names.

    >>> reasoning_agrees("Not a fox: the tusks say elephant.", "elephant", ("fox", "elephant", "ant"))
    True
    >>> reasoning_agrees("White as an arctic fox, but it is not a fox.", "arctic fox", ("fox", "arctic fox"))
    True
    >>> reasoning_agrees("It is an arctic fox.", "fox", ("fox", "arctic fox"))
    False
    >>> reasoning_agrees("It is white.", "fox", ("fox", "arctic fox")) is None
    True
    """
    conclusion = _last_mentioned(normalize(think), {normalize(name) for name in candidates} - {""})
    return None if conclusion is None else conclusion == normalize(answer)


def agrees(reply: str, answer: str, candidates: Sequence[str]) -> bool | None:
    """Return `reasoning_agrees` for a whole reply, whatever comes first; None also without a reasoning."""
    thought = thoughts(reply)
    return None if thought is None else reasoning_agrees(thought, answer, candidates)


def thoughts(reply: str) -> str | None:
    """Return the thoughts of a reply that has thoughts and an answer, in either order; else None."""
    found = FORMAT.search(reply) or ANSWER_FIRST.search(reply)
    return found["think"] if found else None


def _last_mentioned(text: str, names: set[str]) -> str | None:
    """Return the name that ends last in the text without being denied.

    Longer names are searched first and then blanked out, so that shorter names inside them do not count.
    """
    end, last = -1, None
    for name in sorted(names, key=lambda name: (-len(name), name)):
        whole_word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
        ends = [match.end() for match in whole_word.finditer(text) if not _is_denied(text[: match.start()])]
        if ends and ends[-1] > end:
            end, last = ends[-1], name
        text = whole_word.sub("\0" * len(name), text)  # of equal length, so that later ends can be compared
    return last


def _is_denied(before: str) -> bool:
    """Return whether the last clause of a text denies what follows it."""
    return DENIAL.search(CLAUSE_END.split(before)[-1]) is not None


def agreement(verdicts: Sequence[bool | None], malformed: int) -> dict[str, int]:
    """Count how often reasoning and answer agree: numbers of images.

    Args:
        verdicts: Result of `reasoning_agrees` for every image with a reasoning.
        malformed: Number of images whose completion has no reasoning before an answer.

    >>> agreement([True, None, False, True], malformed=2)
    {'agree': 2, 'differ': 1, 'reasoning_names_none': 1, 'malformed': 2}
    """
    counts = Counter(verdicts)
    return {
        "agree": counts[True],
        "differ": counts[False],
        "reasoning_names_none": counts[None],
        "malformed": malformed,
    }
