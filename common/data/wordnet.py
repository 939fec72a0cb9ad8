"""Look up ImageNet's classes in WordNet, from the lists that the package timm ships. No download, no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from common.types import UserError

WNID = re.compile(r"n\d{8}")

# Subsets of ImageNet, by the name of their dataset: the file that lists their ids.
SUBSETS = {
    "imagenet": "imagenet_synsets.txt",
    "imagenet_a": "imagenet_a_synsets.txt",
    "imagenet_r": "imagenet_r_synsets.txt",
}


def _lines(name: str) -> list[str]:
    # Read the files of timm.data.ImageNetInfo directly: importing timm imports torch.
    package = find_spec("timm")
    if package is None or package.origin is None:
        raise UserError("ImageNet's classes come from the package timm, which is not installed: pip install timm")
    return (Path(package.origin).parent / "data" / "_info" / name).read_text(encoding="utf-8").splitlines()


@cache
def wnids(subset: str = "imagenet") -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet's 1000 classes, or of the 200 of ImageNet-A or -R, in label order."""
    return tuple(_lines(SUBSETS[subset]))


@cache
def _all(column: str) -> dict[str, str]:
    """Return the words (`lemma`) or the definition (`definition`) of every id."""
    rows = (line.split("\t") for line in _lines(f"imagenet_synset_to_{column}.txt"))
    return {row[0]: row[1] for row in rows}


@cache
def synonyms() -> dict[str, str]:
    """Return the words of each of the 1000 classes as one text, most common first.

    For example, `n01440764` is `tench, Tinca tinca`.
    """
    known = set(wnids())
    return {wnid: words for wnid, words in _all("lemma").items() if wnid in known}


def named(ids: Iterable[str]) -> dict[str, str]:
    """Return a name for each id that is known; all names are different.

    The name is the first of the id's words that no other id shares. If there is none, it is the first word, with the
    definition in brackets if another id has that name, and with the id if even the definition is the same.

    >>> named(["n01440764", "n03710637", "n03710721", "n99999999"])  # two share the word maillot
    {'n01440764': 'tench', 'n03710637': 'maillot', 'n03710721': 'tank suit'}
    """
    words = {wnid: _all("lemma")[wnid].split(", ") for wnid in dict.fromkeys(ids) if wnid in _all("lemma")}
    shared = Counter(word.lower() for each in words.values() for word in dict.fromkeys(each))
    names = {wnid: next((word for word in each if shared[word.lower()] == 1), "") for wnid, each in words.items()}
    rest = [wnid for wnid, name in names.items() if not name]
    taken = Counter([*(name.lower() for name in names.values() if name), *(words[wnid][0].lower() for wnid in rest)])
    for wnid in rest:
        first = words[wnid][0]
        meaning = re.split("[,;]", _all("definition")[wnid])[0]  # a comma would separate names in a question
        names[wnid] = first if taken[first.lower()] == 1 else f"{first} ({meaning})"
    twice = Counter(name.lower() for name in names.values())
    return {wnid: name if twice[name.lower()] == 1 else f"{name} ({wnid})" for wnid, name in names.items()}
