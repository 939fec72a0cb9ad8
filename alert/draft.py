"""ALERT's drafts: a few-shot learner fitted on the run's shots, the nearest class means, or the truth as a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from alert import prompting
from common.config.schema import Config, TrainerConfig
from common.data.task import TaskData, dataset_of
from common.few_shot import candidates
from common.few_shot.candidates import Candidates
from common.few_shot.check import name_of
from common.few_shot.learner import FewShotLearner
from common.run.checkpoint import Checkpoints
from common.run.recorder import Recorder
from common.run.run_folder import RunFolder
from common.run.tracking import NullTracker
from common.runtime.distributed import barrier, gather, rank, share_of
from common.runtime.progress import Stopwatch
from common.types import Task, UserError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from common.models.vision import VisionTower


# A few-shot learner as ALERT's draft: fitted on the run's own shots before the language model is loaded.
#
# Its folder is a small run folder: log, checkpoints, candidates. What an earlier attempt finished is read.


class FewShotDraft:
    """A few-shot learner that names candidates."""

    def __init__(self, config: Config, data: TaskData, device: torch.device, folder: Path) -> None:
        """
        Args:
            config: The run's configuration.
            data: The run's data; the candidates are of its images.
            device: Where encoders compute and features lie.
            folder: `draft` in the run folder.
        """
        self.config, self.data = config, data
        self.device, self.folder = device, folder
        self.learner: FewShotLearner | None = None

    def candidates(self) -> dict[str, Candidates]:
        """Candidates of the images of every split. All ranks call it together. The learner is let go: a larger
        model follows.
        """
        splits = list(self.data.task.evaluation)
        if not all(gather(all(self._path(split).with_suffix(".json").is_file() for split in splits))):
            learner = self._fitted()
            for split in splits:
                learner.predict(split)
            learner.close()
        return {split: self._read(self.data.task, split) for split in splits}

    def of(self, task: Task, split: str) -> Candidates:
        """Candidates of images that came later. The learner comes back from its checkpoints once, and stays."""
        if self.learner is None:
            self.learner = self._fitted()
        self.learner.set_task(task)
        self.learner.predict(split)
        return self._read(task, split)

    def _path(self, split: str) -> Path:
        return self.folder / candidates.FOLDER / split

    def _read(self, task: Task, split: str) -> Candidates:
        asked = task.evaluation[split]
        images = [item.image for item in asked.items]
        dataset = dataset_of(task, split)
        return candidates.read_candidates(self._path(split), images, asked.names, dataset, split)

    def _fitted(self) -> FewShotLearner:
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        barrier()
        checkpoints = Checkpoints(self.folder / "checkpoints", 1)
        method = {"name": name_of(self.config)}
        quiet = replace(self.config, trainer=TrainerConfig(name="none"), evaluate="last", method=method)
        learner = FewShotLearner(quiet, self.data, self.device, self.folder, checkpoints)
        recorder = Recorder(RunFolder(self.folder), NullTracker(), 1, Stopwatch(), checkpoints.state)
        learner.fit(recorder)
        recorder.close(failed=False)
        return learner


# ALERT's own drafts. `class_means`: the categories whose mean feature is the most similar to an image's (the
# similarities of section 3.3), as the model's vision tower sees them. `oracle_recall`: the same with the truth put in.
#
# Shapes: N images, C categories, k candidates per image, D numbers of a feature.

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
        asked, own = task.evaluation[split], prompting.train_labels(task, split)
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
