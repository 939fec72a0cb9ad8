"""Read a dataset by its configuration: find its location, read images and labels, check them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from common.config.schema import DataConfig
from common.counted import agree, counted
from common.data.contents import Contents
from common.data.images import FileImages
from common.data.listing import URL, Location, documentation, litter_summary, on_disk, visible
from common.data.names import display, objection, read_aliases
from common.plugins import locate
from common.types import Item, Source, Split, UserError

# Building a `Source` from labelled images: class names by label, fingerprint, files behind the keys.

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Parts:
    """The train, val and test part of a dataset; empty where it has none."""

    train: Sequence[Item] = ()
    val: Sequence[Item] = ()
    test: Sequence[Item] = ()


def assemble(
    location: Location, names: Sequence[str], parts: Parts, origin: str, folders: Mapping[str, Path] | None = None
) -> Source:
    """Build a source whose images are files.

    Args:
        location: Location of the dataset.
        names: Class names, by label.
        parts: Images of the dataset.
        origin: Origin of the split, for results.
        folders: Folder of each dataset in the keys; None: of this one only.
    """
    return Source(
        names=tuple(names),
        train=tuple(parts.train),
        val=tuple(parts.val),
        test=tuple(parts.test),
        images=FileImages(dict(folders or {location.name: location.folder}), location.background, location.contents),
        fingerprint=fingerprint(names, parts),
        origin=origin,
        passed_over=litter_summary(location.passed_over.values()),
        notes=tuple(location.notes),
    )


def fingerprint(names: Sequence[str], parts: Parts) -> str:
    """Return the SHA-256 of class names, keys and labels in their order; it does not depend on folders."""
    digest = hashlib.sha256(json.dumps(list(names)).encode())
    for part in (parts.train, parts.val, parts.test):
        rows = "\n".join([f"{item.label} {item.image}" for item in part])
        digest.update(f"\n{len(part)}\n{rows}".encode())
    return digest.hexdigest()


def names_by_label(location: Location, parts: Parts, where: str) -> tuple[str, ...]:
    """Return the class names that items carry.

    Args:
        location: Location of the dataset, for error messages.
        parts: All items.
        where: The file that they come from.

    Raises:
        UserError: The labels are not 0, 1, 2, ... without a gap.
    """
    names: dict[int, str] = {}
    for item in chain(parts.train, parts.val, parts.test):
        names.setdefault(item.label, item.name)
    if not names:
        raise location.error(f"{where} lists no image")
    for label in range(len(names)):
        if label not in names:
            strange = next(key for key in names if not 0 <= key < len(names))
            raise location.error(
                f"{where} has {counted(len(names), 'label')}, which must be 0 to {len(names) - 1}, but"
                f" {label} does not occur and {strange} ('{names[strange]}') does"
            )
    return tuple(names[label] for label in range(len(names)))


@dataclass(frozen=True)
class Dataset:
    """A dataset that was read, with its configuration (which has the questions) and aliases of class names."""

    config: DataConfig
    source: Source
    aliases: dict[str, tuple[str, ...]]

    def split(self, items: Sequence[Item], labels: Sequence[int] | None = None) -> Split:
        """Return a split with all classes, or with those of `labels` only: other images are dropped, labels renumbered.

        Args:
            items: Images of this dataset.
            labels: Ascending; None: all.
        """
        names = self.source.names
        if labels is not None:
            renumbered = {label: number for number, label in enumerate(labels)}
            items = [replace(item, label=renumbered[item.label]) for item in items if item.label in renumbered]
            names = tuple(names[label] for label in labels)
        known = {name: self.aliases[name] for name in names if name in self.aliases}
        return Split(tuple(items), names, self.config.question, self.config.open_question, known)


def large_classes(source: Source, smallest: int) -> Source:
    """Leave out classes with fewer than `smallest` images to train on (of a pool: of all), and say which in a note.

    Raises:
        UserError: Fewer than two classes are left.
    """
    counts = Counter(item.label for item in source.train)
    kept = [label for label in range(len(source.names)) if counts[label] >= smallest]
    if len(kept) == len(source.names):
        return source
    if len(kept) < 2:
        raise UserError(
            f"min_per_class={smallest} leaves {counted(len(kept), 'class')}, and a task needs two or more: the largest"
            f" has {counted(max(counts.values()), 'image')}"
        )
    renumbered = {label: number for number, label in enumerate(kept)}
    names = tuple(source.names[label] for label in kept)
    parts = Parts(
        *(
            [replace(item, label=renumbered[item.label]) for item in part if item.label in renumbered]
            for part in (source.train, source.val, source.test)
        )
    )
    gone = [f"{name} {counts[label]}" for label, name in enumerate(source.names) if label not in renumbered]
    note = f"{counted(len(gone), 'class')} left out by min_per_class={smallest}: {', '.join(gone)}"
    return replace(
        source,
        names=names,
        train=tuple(parts.train),
        val=tuple(parts.val),
        test=tuple(parts.test),
        fingerprint=fingerprint(names, parts),
        notes=(*source.notes, note),
    )


class Reader(Protocol):
    """Function that `data.reader._target_` names: it reads a dataset in the format that it has on disk."""

    def __call__(self, location: Location, **arguments: Any) -> Source:
        """
        Args:
            location: Folder of the dataset, with helpers for reading and for errors.
            arguments: Other keys of `data.reader`.

        Raises:
            UserError: A file is missing or wrong; made by `location.error`.
        """


def load(data: DataConfig, only_test: bool = False, contents: Contents | None = None) -> Source:
    """Read a dataset; class names as they are shown to a model. `only_test`, `contents`: see `Location`.

    Raises:
        UserError: A folder or file is missing, or the files contradict each other.
    """
    entry = data.hub if data.source == "hub" else data.reader
    arguments = {key: value for key, value in entry.items() if key != "_target_"}
    place = replace(find(data, only_test), background=data.background, contents=contents or Contents())
    read: Reader = locate(entry["_target_"], "data.reader._target_")
    source = read(place, **arguments)
    source = replace(
        source,
        names=tuple(display(name) for name in source.names),
        train=_displayed(source.train),
        val=_displayed(source.val),
        test=_displayed(source.test),
    )
    for problem in problems(source):
        raise UserError(f"data={data.name}: {problem}; see {documentation(data.name)}")
    return source


def load_dataset(
    data: DataConfig, only_test: bool = False, contents: Contents | None = None, min_per_class: int = 1
) -> Dataset:
    """Read a dataset and the aliases of its class names, without classes of fewer images than `min_per_class`."""
    source = load(data, only_test, contents)
    if min_per_class > 1:
        source = large_classes(source, min_per_class)
    aliases = {} if data.aliases is None else read_aliases(Path(data.aliases).expanduser(), source.names)
    return Dataset(data, source, aliases)


def find(data: DataConfig, only_test: bool = False) -> Location:
    """Locate a dataset: inside the root; own photos also in the working directory, which takes precedence.

    Raises:
        UserError: `data.folder` is relative and no root is given; or it is a URL.
    """
    if URL.match(data.folder) and data.source == "local":
        raise UserError(
            f"data.folder={data.folder} is a URL, and URLs are not read; download the data, and give its folder"
        )
    folder = Path(data.folder).expanduser()
    if data.own_photos and data.source == "local":
        roots = [Path.cwd(), *([] if data.root is None else [Path(data.root).expanduser().absolute()])]
        tried = tuple(dict.fromkeys(root / folder for root in roots))  # an absolute folder gives one path for all roots
        there = next((path for path in tried if os.path.exists(on_disk(path))), tried[-1])
        return Location(data.name, roots[-1], there, data.allow_fallback_split, only_test, tried)
    if data.root is None and not folder.is_absolute() and data.folder and data.source == "local":
        raise UserError(
            f"data={data.name} is read from $DATA/{data.folder}, but DATA is not set: export DATA=<folder of all"
            f" datasets>, or data.root=<folder>; {documentation(data.name)} says what belongs there"
        )
    root = Path(data.root or ".").expanduser().absolute()
    return Location(data.name, root, root / folder, data.allow_fallback_split, only_test)


def problems(source: Source) -> Iterator[str]:
    """Yield contradictions in a dataset, each as half a sentence that names what is at fault."""
    for name in source.names:
        if why := objection(name):
            yield f"class '{visible(name)}' {why}; rename it"
    seen: set[str] = set()
    for part in ("train", "val", "test"):
        items: tuple[Item, ...] = getattr(source, part)
        if wrong := next((item for item in items if not 0 <= item.label < len(source.names)), None):
            classes = f"there {agree(len(source.names), 'is', 'are')} {counted(len(source.names), 'class')}"
            yield f"{wrong.image} has label {wrong.label}, but {classes}"
            return  # the next checks look up names by label
        if wrong := next((item for item in items if item.name != source.names[item.label]), None):
            names = f"'{source.names[wrong.label]}' and '{wrong.name}'"
            yield f"label {wrong.label} has two names, {names} (at {wrong.image})"
        for item in items:
            if item.image in seen:
                yield f"{item.image} is listed twice, the second time in {part}"
                break
            seen.add(item.image)
    yield from _missing_classes(source)


def _missing_classes(source: Source) -> Iterator[str]:
    for part, items in (("train", source.train), ("test", source.test)):
        present = {item.label for item in items}
        missing = [name for label, name in enumerate(source.names) if label not in present]
        if items and missing:
            many = f"{counted(len(missing), 'class')} {agree(len(missing), 'has', 'have')}"
            yield f"{many} no image in {part}, first: '{missing[0]}'"


def _displayed(items: Sequence[Item]) -> tuple[Item, ...]:
    shown = {name: display(name) for name in {item.name for item in items}}
    return tuple(item if shown[item.name] == item.name else replace(item, name=shown[item.name]) for item in items)
