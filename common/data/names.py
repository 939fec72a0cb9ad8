"""Class names: how they are shown, aliases for them, and the two files about ImageNet's names.

`python -m common.data.names classnames <file>` writes ImageNet's `classnames.txt` in the format of the CoOp datasets,
`python -m common.data.names aliases <file>` aliases of ImageNet's names, for `data.aliases=<file>`. Both come from
installed packages: WordNet's ids and synonyms from timm, the names that CLIP uses from open_clip (MIT).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

from common.data import wordnet
from common.data.listing import composed, invisible, visible
from common.parsing import TAG, normalize
from common.runtime import process
from common.runtime.progress import SOON, watched
from common.types import CATEGORY, UserError

# Names that exports give to folders of unlabelled images, in lower case, without blanks and punctuation.
UNLABELLED = frozenset(
    (
        *("nolabel", "nolabels", "unlabeled", "unlabelled", "notlabeled", "notlabelled", "unannotated", "unassigned"),
        *("untagged", "unclassified", "unsorted", "uncategorized", "uncategorised", "undefined", "unspecified"),
        *("unknown", "background", "backgroundgoogle", "none", "null", "nan", "na", "ignore"),
    )
)
CODE = re.compile(r"(?:(?:class|label|category|type|group|cluster|id)[ _.#-]*|[a-z]{0,2}_?)\d[\da-f]*", re.IGNORECASE)


def display(raw: str) -> str:
    """Return a class name as it is shown: underscores become blanks, runs of blanks one, accents composed (NFC).

    >>> display(" car_side ")
    'car side'
    """
    return " ".join(composed(raw).replace("_", " ").split())


def objections(names: Iterable[str]) -> Iterator[str]:
    """Yield half a sentence for every name that cannot be an answer (see `objection`) or equals another one."""
    known: dict[str, str] = {}
    for name in names:
        if why := objection(name):
            yield f"class '{visible(name)}' {why}; rename it"
            continue
        key = normalize(visible(name))
        if key in known:
            yield f"classes '{known[key]}' and '{name}' are one answer; give them other names"
        known.setdefault(key, name)


def objection(name: str) -> str:
    """Return why a name cannot be an answer; empty if it can.

    >>> objection("</Answer>"), objection("c\\u00adat")
    ("has '</Answer>', a part of the form of replies", 'has the invisible character U+00AD (soft hyphen)')
    >>> objection("_"), objection("cat <3")
    ('has no letter', '')
    """
    if tag := TAG.search(name):
        return f"has '{tag[0]}', a part of the form of replies"
    if CATEGORY in name.lower():
        return f"has '{CATEGORY}', which marks the place of an embedding"
    if character := invisible(name):
        return f"has the invisible character {character}"
    return "" if normalize(name) else "has no letter"


def remarks(names: Sequence[str]) -> Iterator[str]:
    """Yield a warning for class names that are valid but say little about the class; each is a sentence.

    >>> list(remarks(["_background_", "cat", "dog"]))
    ["warning: '_background_' seems to hold what has no label; move it away if it is no class"]
    >>> list(remarks(["c0", "c1", "dog"]))[0][:57]
    "warning: 2 of 3 class names look like codes, first 'c0': "
    """
    for name in names:
        if re.sub(r"[\W_]+", "", name.lower()) in UNLABELLED:
            yield f"warning: '{name}' seems to hold what has no label; move it away if it is no class"
    codes = [name for name in names if CODE.fullmatch(name)]
    if 2 * len(codes) >= len(names) or any(map(wordnet.WNID.fullmatch, codes)):
        yield (
            f"warning: {len(codes)} of {len(names)} class names look like codes, first '{codes[0]}': no model that"
            " reads names can guess what they stand for; rename them, unless these are the usual words"
        )


def read_aliases(path: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read aliases: a JSON object of class name to list of words. The result has the spelling of `names` as keys.

    Raises:
        UserError: A class is unknown, or a word cannot be an answer, is another class's name or stands for two classes.
    """
    known = {normalize(name): name for name in names}
    taken = dict(known)  # every word and the class it stands for, to find words of two classes
    aliases: dict[str, tuple[str, ...]] = {}
    for key, words in _read_object(path).items():
        name = known.get(normalize(key))
        if name is None:
            hidden = f" (it has the invisible character {character})" if (character := invisible(key)) else ""
            raise UserError(f"data.aliases={path}: there is no class '{key}'{hidden}; remove it or correct its name")
        for word in words:
            if why := objection(word):
                raise UserError(f"data.aliases={path}: '{visible(word)}' of class '{name}' {why}; correct it")
            other = taken.setdefault(normalize(word), name)
            if other != name:
                raise UserError(f"data.aliases={path}: '{word}' of class '{name}' means class '{other}' too; remove it")
        aliases[name] = tuple(word for word in words if normalize(word) != normalize(name))
    return aliases


def _read_object(path: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"data.aliases={path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"data.aliases={path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"data.aliases={path} must be an object: {{class name: [other words]}}")
    for name, words in content.items():
        if not isinstance(words, list) or not all(isinstance(word, str) and normalize(word) for word in words):
            raise UserError(f"data.aliases={path}: '{name}' must have a list of words, not {json.dumps(words)}")
    return content


def imagenet_names() -> dict[str, str]:
    """Return ImageNet's 1000 classes by WordNet id, in label order, with CLIP's names; two names occur twice.

    Raises:
        UserError: The package with the names is not installed.
    """
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise UserError("ImageNet's names come from the package open_clip, not installed: pip install open_clip_torch")
    # Run this file alone, because importing the package imports torch.
    content = run_path(str(Path(package.origin).parent / "zero_shot_metadata.py"))
    return dict(zip(wordnet.wnids(), content["IMAGENET_CLASSNAMES"], strict=True))


def wordnet_aliases(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Return WordNet's synonyms for classes (WordNet id to name), without words that could mean another class."""
    words: dict[str, dict[str, str]] = {display(name): {} for name in names.values()}
    for wnid, name in names.items():
        for word in wordnet.synonyms()[wnid].split(", "):
            words[display(name)].setdefault(normalize(word), display(word))
    meanings = _count([normalize(name) for name in words], *words.values())
    aliases = {}
    for name, synonyms in words.items():
        # a class name that WordNet has too counts as name and as word, so it never becomes its own alias
        kept = [word for key, word in synonyms.items() if meanings[key] == 1]
        if kept:
            aliases[name] = kept
    return aliases


def _count(*groups: Iterable[str]) -> dict[str, int]:
    """Count in how many groups each word occurs."""
    counts: dict[str, int] = {}
    for group in groups:
        for word in group:
            counts[word] = counts.get(word, 0) + 1
    return counts


def write_classnames(path: Path, names: Mapping[str, str]) -> None:
    """Write a line for every class: WordNet id, blank, name."""
    _write(path, "".join(f"{wnid} {name}\n" for wnid, name in names.items()))


def write_aliases(path: Path, names: Mapping[str, str]) -> None:
    """Write the synonyms in the format of `read_aliases`."""
    _write(path, json.dumps(wordnet_aliases(names), indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    if path.exists():
        raise UserError(f"{path} exists already; remove it or give another path")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m common.data.names", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("classnames", help="ImageNet's names by WordNet id").add_argument("file", type=Path)
    aliases = commands.add_parser("aliases", help="WordNet's synonyms of ImageNet's names")
    aliases.add_argument("file", type=Path)
    aliases.add_argument("--subset", choices=sorted(wordnet.SUBSETS), default="imagenet", help="of which dataset")
    given = parser.parse_args(arguments)
    try:
        with watched("reading WordNet", SOON):
            names = imagenet_names()
        if given.command == "classnames":
            write_classnames(given.file, names)
        else:
            write_aliases(given.file, {wnid: names[wnid] for wnid in wordnet.wnids(given.subset)})
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    process.ensure_utf8()
    main()
