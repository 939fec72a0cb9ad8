"""Pictures that a task has twice: in training and in a test, or under two labels.

Identical ones are those with the same stamp (`Images.stamp`). Pictures that look alike are found by a difference hash.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.types import Task

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 8  # of a difference hash
DISTANCE = 4  # bits of 64 in which pictures that look alike may differ: enough for other sizes and stronger compression
FLAT = 8  # grey levels of 256: a picture within so few has no hash, since all such pictures would look alike
FEW = 20_000  # pictures among which those that look alike are found within half a minute
CHUNK = 1024  # pictures that are compared with all others together
WORDS = {
    "train_and_test": "identical pictures in training and test",
    "two_labels": "identical pictures under two labels",
    "near_train_and_test": "pictures that look alike in training and test",
    "near_two_labels": "pictures that look alike under two labels",
}


def equal(values: Mapping[str, Hashable]) -> list[tuple[str, ...]]:
    """Groups of keys with the same value, two or more each.

    >>> equal({"a": 1, "b": 2, "c": 1})
    [('a', 'c')]
    """
    groups: dict[Hashable, list[str]] = {}
    for key, value in values.items():
        groups.setdefault(value, []).append(key)
    return [tuple(keys) for keys in groups.values() if len(keys) > 1]


def difference_hash(picture: Image) -> bytes | None:
    """64 bits: whether each of 8 x 8 fields is brighter than the one to its left. None for a picture of one colour."""
    grey = np.asarray(picture.convert("L").resize((SIDE + 1, SIDE)), np.int16)
    if np.ptp(grey) < FLAT:
        return None
    return np.packbits(np.diff(grey) > 0).tobytes()


def alike(hashes: Mapping[str, bytes | None], distance: int = DISTANCE) -> list[tuple[str, str]]:
    """Pairs of pictures whose hashes differ in `distance` bits or fewer."""
    keys = [key for key, value in hashes.items() if value is not None]
    packed = np.frombuffer(b"".join(value for value in hashes.values() if value is not None), np.uint8)
    bits = np.unpackbits(packed).reshape(len(keys), SIDE * SIDE).astype(np.float32) * 2 - 1
    pairs = []
    for start in range(0, len(keys), CHUNK):
        # of signs, the product is 64 less twice the bits that differ
        near = bits[start : start + CHUNK] @ bits[start:].T >= SIDE * SIDE - 2 * distance
        rows, columns = (index + start for index in np.nonzero(near))
        pairs += [(keys[row], keys[column]) for row, column in zip(rows, columns, strict=True) if row < column]
    return pairs


def troubling(task: Task, groups: Sequence[tuple[str, ...]], prefix: str = "") -> dict[str, list[list[str]]]:
    """Those of the groups that a result should know of, by kind (a key of WORDS); a kind without groups is left out.

    Args:
        task: With the splits.
        groups: Pictures that are the same or look alike.
        prefix: Of the kinds: nothing, or `near_`.
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
    """What was found: how many groups of each kind, and the first."""
    parts = (f"{WORDS[kind]}: {len(groups)}, first {' and '.join(groups[0][:2])}" for kind, groups in copies.items())
    return "; ".join(parts)


def _disagree(group: Sequence[str], names: Mapping[str, str]) -> bool:
    """Whether one dataset gives a picture two names; two datasets may. (The keys of digits name none.)"""
    answers = {(image.partition("/")[0] if "/" in image else "", names[image]) for image in group}
    return len(answers) > len({dataset for dataset, _ in answers})
