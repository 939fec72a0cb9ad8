"""Names of files as text, whatever the locale says and however a disk spells accents, and what nobody sees in a name.

macOS stores `ö` as `o` and a combining mark (Unicode's form NFD), most others as one letter (NFC). Both are one name:
class names, keys and manifests have it in NFC, and a file is found in whichever form it is stored.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

# Unicode's controls, formats and half letters, and what has no ink although it counts as a letter, mark or symbol:
# joiners of graphemes, fillers of Hangul, vowels of Khmer, an empty cell of Braille, selectors of variants.
UNSEEN = ("Cc", "Cf", "Cs")
INKLESS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]")
# Where some of them belong to what is seen: joiners inside words of Persian or Hindi and inside emoji, the colour of an
# emoji, and the flag of England.
MEANT = re.compile(
    r"(?<=[^\x00-\x7f\s])[\u200c\u200d](?=[^\x00-\x7f\s])"
    r"|(?<=[#*0-9\xa9\xae\u2000-\u3299\U0001f000-\U0001faff])[\ufe0e\ufe0f]"
    r"|(?<=\U0001f3f4)[\U000e0020-\U000e007f]+"
)

URL = re.compile(r"[a-z][a-z\d+.-]+://|data:", re.IGNORECASE)  # how an address begins that is no path


def as_text(name: str) -> str:
    """A name that the file system gave, as text in NFC.

    Raises:
        UnicodeDecodeError: It is not UTF-8, as in old archives.

    >>> as_text("Vo\\u0308gel") == "V\\u00f6gel"
    True
    """
    return name if name.isascii() else composed(os.fsencode(name).decode("utf-8"))


def composed(text: str) -> str:
    """The text in NFC: one letter where a letter and its accent may be two."""
    return unicodedata.normalize("NFC", text)


def invisible(text: str) -> str:
    """The first character of a text that nobody sees, by number and name; empty if all can be seen.

    >>> invisible("c\\u200bat"), invisible("\\u202ac:/cat"), invisible("cat")
    ('U+200B (zero width space)', 'U+202A (left-to-right embedding)', '')
    >>> invisible("\\U0001f469\\u200d\\U0001f373"), invisible("cat\\u200d")  # a joiner where it belongs, and not
    ('', 'U+200D (zero width joiner)')
    """
    hidden = next(filter(_is_unseen, MEANT.sub("", text)), "")
    return f"U+{ord(hidden):04X} ({unicodedata.name(hidden, 'a control character').lower()})" if hidden else ""


def visible(text: str) -> str:
    """The text without all characters that nobody sees; two that are equal then look the same."""
    return "".join(letter for letter in text if not _is_unseen(letter))


def _is_unseen(letter: str) -> bool:
    return unicodedata.category(letter) in UNSEEN or INKLESS.match(letter) is not None


def readable(path: Path) -> str:
    """A path as text in NFC, also where the locale hides the letters of an argument in bytes."""
    return composed(str(path).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape"))


def on_disk(path: Path) -> Path:
    """The path as its disk spells it. A path that does not exist in any form stays as it is given."""
    if str(path).isascii():
        return path
    exact = Path(_stored(str(path)))
    if os.path.exists(exact):  # unlike Path.exists, it takes every path
        return exact
    return next(iter(spellings(path)), exact)


def spellings(path: Path) -> list[Path]:
    """All paths that read as this one, as given if it is ASCII. There may be two: a folder in each form.

    A path of other characters is looked for, and missing if it does not exist.
    """
    if str(path).isascii():
        return [path]
    ways = [Path(path.anchor)]
    for part in path.parts[1:] if path.anchor else path.parts:
        ways = [folder / name for folder in ways for name in _forms(folder, part)]
    return [way for way in ways if os.path.exists(way)]


def _forms(folder: Path, part: str) -> list[str]:
    """The names in a folder that read as `part`."""
    if part.isascii():
        return [part]
    text = part.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    forms = (part, composed(text), unicodedata.normalize("NFD", text))
    names = [name for name in dict.fromkeys(map(_stored, forms)) if os.path.lexists(folder / name)]
    return names or [name for name in _names(folder) if _reads_as(name, composed(text))]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # no folder, or one that may be passed through but not listed
        return []


def _reads_as(name: str, text: str) -> bool:
    return composed(os.fsencode(name).decode("utf-8", "replace")) == text


def _stored(name: str) -> str:
    """Text as the functions of `os` take it: under a locale without UTF-8 they want it byte by byte."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))
