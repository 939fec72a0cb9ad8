"""The categories that a run has images of: only these have an embedding."""

from __future__ import annotations

from common.counted import agree
from common.types import Split, Task, UserError


def check_images(task: Task) -> None:
    """Every category needs an image: its embedding begins from them, and references are similar by them.

    Raises:
        UserError: Names the first without.
    """
    present = {item.label for item in task.train.items}
    if missing := [name for label, name in enumerate(task.train.names) if label not in present]:
        raise UserError(
            f"ALERT begins every category from its training images, but {len(missing)}"
            f" {agree(len(missing), 'has', 'have')} none, first: '{missing[0]}'"
            "; use more shots, or put the dataset's training images into its folder"
        )


def train_labels(task: Task, split: str) -> list[int]:
    """The trained category of every class of a split, by name.

    Raises:
        UserError: A class was not trained, so it has no embedding.
    """
    trained = {name: label for label, name in reversed(list(enumerate(task.train.names)))}
    names = task.evaluation[split].names
    if missing := [name for name in names if name not in trained]:
        raise UserError(
            f"ALERT knows only categories with training images, but {len(missing)} of '{split}'"
            f" {agree(len(missing), 'has', 'have')} none, first:"
            f" '{missing[0]}'; use setting=few_shot or shift"
        )
    if names == task.train.names:
        return list(range(len(names)))  # of two classes of one name each keeps its own embedding
    return [trained[name] for name in names]


def longest(split: Split, count: int) -> tuple[int, ...]:
    """The classes of the longest names, no name twice: by bytes, which tokens follow in every script."""
    first = {name: label for label, name in reversed(list(enumerate(split.names)))}
    return tuple(first[name] for name in sorted(first, key=lambda name: len(name.encode()), reverse=True)[:count])
