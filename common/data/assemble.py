"""From labelled images to a `Source`: class names by label, the fingerprint, the files behind the keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from common.data.images import FileImages
from common.data.place import Place
from common.types import Item, Source

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Parts:
    """The three parts of a dataset; empty where it has none."""

    train: Sequence[Item] = ()
    val: Sequence[Item] = ()
    test: Sequence[Item] = ()


def assemble(
    place: Place, names: Sequence[str], parts: Parts, origin: str, folders: Mapping[str, Path] | None = None
) -> Source:
    """A source whose images are files.

    Args:
        place: Of the dataset.
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
        images=FileImages(dict(folders or {place.name: place.folder})),
        fingerprint=fingerprint(names, parts),
        origin=origin,
    )


def fingerprint(names: Sequence[str], parts: Parts) -> str:
    """SHA-256 of class names, keys and labels in their order; keys do not say where the datasets lie."""
    digest = hashlib.sha256(json.dumps(list(names)).encode())
    for part in (parts.train, parts.val, parts.test):
        rows = "\n".join([f"{item.label} {item.image}" for item in part])
        digest.update(f"\n{len(part)}\n{rows}".encode())
    return digest.hexdigest()


def names_by_label(place: Place, parts: Parts, where: str) -> tuple[str, ...]:
    """The class names that items carry.

    Args:
        place: For error messages.
        parts: All items.
        where: The file that they come from.

    Raises:
        UserError: The labels are not 0, 1, 2, ... without a gap.
    """
    found: dict[int, str] = {}
    for item in chain(parts.train, parts.val, parts.test):
        found.setdefault(item.label, item.name)
    if not found:
        raise place.error(f"{where} lists no image")
    for label in range(len(found)):
        if label not in found:
            strange = next(key for key in found if not 0 <= key < len(found))
            raise place.error(
                f"{where} has {len(found)} labels, which must be 0 to {len(found) - 1}, but {label} does not occur and"
                f" {strange} ('{found[strange]}') does"
            )
    return tuple(found[label] for label in range(len(found)))
