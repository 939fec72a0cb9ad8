"""ALERT's own drafts. `class_means`: the categories whose mean feature is the most similar to an image's (the
similarities of section 3.3), as the model's vision tower sees them. `oracle_recall`: the same with the truth put in.

Shapes: N images, C categories, k candidates per image, D numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alert import categories
from common.data.task import dataset_of
from common.few_shot import candidates
from common.runtime.distributed import gather, share_of
from common.types import Task, UserError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from common.models.vision import VisionTower

FILE = "means.safetensors"


@dataclass(frozen=True)
class ClassMeans:
    """means: of length 1, shape [C, D]. patches: a feature is all patches in a row, not their mean."""

    means: NDArray[np.float64]
    patches: bool

    def save(self, folder: Path) -> None:
        """Write them; the patches of all categories would be as large as the embeddings, and are not."""
        from safetensors.numpy import save_file

        if not self.patches:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"means": self.means}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> ClassMeans | None:
        """What `save` wrote, if it did.

        Raises:
            UserError: It is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = folder / FILE
        if not path.is_file():
            return None
        try:
            return cls(load_file(path)["means"], patches=False)
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}); copy it again from the run that trained it") from error

    def candidates(
        self, vision: VisionTower, seed: int, k_with_truth: int | None, task: Task, split: str
    ) -> candidates.Candidates:
        """Candidates of the images of a split. Ranks share them, a batch at a time: ImageNet's have 900 GB of patches.

        Args:
            vision: What the means were seen with.
            seed: The run's seed, for the record.
            k_with_truth: The truth is put among so many (`oracle_recall`, an upper bound); None: it is not known.
            task: The task with the split.
            split: Its name.
        """
        asked, own = task.evaluation[split], categories.train_labels(task, split)
        shots = len(task.train.items) // len(task.train.names)
        origin = candidates.Origin("class_means", dataset_of(task, split), shots, seed)
        mine, parts = share_of(list(asked.items)), []
        for start in range(0, len(mine), vision.batch):
            items = mine[start : start + vision.batch]
            images = [item.image for item in items]
            seen = vision.vectors(images, self.patches).numpy()
            logits = class_mean_logits(seen, self.means)[:, own]
            if k_with_truth is None:
                parts.append(candidates.rank(images, logits, asked.names, origin))
            else:
                truths = [item.label for item in items]
                parts.append(oracle_recall(images, logits, truths, k_with_truth, asked.names, origin))
        batches = [part for of_rank in gather(parts) for part in of_rank]
        return candidates.join(batches, [item.image for item in asked.items])


def class_mean_logits(features: ArrayLike, means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The draft `class_means`: cosine of an image's feature to every class mean (our choice; the paper uses CaFo).

    Args:
        features: Features of the images to classify, not all zero. Shape: [N, D].
        means: Class means, of length 1, see `alert.references.class_means`. Shape: [C, D].

    Returns:
        Cosines. Shape: [N, C].

    Raises:
        ValueError: A feature has length 0 or is not finite.

    >>> class_mean_logits([[0.0, 2.0], [3.0, 4.0]], np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [[0.0, 1.0], [0.6, 0.8]]
    """
    rows = np.asarray(features, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if bad := np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0))).tolist():
        raise ValueError(f"the feature of image number {bad[0]} has length {lengths[bad[0], 0]}; it has no direction")
    return rows / lengths @ means.T


def oracle_recall(
    images: Sequence[str],
    logits: ArrayLike,
    truths: Sequence[int],
    k: int,
    names: Sequence[str],
    origin: candidates.Origin,
) -> candidates.Candidates:
    """The draft `oracle_recall`: the truth and the k - 1 others that a draft ranks highest. An upper bound: it uses the
    labels, and recall@k is 1. For studies of the second stage alone (our choice).

    The k are ordered by the draft's logits, so a truth that the draft misses stands last; `order: shuffle` hides that.

    Args:
        images: Keys. Length: N.
        logits: Logits of the draft that supplies the others. Shape: [N, C].
        truths: True classes. Length: N.
        k: Candidates per image; no more are kept, since the truth may be the last.
        names: Class names. Length: C.
        origin: Origin of the draft.

    >>> draft = candidates.Origin("class_means", "digits", 16, 1)
    >>> made = oracle_recall(["a.png"], [[0.1, 0.9, 0.5, 0.3]], [0], 2, ("w", "x", "y", "z"), draft)
    >>> made.ranking("a.png"), made.origin.method, made.origin.uses_labels
    ((1, 0), 'oracle_recall of class_means', True)
    """
    certain = np.array(logits, np.float64)
    certain[np.arange(len(certain)), np.asarray(truths)] = np.inf
    indices = np.sort(
        candidates.select(certain, k, names), axis=1
    )  # by class index, so that the stable sort below keeps ties so
    order = np.argsort(-candidates.logits_of(logits, indices), axis=1, kind="stable")
    indices = np.take_along_axis(indices, order, axis=1)
    marked = replace(origin, method=f"oracle_recall of {origin.method}", uses_labels=True)
    return candidates.Candidates(tuple(images), indices, candidates.logits_of(logits, indices), marked)
