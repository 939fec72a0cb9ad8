"""ALERT's own draft: the categories whose mean feature is the most similar to an image's (the similarities of section
3.3), as the model's vision tower sees them.

Shapes: C categories, D numbers of a feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alert.draft import candidates, categories, settled
from common.runtime.distributed import gather, share_of
from common.types import Task, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from common.method import Vision

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
        self, vision: Vision, seed: int, k_with_truth: int | None, task: Task, split: str
    ) -> candidates.Candidates:
        """Of the images of a split. Ranks share them, and rank a batch at a time: ImageNet's have 900 GB of patches.

        Args:
            vision: What the means were seen with.
            seed: Of the run, for the record.
            k_with_truth: The truth is put among so many (`oracle_recall`, an upper bound); None: it is not known.
            task: With the split.
            split: Which.
        """
        asked, own = task.evaluation[split], categories.train_labels(task, split)
        shots = len(task.train.items) // len(task.train.names)
        origin = candidates.Origin("class_means", settled.dataset_of(task, split), shots, seed)
        mine, parts = share_of(list(asked.items)), []
        for start in range(0, len(mine), vision.batch):
            items = mine[start : start + vision.batch]
            images = [item.image for item in items]
            seen = vision.vectors(images, self.patches).numpy()
            logits = candidates.class_mean_logits(seen, self.means)[:, own]
            if k_with_truth is None:
                parts.append(candidates.rank(images, logits, asked.names, origin))
            else:
                truths = [item.label for item in items]
                parts.append(candidates.oracle_recall(images, logits, truths, k_with_truth, asked.names, origin))
        batches = [part for of_rank in gather(parts) for part in of_rank]
        return candidates.join(batches, [item.image for item in asked.items])
