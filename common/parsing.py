"""Reading an answer out of a completion, strictly and as the CLS-RL authors' code does.

Strict (`protocol=clean`): the completion must be exactly one answer. Tags must not repeat or nest, and nothing may
stand beside them. Official: the first `<answer>` wins, whatever else was said, and a substring of it is enough.
"""

from __future__ import annotations

import re
import unicodedata

LIMIT = 20_000  # characters; a longer completion is never a class name, and regular expressions should not chew on it
FORMAT = re.compile(r"<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)


def normalize(name: str) -> str:
    """Case, white space and underscores do not distinguish class names; look-alike characters do.

    >>> normalize("  Sea_or  Lake ")
    'sea or lake'
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").lower().split())


def is_strict_format(completion: str) -> bool:
    """`<think>…</think><answer>…</answer>` and nothing else, each tag once (CLS-RL section 3.2).

    >>> is_strict_format("<think>round</think> <answer>zero</answer>")
    True
    >>> is_strict_format("<think>a</think><answer>zero</answer><answer>one</answer>")
    False
    """
    return _strict_match(completion) is not None


def _strict_match(completion: str) -> re.Match[str] | None:
    if len(completion) > LIMIT or len(TAG.findall(completion)) != 4:
        return None
    return FORMAT.fullmatch(completion.strip())


def is_official_format(completion: str) -> bool:
    """The authors' full match; `.*?` lets tags repeat inside.

    >>> is_official_format("<think>a</think><answer>zero</answer><answer>one</answer>")
    True
    """
    return FORMAT.fullmatch(completion) is not None


def strict_answer(completion: str) -> str | None:
    """The one answer that a completion gives, or None when it gives none or several.

    With tags, the completion must contain exactly one `<answer>…</answer>` and end with it; without any tag it is the
    answer itself.

    >>> strict_answer("<think>a loop</think><answer> Six</answer>")
    'six'
    >>> strict_answer("Six")
    'six'
    >>> strict_answer("<answer>six</answer> or <answer>nine</answer>") is None
    True
    """
    if len(completion) > LIMIT:
        return None
    tags = [tag.lower() for tag in TAG.findall(completion)]
    if not tags:
        return normalize(completion)
    if tags == ["<think>", "</think>", "<answer>", "</answer>"]:
        match = _strict_match(completion)
        return normalize(match["answer"]) if match else None
    if tags == ["<answer>", "</answer>"]:
        match = ANSWER.fullmatch(completion.strip())
        return normalize(match[1]) if match else None
    return None


def tagged_answer(completion: str) -> str | None:
    """The one answer in tags, whatever stands around it (ALERT section 3.5: "the label enclosed within"), or None.

    There must be one `<answer>…</answer>` and no tag after it or in it; an answer given while thinking is none.

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


def reasoning_before(completion: str) -> str:
    """What a strictly formatted completion says before its answer, tags included; nothing if it is not.

    >>> reasoning_before("<think>a loop</think> <answer>six</answer>"), reasoning_before("six")
    ('<think>a loop</think> ', '')
    """
    return completion[: completion.index("<answer>")] if is_strict_format(completion) else ""


def first_answer(completion: str) -> str:
    """The authors' extraction: the first `<answer>` pair, else the whole completion.

    >>> first_answer("well <answer>six</answer> or <answer>nine</answer>")
    'six'
    """
    match = ANSWER.search(completion)
    return match[1].strip() if match else completion.strip()


def matches_strictly(completion: str, label: str) -> bool:
    """Normalised equality of the one answer with the label.

    >>> matches_strictly("<answer>fox</answer>", "arctic fox")
    False
    """
    return strict_answer(completion) == normalize(label)


def matches_officially(completion: str, label: str) -> bool:
    """The authors' evaluation: label equal to or contained in the answer, lower-cased; a second try with `_` as space.

    >>> matches_officially("arctic fox", "ox")
    True
    """
    answer, label = first_answer(completion).lower(), label.lower()
    return label in answer or label.replace("_", " ") in answer.replace("_", " ")
