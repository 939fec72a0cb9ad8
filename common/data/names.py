"""Class names: how they are shown, other words for them, and the two files about ImageNet's names.

`python -m common.data.names classnames <file>` writes ImageNet's `classnames.txt` in the format of the CoOp data sets,
`python -m common.data.names aliases <file>` other words for ImageNet's names, for `data.aliases=<file>`. Both come from
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

# Folders of exports for what nobody has labelled, in lower case and without what is no letter.
UNLABELLED = frozenset(
    (
        *("nolabel", "nolabels", "unlabeled", "unlabelled", "notlabeled", "notlabelled", "unannotated", "unassigned"),
        *("untagged", "unclassified", "unsorted", "uncategorized", "uncategorised", "undefined", "unspecified"),
        *("unknown", "background", "backgroundgoogle", "none", "null", "nan", "na", "ignore"),
    )
)
CODE = re.compile(r"(?:(?:class|label|category|type|group|cluster|id)[ _.#-]*|[a-z]{0,2}_?)\d[\da-f]*", re.IGNORECASE)


def display(raw: str) -> str:
    """A name as the files have it, as it is shown: underscores are blanks, runs of blanks one, accents composed (NFC).

    >>> display(" car_side ")
    'car side'
    """
    return " ".join(composed(raw).replace("_", " ").split())


def objections(names: Iterable[str]) -> Iterator[str]:
    """What keeps class names from being answers, each as half a sentence: see `objection`, or two are one answer."""
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
    """Why a name can be no answer; empty if it can.

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
    """What a user should know of class names that work, but hardly say what they mean; each a sentence.

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
    """Other words for class names: a JSON object of class name to list of words. Returned by the name in `names`.

    Raises:
        UserError: A class is unknown, a word can be no answer, is another class's name, or stands for two classes.
    """
    known = {normalize(name): name for name in names}
    taken = dict(known)
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
    """ImageNet's 1000 classes by WordNet id, in label order, with CLIP's names; two names occur twice.

    Raises:
        UserError: The package that has the names is not installed.
    """
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise UserError("ImageNet's names come from the package open_clip, not installed: pip install open_clip_torch")
    # The file alone, because importing the package imports torch.
    content = run_path(str(Path(package.origin).parent / "zero_shot_metadata.py"))
    return dict(zip(wordnet.wnids(), content["IMAGENET_CLASSNAMES"], strict=True))


def wordnet_aliases(names: Mapping[str, str]) -> dict[str, list[str]]:
    """WordNet's synonyms of classes (WordNet id to name), without words that could mean another of them."""
    words: dict[str, dict[str, str]] = {display(name): {} for name in names.values()}
    for wnid, name in names.items():
        for word in wordnet.synonyms()[wnid].split(", "):
            words[display(name)].setdefault(normalize(word), display(word))
    meanings = _count([normalize(name) for name in words], *words.values())
    aliases = {}
    for name, synonyms in words.items():
        # its own name is counted as a name and, if WordNet has it, as a word: it is no alias of itself
        kept = [word for key, word in synonyms.items() if meanings[key] == 1]
        if kept:
            aliases[name] = kept
    return aliases


def _count(*groups: Iterable[str]) -> dict[str, int]:
    """In how many groups a word occurs."""
    counts: dict[str, int] = {}
    for group in groups:
        for word in group:
            counts[word] = counts.get(word, 0) + 1
    return counts


def write_classnames(path: Path, names: Mapping[str, str]) -> None:
    """A line for every class: WordNet id, blank, name."""
    _write(path, "".join(f"{wnid} {name}\n" for wnid, name in names.items()))


def write_aliases(path: Path, names: Mapping[str, str]) -> None:
    """The synonyms as `read_aliases` reads them."""
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
    """The command line."""
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
