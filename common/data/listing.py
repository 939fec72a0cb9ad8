"""List folders and read text files in the same way on every machine; describe where a dataset lies."""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.config.schema import CONF
from common.data.contents import Contents
from common.types import Item, UserError

# File names as text, whatever the locale and however a disk spells accents; invisible characters in names.
#
# macOS stores `ö` as `o` and a combining mark (Unicode's form NFD), most others as one letter (NFC). Both are the
# same name: class names, keys and manifests have it in NFC, and a file is found in whichever form it is stored.


# Invisible characters: Unicode's controls, formats and surrogates, and others that print nothing although they count as
# a letter, mark or symbol: grapheme joiner, Hangul fillers, Khmer vowels, empty Braille cell, variation selectors.
UNSEEN = ("Cc", "Cf", "Cs")
INKLESS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]")
# Places where such a character belongs to the visible text: joiners inside words of Persian or Hindi and inside emoji,
# the colour of an emoji, and the flag of England.
MEANT = re.compile(
    r"(?<=[^\x00-\x7f\s])[\u200c\u200d](?=[^\x00-\x7f\s])"
    r"|(?<=[#*0-9\xa9\xae\u2000-\u3299\U0001f000-\U0001faff])[\ufe0e\ufe0f]"
    r"|(?<=\U0001f3f4)[\U000e0020-\U000e007f]+"
)

URL = re.compile(r"[a-z][a-z\d+.-]+://|data:", re.IGNORECASE)  # beginning of an address that is not a path


def as_text(name: str) -> str:
    """Return a name from the file system as text in NFC.

    Raises:
        UnicodeDecodeError: The name is not UTF-8, as in old archives.

    >>> as_text("Vo\\u0308gel") == "V\\u00f6gel"
    True
    """
    return name if name.isascii() else composed(os.fsencode(name).decode("utf-8"))


def composed(text: str) -> str:
    """Return the text in NFC, where a letter and its accent are one character."""
    return unicodedata.normalize("NFC", text)


def invisible(text: str) -> str:
    """Return the first invisible character of a text, by number and name; empty if there is none.

    >>> invisible("c\\u200bat"), invisible("\\u202ac:/cat"), invisible("cat")
    ('U+200B (zero width space)', 'U+202A (left-to-right embedding)', '')
    >>> invisible("\\U0001f469\\u200d\\U0001f373"), invisible("cat\\u200d")  # a joiner where it belongs, and not
    ('', 'U+200D (zero width joiner)')
    """
    hidden = next(filter(_is_unseen, MEANT.sub("", text)), "")
    return f"U+{ord(hidden):04X} ({unicodedata.name(hidden, 'a control character').lower()})" if hidden else ""


def visible(text: str) -> str:
    """Return the text without invisible characters; two texts that look the same are then equal."""
    return "".join(letter for letter in text if not _is_unseen(letter))


def _is_unseen(letter: str) -> bool:
    return unicodedata.category(letter) in UNSEEN or INKLESS.match(letter) is not None


def readable(path: Path) -> str:
    """Return a path as text in NFC, also where the locale has turned its letters into surrogates."""
    return composed(str(path).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape"))


def on_disk(path: Path) -> Path:
    """Return the path as its disk spells it; a path that does not exist in any form is returned as given."""
    if str(path).isascii():
        return path
    exact = Path(_stored(str(path)))
    if os.path.exists(exact):  # Path.exists raises an error for some paths
        return exact
    return next(iter(spellings(path)), exact)


def spellings(path: Path) -> list[Path]:
    """Return all existing paths that read like this one: usually one, or two if a folder exists in both forms.

    An ASCII path is returned as given, without looking for it.
    """
    if str(path).isascii():
        return [path]
    ways = [Path(path.anchor)]
    for part in path.parts[1:] if path.anchor else path.parts:
        ways = [folder / name for folder in ways for name in _forms(folder, part)]
    return [way for way in ways if os.path.exists(way)]


def _forms(folder: Path, part: str) -> list[str]:
    """Return the names in a folder that read as `part`."""
    if part.isascii():
        return [part]
    text = part.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    forms = (part, composed(text), unicodedata.normalize("NFD", text))
    names = [name for name in dict.fromkeys(map(_stored, forms)) if os.path.lexists(folder / name)]
    return names or [name for name in _names(folder) if _reads_as(name, composed(text))]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # not a folder, or one without permission to list it
        return []


def _reads_as(name: str, text: str) -> bool:
    return composed(os.fsencode(name).decode("utf-8", "replace")) == text


def _stored(name: str) -> str:
    """Return text as functions of `os` need it: under a locale without UTF-8, every byte is a surrogate."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


# Files that photo servers, archives and file managers leave beside images. No reader takes them for data.

# Whole names in lower case. Some are folders of reduced copies of the images beside them, under the same names.
LITTER = frozenset(
    (
        *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", ".@__thumb"),  # Synology, QNAP
        *("__macosx", ".ds_store", ".trashes", ".fseventsd", ".spotlight-v100", "icon\r"),  # macOS
        *("network trash folder", "temporary items", ".temporaryitems", ".appledouble"),
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
        *("$recycle.bin", "system volume information"),
        *(".thumbnails", ".directory", "lost+found"),  # Linux
        *("picasa.ini", ".picasa.ini", ".picasaoriginals", "zbthumbnail.info"),
        *("__pycache__", ".ipynb_checkpoints"),
    )
)
APPLE_DOUBLE = "._"  # prefix of files in which macOS keeps what other file systems cannot store


def litter_reason(name: str) -> str | None:
    """Return why a file or folder of this name is passed over; None for one that may be data.

    >>> [litter_reason(name) for name in ("@eaDir", "._cat.jpg", "Thumbs.db", ".git", "cat.jpg")]
    ['litter', 'litter', 'litter', 'hidden', None]
    """
    if name.lower() in LITTER or name.startswith(APPLE_DOUBLE):
        return "litter"
    return "hidden" if name.startswith(".") else None


def litter_summary(reasons: Iterable[str]) -> dict[str, int]:
    """Count how often each reason occurs.

    >>> litter_summary(["litter", "hidden", "litter"])
    {'hidden': 1, 'litter': 2}
    """
    counts: dict[str, int] = {}
    for one in sorted(reasons):
        counts[one] = counts.get(one, 0) + 1
    return counts


def litter_worded(passed_over: Mapping[str, int]) -> str:
    """Return the counts of `litter_summary` as text.

    >>> litter_worded({"hidden": 1, "litter": 2})
    '1 hidden, 2 litter'
    """
    return ", ".join(f"{count:,} {why}" for why, count in passed_over.items())


# Folders and text files of a dataset: sorted, names in NFC, without hidden entries and litter.

MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class Listing:
    """Names in a folder, in code point order (upper case first). A link counts as what it leads to."""

    folders: list[str]
    files: list[str]


def scan(location: Location, folder: Path) -> Listing:
    """List `folder`, or all folders of its name if it exists in NFC and in NFD; the location notes what is passed over.

    Raises:
        UserError: The folder cannot be listed, or a name is not UTF-8 or occurs twice.
    """
    kinds: dict[str, list[str]] = {"folder": [], "file": []}
    for way in spellings(folder) or [on_disk(folder)]:
        for name, kind in _entries(location, way):
            if kind in kinds:
                kinds[kind].append(name)
            else:
                location.pass_over(folder / name, kind)
    if twice := [name for name, count in Counter(kinds["file"]).items() if count > 1]:
        raise location.error(
            f"{folder / twice[0]} is two files, whose names differ in how accents are stored; rename one"
        )
    return Listing(sorted(set(kinds["folder"])), sorted(kinds["file"]))


def subfolders(location: Location, folder: Path) -> list[str]:
    """Return the names of the folders in `folder` (see `scan`)."""
    return scan(location, folder).folders


def files(location: Location, folder: Path) -> list[str]:
    """Return the names of the files in `folder` (see `scan`)."""
    return scan(location, folder).files


def collect(location: Location, folder: Path, key: str, classes: Iterable[tuple[str, int, str]]) -> list[Item]:
    """Return the images of class folders, class by class.

    Args:
        location: Location of the dataset, for error messages.
        folder: Folder that holds the class folders.
        key: Key of `folder`.
        classes: Class folder, label and name of every class.
    """
    items: list[Item] = []
    for subfolder, label, name in classes:
        start = f"{key}/{subfolder}/"
        items += [Item(start + file, label, name) for file in files(location, folder / subfolder)]
    return items


def text(location: Location, path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: The file cannot be read or is something else.
    """
    try:
        content = on_disk(path).read_bytes()
    except OSError as error:
        raise location.error(f"{path} cannot be read ({error.strerror})") from error
    if wide(content):
        raise location.error(f"{path} is not a text file in UTF-8: {_advice(content)}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise location.error(f"{path} is not a text file in UTF-8 ({error}): {_advice(content)}") from error


def _advice(content: bytes) -> str:
    if content.startswith(ZIP):
        return "it is a zip archive or a spreadsheet; unpack it, or save the table as CSV in UTF-8"
    encoding = wide(content)
    start = "" if encoding else "if it was written on Windows, "
    return f"{start}convert it with `iconv -f {encoding or 'windows-1252'} -t utf-8 <file> > <new file>`"


def wide(content: bytes) -> str | None:
    """Return the encoding of UTF-16 or UTF-32 text, by its byte order mark or its zero bytes; None for other text.

    >>> [wide("path,label".encode(encoding)) for encoding in ("utf-16", "utf-16-be", "utf-32", "utf-32-le", "utf-8")]
    ['utf-16', 'utf-16be', 'utf-32', 'utf-32le', None]
    """
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return encoding
    # without a mark: ASCII letters in UTF-16 have a zero in every other byte
    if 4 * content.count(0) < len(content) or not content:
        return None
    size = "32" if 2 * content.count(0) > len(content) else "16"  # of four bytes, Latin letters leave three empty
    return f"utf-{size}{'be' if content[0] == 0 else 'le'}"


def lines(location: Location, path: Path) -> list[tuple[str, str]]:
    """Return the lines that are not blank, stripped; before each its place for error messages (`file, line 3`)."""
    stripped = (line.strip() for line in text(location, path).splitlines())
    return [(f"{path}, line {number}", line) for number, line in enumerate(stripped, start=1) if line]


def fields(location: Location, line: tuple[str, str], shape: str) -> list[str]:
    """Split a line of `lines` at blanks into as many fields as `shape` has; the last one keeps its blanks.

    Raises:
        UserError: The line has fewer fields.
    """
    where, content = line
    count = len(shape.split())
    values = content.split(maxsplit=count - 1)
    if len(values) < count:
        raise location.error(f"{where}: '{content}' is not of the form '{shape}'")
    return values


def number(location: Location, where: str, value: str) -> int:
    """Parse an integer from a text file.

    Raises:
        UserError: The value is not an integer.
    """
    try:
        return int(value)
    except ValueError:
        raise location.error(f"{where}: '{value}' is not a whole number") from None


def _entries(location: Location, folder: Path) -> list[tuple[str, str]]:
    """Return the name of every entry, with `folder`, `file` or the reason why it is passed over."""
    # os.scandir tells files from folders without a call for each: ImageNet's 1.3 million take seconds.
    try:
        with os.scandir(folder) as entries:
            return [
                (name := _name(location, folder, entry.name), litter_reason(name) or _kind(entry)) for entry in entries
            ]
    except OSError as error:
        raise location.error(f"{folder} cannot be listed ({error.strerror})") from error


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
    except OSError:  # links in a circle, or into a folder that may not be entered
        return "broken link"
    return "broken link" if entry.is_symlink() else "no file"


def _name(location: Location, folder: Path, name: str) -> str:
    """Return a name as text; one that is not UTF-8 could not be written into a prompt or a result.

    Raises:
        UserError: The name is not UTF-8, as in old archives.
    """
    try:
        return as_text(name)
    except UnicodeDecodeError:
        raise location.error(
            f"{folder} has the name {name!a}, which is not UTF-8; rename it (convmv -f latin1 -t utf8)"
        ) from None


def documentation(name: str) -> str:
    """Return where a dataset is documented. `name`: value of `data.name`; a user's own dataset has no section."""
    return f"docs/datasets.md#{name}" if (CONF / "data" / f"{name}.yaml").is_file() else "docs/datasets.md"


@dataclass(frozen=True)
class Location:
    """Location of a dataset on this machine.

    Args: name: Name of the dataset; its section in docs/datasets.md, and the first part of its images' keys.
    root: The folder of all datasets (CoOp's `$DATA`).
    folder: The folder of this dataset.
    allow_fallback_split: Allow a split of our own if the split file is missing.
    only_test: Training images are not needed; a reader may skip listing them to save time.
    tried: All paths where the dataset was looked for, if there are several.
    passed_over: Reason for every path that readers passed over so far.
    notes: Sentences in which readers say how they interpreted the files.
    background: Colour behind transparent parts of the images.
    contents: Cache of file hashes.
    """

    name: str
    root: Path
    folder: Path
    allow_fallback_split: bool = False
    only_test: bool = False
    tried: tuple[Path, ...] = ()
    passed_over: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    notes: list[str] = field(default_factory=list, compare=False, repr=False)
    background: str = "white"
    contents: Contents = field(default_factory=Contents, compare=False, repr=False)

    @property
    def section(self) -> str:
        return documentation(self.name)

    def need(self, relative: str) -> Path:
        """Return the path of a file or folder of the dataset.

        Raises:
            UserError: It does not exist.
        """
        if not _is_there(self.folder) and len(self.tried) > 1:
            paths = " nor ".join(map(str, self.tried))
            raise UserError(
                f"data={self.name}: neither {paths} exists{_hidden(paths)}; {self.section} says what belongs there"
            )
        for path in (self.folder, self.folder / relative):
            if not _is_there(path):
                raise UserError(
                    f"data={self.name}: {path} does not exist{_hidden(str(path))}; {self.section} says what belongs"
                    " there"
                )
        return self.folder / relative

    def key(self, relative: str) -> str:
        """Return the key of an image, from its path inside the folder (with `/`), in NFC."""
        return composed(f"{self.name}/{relative}")

    def pass_over(self, path: Path, why: str) -> None:
        """Note a path that is passed over. A folder counts once, and so does a path that is listed twice."""
        self.passed_over[str(path)] = why

    def error(self, what: str) -> UserError:
        """Return an error about the dataset's files."""
        return UserError(f"data={self.name}: {what}; see {self.section}")


def _hidden(path: str) -> str:
    """Return a note on an invisible character in a path, as copied from a web page or a dialog of Windows."""
    return f" (the path has the invisible character {character})" if (character := invisible(path)) else ""


def _is_there(path: Path) -> bool:
    return os.path.exists(on_disk(path))  # Path.exists raises an error for some paths
