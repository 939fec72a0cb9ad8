"""Parse the answer of a completion strictly: it must be exactly one answer.

Tags must not repeat or nest, and there must be no text beside them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

LIMIT = 20_000  # characters; longer completions are never a class name, and regular expressions are slow on them
FORMAT = re.compile(r"<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>", re.DOTALL)
ANSWER_FIRST = re.compile(r"<answer>(?P<answer>.*?)</answer>\s*<think>(?P<think>.*?)</think>", re.DOTALL)
THOUGHT = re.compile(r"<think>(?P<think>.*?)</think>", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)
ARTICLE = re.compile(r"(?:an?|the) ")
# Allowed around an answer: Markdown's emphasis, and quotes (typographic apostrophes are replaced before).
PAIRS = (("**", "**"), ("*", "*"), ('"', '"'), ("'", "'"), ("“", "”"), ("‘", "'"), ("„", "“"), ("«", "»"))


def normalize(name: str) -> str:
    """Return the form in which class names and answers are compared.

    Ignored are case, white space and underscores (so `__six__` is six), a typographic apostrophe, and around the whole
    at most one full stop at the end and one pair of quotes or asterisks; look-alike characters still differ. What is
    removed is never a letter, so it hides no second answer. Names and answers are treated alike: a name that ends in a
    full stop equals itself with and without the stop.

    >>> normalize("  Sea_or  Lake "), normalize("**Sea or lake.**"), normalize("‘cat’s eye’")
    ('sea or lake', 'sea or lake', "cat's eye")
    >>> normalize("six.."), normalize('"six'), normalize("St. Bernard")
    ('six..', '"six', 'st. bernard')
    """
    text = unicodedata.normalize("NFC", name).replace("_", " ").replace("’", "'")
    return _bare(" ".join(text.lower().split()))


def _bare(text: str) -> str:
    """Remove the marks around a text; unchanged if there are more than `normalize` allows, or nothing else."""
    core, stops, pairs = text, 0, 0
    while stops < 2 and pairs < 2:
        if core.endswith("."):
            core, stops = core[:-1].rstrip(), stops + 1
        elif inner := _inside(core):
            core, pairs = inner, pairs + 1
        else:
            return core or text
    return text


def _inside(text: str) -> str:
    """Return the text between a pair of marks, or an empty text if there is no pair around it."""
    for opening, closing in PAIRS:
        if text.startswith(opening) and text.endswith(closing):
            return text[len(opening) : -len(closing)].strip()
    return ""


def without_article(answer: str, names: Iterable[str]) -> str:
    """Remove the leading article of a normalised answer if that makes it one of the names; else return it unchanged.

    >>> without_article("a six", ["six"]), without_article("the who", ["The Who", "who"])
    ('six', 'the who')
    >>> without_article("a six or a nine", ["six", "nine"])
    'a six or a nine'
    """
    article = ARTICLE.match(answer)
    if article is None:
        return answer
    known, rest = set(map(normalize, names)), answer[article.end() :]
    return rest if rest in known and answer not in known else answer


def is_strict_format(completion: str) -> bool:
    """Return whether a completion is `<think>…</think><answer>…</answer>` and nothing else (CLS-RL, 3.2).

    Each tag must occur once, and the length is at most LIMIT characters.

    >>> is_strict_format("<think>round</think> <answer>zero</answer>")
    True
    >>> is_strict_format("<think>a</think><answer>zero</answer><answer>one</answer>")
    False
    """
    return _strict_match(completion) is not None


def is_answer_first(completion: str) -> bool:
    """Return whether a completion is `<answer>…</answer><think>…</think>` and nothing else, each tag once.

    >>> is_answer_first("<answer>six</answer> <think>a loop</think>"), is_answer_first("<answer>six</answer>")
    (True, False)
    """
    return _match(ANSWER_FIRST, completion) is not None


def is_bare_answer(completion: str) -> bool:
    """Return whether a completion is `<answer>…</answer>` and nothing else.

    >>> is_bare_answer("<answer>six</answer>"), is_bare_answer("six")
    (True, False)
    """
    return _match(ANSWER, completion, tags=2) is not None


def _match(form: re.Pattern[str], completion: str, tags: int = 4) -> re.Match[str] | None:
    if len(completion) > LIMIT or len(TAG.findall(completion)) != tags:
        return None
    return form.fullmatch(completion.strip())


def _strict_match(completion: str) -> re.Match[str] | None:
    return _match(FORMAT, completion)


def answer_first(completion: str) -> str | None:
    """Return the one answer, normalised, of a completion that reasons after it or not at all; else None.

    >>> answer_first("<answer>Six</answer><think>a loop, so six</think>"), answer_first("<answer>six</answer>")
    ('six', 'six')
    >>> answer_first("<think>a loop</think><answer>six</answer>") is None
    True
    """
    if match := _match(ANSWER_FIRST, completion):
        return normalize(match["answer"])
    return None if is_strict_format(completion) else strict_answer(completion)


def strict_answer(completion: str) -> str | None:
    """Return the one answer of a completion, normalised, or None for none, several, or a text beyond LIMIT.

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


def reasoning_before(completion: str) -> str:
    """Return the text of a strictly formatted completion before its answer, tags included; else an empty text.

    >>> reasoning_before("<think>a loop</think> <answer>six</answer>"), reasoning_before("six")
    ('<think>a loop</think> ', '')
    """
    return completion[: completion.index("<answer>")] if is_strict_format(completion) else ""


def matches_strictly(completion: str, label: str) -> bool:
    """Return whether the one answer, normalised, equals the label.

    >>> matches_strictly("<answer>fox</answer>", "arctic fox")
    False
    """
    return strict_answer(completion) == normalize(label)
