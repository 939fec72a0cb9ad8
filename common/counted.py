"""Numbers with their nouns in messages: one of a thing has no plural."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number and its noun, with a comma at the thousands.

    >>> counted(1, "class"), counted(2000, "class"), counted(0, "picture"), counted(3, "category"), counted(2, "day")
    ('1 class', '2,000 classes', '0 pictures', '3 categories', '2 days')
    """
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """The regular plural, of the last word.

    >>> plural("test image"), plural("class"), plural("batch"), plural("box"), plural("copy")
    ('test images', 'classes', 'batches', 'boxes', 'copies')
    """
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def is_or_are(number: int) -> str:
    """The verb to a number.

    >>> is_or_are(1), is_or_are(0)
    ('is', 'are')
    """
    return "is" if number == 1 else "are"
