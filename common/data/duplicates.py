"""Find images that a task has twice: in training and in a test, or under two labels.

Identical images have the same stamp (`Images.stamp`). Images that look alike are found by a difference hash.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling

from common.types import Task

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 8  # fields per side of a difference hash
DISTANCE = 4  # bits of 64 in which images that look alike may differ: enough for other sizes and stronger compression
FLAT = 8  # grey levels of 256: an image with a smaller range gets no hash, since all such images would look alike
FEW = 20_000  # up to so many images, those that look alike are found within half a minute
CHUNK = 1024  # images that are compared with all others at once
THUMBNAIL = 32  # pixels per side of a grey thumbnail
CORRELATION = 0.98  # of two thumbnails, from which on images may be copies of one another (docs/log.md)
WORDS = {
    "train_and_test": "identical pictures in training and test",
    "two_labels": "identical pictures under two labels",
    "near_train_and_test": "pictures that look alike in training and test",
    "near_two_labels": "pictures that look alike under two labels",
}


def equal(values: Mapping[str, Hashable]) -> list[tuple[str, ...]]:
    """Return groups of keys with the same value, two or more each.

    >>> equal({"a": 1, "b": 2, "c": 1})
    [('a', 'c')]
    """
    groups: dict[Hashable, list[str]] = {}
    for key, value in values.items():
        groups.setdefault(value, []).append(key)
    return [tuple(keys) for keys in groups.values() if len(keys) > 1]


def difference_hash(picture: Image) -> bytes | None:
    """Return 64 bits: whether each of 8 x 8 fields is brighter than the one to its left; None for a flat image."""
    grey = np.asarray(picture.convert("L").resize((SIDE + 1, SIDE)), np.int16)
    if np.ptp(grey) < FLAT:
        return None
    return np.packbits(np.diff(grey) > 0).tobytes()


def alike(hashes: Mapping[str, bytes | None], distance: int = DISTANCE) -> list[tuple[str, str]]:
    """Return pairs of images whose hashes differ in `distance` bits or fewer."""
    keys = [key for key, value in hashes.items() if value is not None]
    packed = np.frombuffer(b"".join(value for value in hashes.values() if value is not None), np.uint8)
    # bits as -1 and 1: the dot product of two hashes is 64 minus twice the number of bits that differ
    bits = np.unpackbits(packed).reshape(len(keys), SIDE * SIDE).astype(np.float32) * 2 - 1
    pairs = []
    for start in range(0, len(keys), CHUNK):
        near = bits[start : start + CHUNK] @ bits[start:].T >= SIDE * SIDE - 2 * distance
        rows, columns = (index + start for index in np.nonzero(near))
        pairs += [(keys[row], keys[column]) for row, column in zip(rows, columns, strict=True) if row < column]
    return pairs


def thumbnail(picture: Image) -> NDArray[np.float64]:
    """Return a grey thumbnail with mean 0 and length 1, so that products are correlations.

    Shape: [THUMBNAIL * THUMBNAIL].
    """
    values = np.asarray(picture.convert("L").resize((THUMBNAIL, THUMBNAIL), Resampling.BICUBIC), np.float64).ravel()
    values -= values.mean()
    return np.asarray(values / max(float(np.linalg.norm(values)), 1e-12))


def confirmed(pairs: Sequence[tuple[str, str]], load: Callable[[str], Image]) -> list[tuple[str, str]]:
    """Return the pairs whose thumbnails are nearly equal, too.

    The hashes of things that are photographed alike, on a plain ground, can be near though the things differ.

    Args:
        pairs: Pairs of images whose hashes are near.
        load: From an image's key to its picture.
    """
    small = {image: thumbnail(load(image)) for image in dict.fromkeys(image for pair in pairs for image in pair)}
    return [pair for pair in pairs if float(small[pair[0]] @ small[pair[1]]) >= CORRELATION]


def troubling(task: Task, groups: Sequence[tuple[str, ...]], prefix: str = "") -> dict[str, list[list[str]]]:
    """Return the groups that matter for a result, by kind (a key of WORDS); a kind without groups is left out.

    Args:
        task: The task with its splits.
        groups: Groups of images that are the same or look alike.
        prefix: Text before each kind: empty or `near_`.
    """
    trained = {item.image for item in task.train.items}
    splits = [task.train, *task.evaluation.values()]
    names = {item.image: item.name for split in splits for item in split.items}
    tested = {item.image for split in task.evaluation.values() for item in split.items}
    kinds = {
        "train_and_test": [list(group) for group in groups if trained & set(group) and tested & set(group)],
        "two_labels": [list(group) for group in groups if _disagree(group, names)],
    }
    return {prefix + kind: members for kind, members in kinds.items() if members}


def worded(copies: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """Return a text with the number of groups of each kind, and the first group."""
    parts = (f"{WORDS[kind]}: {len(groups)}, first {' and '.join(groups[0][:2])}" for kind, groups in copies.items())
    return "; ".join(parts)


def _disagree(group: Sequence[str], names: Mapping[str, str]) -> bool:
    """Tell whether one dataset gives an image two names; two datasets may. (Keys of digits contain no dataset.)"""
    answers = {(image.partition("/")[0] if "/" in image else "", names[image]) for image in group}
    return len(answers) > len({dataset for dataset, _ in answers})
