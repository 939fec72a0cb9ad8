"""From the class names of a hub copy to the classes of the dataset.

Copies on the hub number the classes as they like and word them as they like, so only names are compared, normalised,
and never numbers. Where the dataset's own files are on this machine, they say what the classes are and in which order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from common.data import wordnet
from common.data.annotations import year_first
from common.data.assemble import names_by_label
from common.data.imagenet import CLASSNAMES, classnames
from common.data.listing import lines
from common.data.location import Location
from common.data.shifted import IMAGENET
from common.data.split_file import parse
from common.parsing import normalize
from common.types import UserError

SHOWN = 5  # names in an error


def _path(name: str) -> str:
    # SUN397: "/a/apse/indoor" is "indoor apse" in the CoOp files.
    return " ".join(reversed(name.strip("/").split("/")[1:]))


def _synonyms(name: str) -> str:
    # ImageNet: "tench, Tinca tinca" is n01440764. The two cranes have one text; `renames` tells them apart.
    wnids = [wnid for wnid, words in wordnet.synonyms().items() if words == name]
    return wnids[0] if len(wnids) == 1 else name


WORDINGS: dict[str, Callable[[str], str]] = {
    "as_is": str,
    "year_first": year_first,
    "path": _path,
    "wnid": str,
    "synonyms": _synonyms,
}
BY_WNID = ("wnid", "synonyms")  # wordings that give WordNet ids, whose names are in classnames.txt


@dataclass(frozen=True)
class Classes:
    """The classes of the dataset: `names` by label, and the label of every hub class that is not dropped.

    canonical: names and order are those of the dataset's own files, not the hub's.
    """

    names: tuple[str, ...]
    labels: dict[str, int]
    canonical: bool


@dataclass(frozen=True)
class _Known:
    # A class as the dataset's own files have it: the word that it goes by (normalised), and its name.
    word: str
    name: str


def match(
    location: Location, hub_names: Sequence[str], wording: str, renames: Mapping[str, str], drop: Sequence[str]
) -> Classes:
    """Find the class of every hub class.

    Args:
        location: Of the dataset; its folder may hold the files that name the classes.
        hub_names: The hub's names.
        wording: How they are worded, a key of WORDINGS.
        renames: Hub name to name, for those that no rule covers; they come before the wording.
        drop: Hub names of classes that the dataset does not have.

    Raises:
        UserError: A class has no counterpart, or two have the same.
    """
    if wording not in WORDINGS:
        raise UserError(f"data.hub.wording={wording}: choose one of {', '.join(WORDINGS)}")
    _refuse_unknown("drop", drop, hub_names)
    _refuse_unknown("renames", list(renames), hub_names)
    dropped = {normalize(name) for name in drop}
    renamed = {normalize(key): name for key, name in renames.items()}
    words = {
        name: renamed.get(normalize(name)) or WORDINGS[wording](name)
        for name in hub_names
        if normalize(name) not in dropped
    }
    known = _known(location, wording)
    if known is None:
        return _own(location, words)
    if wording == "wnid":  # ImageNet-A and -R have 200 of the 1000 classes
        here = {normalize(word) for word in words.values()}
        known = [one for one in known if one.word in here]
    return _counterparts(location, words, known)


def _refuse_unknown(key: str, named: Sequence[str], hub_names: Sequence[str]) -> None:
    there = {normalize(name) for name in hub_names}
    if unknown := [name for name in named if normalize(name) not in there]:
        raise UserError(
            f"data.hub.{key} names {_list(unknown)}, which the hub does not have; it has {_list(hub_names)}"
            f" (data.hub.{key}=null: none)"
        )


def _own(location: Location, words: Mapping[str, str]) -> Classes:
    """The hub's own names, in the order of the normalised names."""
    order = sorted(words, key=lambda name: normalize(words[name]))
    if twice := [words[one] for one, other in pairwise(order) if normalize(words[one]) == normalize(words[other])]:
        raise location.error(f"two of the hub's classes are called {_list(twice)}")
    return Classes(tuple(words[name] for name in order), {name: label for label, name in enumerate(order)}, False)


def _counterparts(location: Location, words: Mapping[str, str], known: Sequence[_Known]) -> Classes:
    """The dataset's names and order; every hub class must be one of them and every one must be on the hub."""
    by_word: dict[str, list[int]] = {}
    for label, one in enumerate(known):
        by_word.setdefault(one.word, []).append(label)
    candidates = {name: by_word.get(normalize(word), []) for name, word in words.items()}
    if unmatched := [name for name, labels in candidates.items() if not labels]:
        raise location.error(
            f"the hub's {_list(unmatched)} is no class of the dataset; add it to data.hub.renames or drop"
        )
    if several := [name for name, labels in candidates.items() if len(labels) > 1]:
        raise location.error(f"the hub's {_list(several)} could be several classes; say which with data.hub.renames")
    labels = {name: candidates[name][0] for name in words}
    hits = Counter(labels.values())
    if missing := [one.name for label, one in enumerate(known) if label not in hits]:
        raise location.error(f"the hub has no class {_list(missing)}; its names are {_list(list(words))}")
    if twice := [name for name, label in labels.items() if hits[label] > 1]:
        raise location.error(f"the hub's {_list(twice)} are one class of the dataset; correct data.hub.renames")
    return Classes(tuple(one.name for one in known), labels, True)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _known(location: Location, wording: str) -> list[_Known] | None:
    """The classes as the dataset's own files name them; None without such a file."""
    if wording in BY_WNID:
        return _from_classnames(location)
    splits = sorted(location.folder.glob("split_zhou_*.json"))
    if len(splits) > 1:
        raise location.error(
            f"{location.folder} has several split files; keep one of {_list([path.name for path in splits])}"
        )
    names: Sequence[str]
    if splits:
        names = names_by_label(location, parse(location, splits[0]), str(splits[0]))
    elif (variants := location.folder / "variants.txt").is_file():
        names = [name for _, name in lines(location, variants)]
    else:
        return None
    return [_Known(normalize(name), name) for name in names]


def _from_classnames(location: Location) -> list[_Known]:
    """The lines `<WordNet id> <name>`, from the dataset's folder or ImageNet's."""
    for folder in (location.folder, location.root / IMAGENET):
        if (path := folder / CLASSNAMES).is_file():
            return [_Known(normalize(wnid), name) for wnid, name in classnames(location, path).items()]
    raise location.error(
        f"{location.root / IMAGENET / CLASSNAMES} does not exist, and the hub gives WordNet ids only; write it with"
        " `python -m common.data.names classnames <file>`"
    )
