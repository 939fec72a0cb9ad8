"""From labelled images to a `Source`: class names by label, the fingerprint, the files behind the keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from common.counted import counted
from common.data.images import FileImages
from common.data.litter import summary
from common.data.location import Location
from common.types import Item, Source

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Parts:
    """The three parts of a dataset; empty where it has none."""

    train: Sequence[Item] = ()
    val: Sequence[Item] = ()
    test: Sequence[Item] = ()


def assemble(
    location: Location, names: Sequence[str], parts: Parts, origin: str, folders: Mapping[str, Path] | None = None
) -> Source:
    """A source whose images are files.

    Args:
        location: Of the dataset.
        names: Of the classes, by label.
        parts: Its images.
        origin: Whose split it is.
        folders: Of the datasets in the keys; None: of this one alone.
    """
    return Source(
        names=tuple(names),
        train=tuple(parts.train),
        val=tuple(parts.val),
        test=tuple(parts.test),
        images=FileImages(dict(folders or {location.name: location.folder}), location.background, location.contents),
        fingerprint=fingerprint(names, parts),
        origin=origin,
        passed_over=summary(location.passed_over.values()),
        notes=tuple(location.notes),
    )


def fingerprint(names: Sequence[str], parts: Parts) -> str:
    """SHA-256 of class names, keys and labels in their order; keys do not say where the datasets lie."""
    digest = hashlib.sha256(json.dumps(list(names)).encode())
    for part in (parts.train, parts.val, parts.test):
        rows = "\n".join([f"{item.label} {item.image}" for item in part])
        digest.update(f"\n{len(part)}\n{rows}".encode())
    return digest.hexdigest()


def names_by_label(location: Location, parts: Parts, where: str) -> tuple[str, ...]:
    """The class names that items carry.

    Args:
        location: For error messages.
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
