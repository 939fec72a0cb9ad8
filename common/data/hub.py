"""A dataset from the Hugging Face hub, or from a local folder in the hub's layout (parquet files), with `datasets`.

Used with `data.source=hub`. Classes are matched by name (see `match`). Hub copies have their own splits, so few-shot
picks from them are not CoOp's, and every result says "hub split".
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data import wordnet
from common.data.annotations import year_first
from common.data.contents import Contents, facts
from common.data.imagenet import CLASSNAMES, IMAGENET, classnames
from common.data.images import WHITE, decode, on
from common.data.listing import Location, lines
from common.data.source import PARTS, Parts, fingerprint, names_by_label
from common.data.split_file import parse
from common.parsing import normalize
from common.types import BadImage, Item, Source, UserError

if TYPE_CHECKING:
    from PIL.Image import Image


SAMPLES = 64  # images of a part that are hashed for its fingerprint
PAGE = "https://huggingface.co/datasets"


def read(
    location: Location,
    *,
    id: str,
    revision: str | None = None,
    config: str | None = None,
    image: str = "image",
    label: str = "label",
    parts: Mapping[str, str] | None = None,
    wording: str = "as_is",
    renames: Mapping[str, str] | None = None,
    drop: Sequence[str] | None = None,
) -> Source:
    """Read the hub's splits and images under the dataset's class names.

    Args:
        location: Where the dataset's own files may lie; if they do, they define the classes and their order.
        id: Name of the hub dataset, or a folder.
        revision: Branch, tag or commit on the hub.
        config: Configuration of a hub dataset that has several.
        image: Column of the images.
        label: Column of the classes: class labels, or their names as text.
        parts: The hub's split for each of train, val, test; a part without one is empty.
        wording: How the hub words the names, a key of WORDINGS.
        renames: Class name by hub name, where the wording does not give it.
        drop: Hub names of classes whose images are left out.

    Raises:
        UserError: The hub cannot be reached, or the copy does not fit; says what to do.
    """
    parts = {"train": "train", "test": "test"} if parts is None else parts
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"data.hub.parts.{unknown[0]}: the parts are {', '.join(PARTS)}")
    tables = {part: _load(location, id, config, parts[part], revision) for part in PARTS if part in parts}
    for table in tables.values():
        _check_columns(location, table, id, image, label)
    # some classes may have no image, and a text column declares no classes: take the union of both
    rows = {part: _names(location, table, label, parts[part]) for part, table in tables.items()}
    hub_names = sorted({name for table in tables.values() for name in _declared(table, label)}.union(*rows.values()))
    classes = match(location, hub_names, wording, renames or {}, drop or ())
    items = Parts(*(_items(location, part, rows.get(part, ()), classes) for part in PARTS))
    columns = {part: _column(table, image, location.contents) for part, table in tables.items()}
    return Source(
        names=classes.names,
        train=tuple(items.train),
        val=tuple(items.val),
        test=tuple(items.test),
        images=HubImages(columns, location.background),
        fingerprint=_digest([fingerprint(classes.names, items), *(column.origin for column in columns.values())]),
        origin="hub split" if classes.canonical else "hub split, classes in the hub's order",
    )


@dataclass(frozen=True)
class Column:
    """Images of one part, as Arrow columns of memory-mapped files.

    Args: origin: Hash that identifies the images (see `_column`).
    pictures: The bytes of every row or, in repositories of plain image files, the path of its file.
    sizes: Number of bytes of every row; null without bytes. They reveal an empty row without reading its image.
    files: Facts of the mapped files (see `contents.facts`), and when the last of them changed.
    contents: Cache of image hashes.
    """

    origin: str
    pictures: Any = field(compare=False, repr=False)
    sizes: Any = field(compare=False, repr=False)
    files: tuple[str, int] | None = field(default=None, compare=False, repr=False)
    contents: Contents = field(default_factory=Contents, compare=False, repr=False)


@dataclass(frozen=True)
class HubImages:
    """Images of a hub dataset, decoded when they are opened. Keys are `<dataset>/hub/<part>/<row>`."""

    parts: dict[str, Column]
    background: str = WHITE

    def open(self, image: str) -> Image:
        column, row, path = self._find(image)
        return decode(path or column.pictures[row]["bytes"].as_py(), self.background)

    def stamp(self, image: str) -> str:
        column, row, path = self._find(image)
        if path is not None:
            return on(self.background, column.contents.of(path))
        if column.files is None:  # in memory
            return on(self.background, self._sha256(image))
        name, changed = column.files
        return on(self.background, column.contents.keep(f"{name} {row}", changed, lambda: self._sha256(image)))

    def size(self, image: str) -> int:
        column, row, path = self._find(image)
        return column.sizes[row].as_py() if path is None else path.stat().st_size

    def content(self, image: str, start: int = 0, length: int | None = None) -> bytes:
        column, row, path = self._find(image)
        stored = column.pictures[row]["bytes"].as_py() if path is None else path.read_bytes()
        return stored[start : None if length is None else start + length]

    def _sha256(self, image: str) -> str:
        return hashlib.sha256(self.content(image)).hexdigest()

    def _find(self, image: str) -> tuple[Column, int, Path | None]:
        """Return the column and the row of an image, and its path if it is a file outside the column.

        Raises:
            BadImage: There is no such image.
        """
        *_, part, row = image.split("/")
        column, number = self.parts[part], int(row)
        if column.sizes[number].as_py():
            return column, number, None
        stored = column.pictures[number].as_py() or {}
        path = Path(stored.get("path") or "")
        if path.is_absolute() and path.is_file() and path.stat().st_size:
            return column, number, path
        named = f": it names {path}, which is not on this machine" if path.name else ""
        raise BadImage(f"the hub dataset has no picture in this row{named}")


def _load(location: Location, id: str, config: str | None, split: str, revision: str | None) -> Any:
    import httpx
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        cache = _prepared(id, location.contents)
        return load_dataset(id, name=config, split=split, revision=revision, cache_dir=cache)
    # all kinds of error for a missing network, permission, repository, file, configuration or split
    except (OSError, RuntimeError, ValueError, DatasetsError, httpx.HTTPError) as error:
        raise UserError(f"data={location.name}: {_advice(id, error)}; see {location.section}") from error


def _prepared(id: str, contents: Contents) -> str | None:
    """Return the cache folder in which `datasets` prepares a local folder; None for its usual place.

    `datasets` identifies the files of a folder by path and modification time alone, so files that were replaced under
    the same times would give the old images. Here every content has a cache folder of its own.
    """
    import datasets

    folder = Path(id)
    if not folder.is_dir():
        return None
    found = ((path.relative_to(folder), path) for path in sorted(folder.rglob("*")) if path.is_file())
    lines = [f"{name} {contents.of(path)}" for name, path in found if not name.parts[0].startswith(".")]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{_digest(lines)[:16]}")


def _advice(id: str, error: Exception) -> str:
    """Return what went wrong and what to do about it."""
    text = " ".join(str(error).split())
    if "gated" in text:
        return f"data.hub.id={id} is gated: accept its terms at {PAGE}/{id}, then run `hf auth login`"
    if "scripts are no longer supported" in text:
        return f"data.hub.id={id} is a loading script, which is not run: give another id, or use data.source=local"
    if "Unknown split" in text:
        return f"data.hub.parts does not fit data.hub.id={id}: {text}"
    if Path(id).is_absolute():
        return f"data.hub.id={id} is no folder with a dataset in the hub's layout: {text}"
    if isinstance(error, ConnectionError):
        return (
            f"data.hub.id={id} cannot be reached and was not loaded before ({text}): go online, or run `hf download"
            f" {id} --repo-type dataset --local-dir <folder>` where there is a network and give data.hub.id=<folder>,"
            " or use data.source=local"
        )
    return f"data.hub.id={id} cannot be loaded ({text}): check it at {PAGE}/{id}, or use data.source=local"


def _check_columns(location: Location, table: Any, id: str, image: str, label: str) -> None:
    from datasets import ClassLabel, Image, Value

    for key, column in (("image", image), ("label", label)):
        if column not in table.features:
            there = ", ".join(table.features)
            raise UserError(f"data={location.name}: data.hub.{key}={column}: {id} has the columns {there}")
    if not isinstance(table.features[image], Image):
        raise UserError(f"data={location.name}: data.hub.image={image}: the column holds no pictures")
    kind = table.features[label]
    if not isinstance(kind, ClassLabel) and kind not in (Value("string"), Value("large_string")):
        raise UserError(f"data={location.name}: data.hub.label={label}: the column has no class names")


def _declared(table: Any, label: str) -> list[str]:
    """Return the classes that the column declares, with or without images; none for a text column."""
    return list(getattr(table.features[label], "names", None) or [])


def _names(location: Location, table: Any, label: str, split: str) -> list[str]:
    """Return the class name of every row, from the Arrow column: no image is read."""
    values = table.data.column(label).to_pylist()
    declared = _declared(table, label)
    for row, value in enumerate(values):
        if value is None or value == -1:
            raise location.error(
                f"row {row} of the hub's split '{split}' has no label; choose another in data.hub.parts"
            )
    return [declared[value] for value in values] if declared else values


def _items(location: Location, part: str, names: Sequence[str], classes: Classes) -> tuple[Item, ...]:
    prefix, labels = location.key(f"hub/{part}"), classes.labels
    return tuple(
        Item(f"{prefix}/{row}", labels[name], classes.names[labels[name]])
        for row, name in enumerate(names)
        if name in labels
    )


def _column(table: Any, image: str, contents: Contents) -> Column:
    """Return the images of a part; its hash covers all sizes and the content of SAMPLES images, to tell revisions."""
    import pyarrow.compute as compute

    pictures = table.data.column(image)
    sizes = compute.binary_length(compute.struct_field(pictures, "bytes"))
    step = max(1, len(pictures) // SAMPLES)
    some = [hashlib.sha256(pictures[row]["bytes"].as_py() or b"").hexdigest() for row in range(0, len(pictures), step)]
    origin = _digest([*map(str, sizes.to_pylist()), *some])
    files = [facts(Path(each["filename"])) for each in table.cache_files]
    newest = max((changed for _, changed in files), default=0)
    # the name under which hashes of these images are cached: it changes with the files and with their content
    mapped = ("\n".join([origin, *(name for name, _ in files)]), newest) if files else None
    return Column(origin, pictures, sizes, mapped, contents)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# Matching the class names of a hub copy to the classes of the dataset.
#
# Hub copies number and word the classes in their own way, so only normalised names are compared, never numbers. If the
# dataset's own files are on this machine, they define the classes and their order.

SHOWN = 5  # names in an error


def _path(name: str) -> str:
    # SUN397: "/a/apse/indoor" is "indoor apse" in the CoOp files.
    return " ".join(reversed(name.strip("/").split("/")[1:]))


def _synonyms(name: str) -> str:
    # ImageNet: "tench, Tinca tinca" is n01440764. Both classes "crane" have one text; `renames` tells them apart.
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
    """Classes of the dataset: `names` by label, and the label of every hub class that is not dropped.

    canonical: whether names and order come from the dataset's own files, not from the hub.
    """

    names: tuple[str, ...]
    labels: dict[str, int]
    canonical: bool


@dataclass(frozen=True)
class _Known:
    # A class of the dataset's own files: the normalised word to match it by, and its name.
    word: str
    name: str


def match(
    location: Location, hub_names: Sequence[str], wording: str, renames: Mapping[str, str], drop: Sequence[str]
) -> Classes:
    """Find the label of every hub class.

    Args:
        location: Location of the dataset; its folder may hold the files that define the classes.
        hub_names: Class names of the hub.
        wording: How they are worded, a key of WORDINGS.
        renames: Class name by hub name, for those that no rule covers; it takes precedence over the wording.
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
    """Return the hub's own names, sorted by normalised name."""
    order = sorted(words, key=lambda name: normalize(words[name]))
    if twice := [words[one] for one, other in pairwise(order) if normalize(words[one]) == normalize(words[other])]:
        raise location.error(f"two of the hub's classes are called {_list(twice)}")
    return Classes(tuple(words[name] for name in order), {name: label for label, name in enumerate(order)}, False)


def _counterparts(location: Location, words: Mapping[str, str], known: Sequence[_Known]) -> Classes:
    """Return the dataset's names and order; hub classes and dataset classes must match one to one."""
    by_word: dict[str, list[int]] = {}
    for label, one in enumerate(known):
        by_word.setdefault(one.word, []).append(label)
    # every hub class must match exactly one class of the dataset
    candidates = {name: by_word.get(normalize(word), []) for name, word in words.items()}
    if unmatched := [name for name, labels in candidates.items() if not labels]:
        raise location.error(
            f"the hub's {_list(unmatched)} is no class of the dataset; add it to data.hub.renames or drop"
        )
    if several := [name for name, labels in candidates.items() if len(labels) > 1]:
        raise location.error(f"the hub's {_list(several)} could be several classes; say which with data.hub.renames")
    # and every class of the dataset exactly one hub class
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
    """Return the classes of the dataset's own files; None if there are none."""
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
    """Return the classes of `classnames.txt` (`<WordNet id> <name>`) in the dataset's folder or ImageNet's."""
    for folder in (location.folder, location.root / IMAGENET):
        if (path := folder / CLASSNAMES).is_file():
            return [_Known(normalize(wnid), name) for wnid, name in classnames(location, path).items()]
    raise location.error(
        f"{location.root / IMAGENET / CLASSNAMES} does not exist, and the hub gives WordNet ids only; write it with"
        " `python -m common.data.names classnames <file>`"
    )
