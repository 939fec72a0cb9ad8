"""Format numbers with their nouns, in singular or plural, for messages."""

from __future__ import annotations


def counted(number: int | str, noun: str) -> str:
    """Return a number (or `all`) with its noun, with commas between thousands.

    >>> counted(1, "class"), counted(2000, "class"), counted(0, "picture"), counted("all", "shot")
    ('1 class', '2,000 classes', '0 pictures', 'all shots')
    """
    return f"{number if isinstance(number, str) else f'{number:,}'} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Return the regular plural of the last word.

    >>> plural("test image"), plural("class"), plural("batch"), plural("box"), plural("copy"), plural("day")
    ('test images', 'classes', 'batches', 'boxes', 'copies', 'days')
    """
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def agree(number: int, one: str, many: str) -> str:
    """Return the form of a word that agrees with a number.

    >>> agree(1, "is", "are"), agree(0, "is", "are")
    ('is', 'are')
    """
    return one if number == 1 else many
