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


# `few_shot`: a few-shot learner, fitted on the run's own shots before the language model is loaded. Its folder is a
# small run folder (log, checkpoints, candidates), from which a resumed run reads what is finished.


class FewShotDraft:
    """Draft that takes its candidates from a few-shot learner."""

    def __init__(self, config: Config, data: TaskData, device: torch.device, folder: Path) -> None:
        """
        Args:
            config: Configuration of the run.
            data: Data of the run, for whose images candidates are needed.
            device: Device of encoders and features.
            folder: Sub-folder `draft` of the run folder.
        """
        self.config, self.data = config, data
        self.device, self.folder = device, folder
        self.learner: FewShotLearner | None = None

    def candidates(self) -> dict[str, Candidates]:
        """Return the candidates of the images of every split. All ranks call it together.

        The learner is released afterwards, since a larger model is loaded next.
        """
        splits = list(self.data.task.evaluation)
        # Fitting is collective: all ranks fit, or none does.
        if not all(gather(all(self._path(split).with_suffix(".json").is_file() for split in splits))):
            learner = self._fitted()
            for split in splits:
                # A fusion is fitted on the validation images, by which the learner has chosen its own settings.
                if split == "val" and self.config.method.get("fusion", "none") != "none":
                    learner.write_unselected()
                else:
                    learner.predict(split)
            learner.close()
        return {split: self._read(self.data.task, split) for split in splits}

    def of(self, task: Task, split: str) -> Candidates:
        """Return candidates of later images. The learner is restored from its checkpoints once, and kept."""
        if self.learner is None:
            self.learner = self._fitted()
        self.learner.set_task(task)
        self.learner.predict(split)
        return self._read(task, split)

    def _path(self, split: str) -> Path:
        return self.folder / candidates.FOLDER / split

    def _read(self, task: Task, split: str) -> Candidates:
        tested = task.evaluation[split]
        images = [item.image for item in tested.items]
        dataset = dataset_of(task, split)
        return candidates.read_candidates(self._path(split), images, tested.names, dataset, split)

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


# ALERT's own drafts. `class_means`: the categories whose mean feature, by the model's vision tower, is most similar to
# the image's (the similarities of section 3.3). `oracle_recall`: the same with the true class inserted.
#
# Shapes: N images, C categories, k candidates per image, D numbers of a feature.

FILE = "means.safetensors"


@dataclass(frozen=True)
class ClassMeans:
    """Mean features of the categories. means: unit length, [C, D]. patches: a feature keeps all patches."""

    means: NDArray[np.float64]
    patches: bool

    def save(self, folder: Path) -> None:
        """Write the means, unless they are of patches: those of all categories would be as large as the embeddings."""
        from safetensors.numpy import save_file

        if not self.patches:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"means": self.means}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> ClassMeans | None:
        """Read what `save` wrote, or return None if there is no file.

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
        """Return candidates of a split's images. Ranks share them batch by batch: ImageNet has 900 GB of patches.

        Args:
            vision: Vision tower that the means were computed with.
            seed: Seed of the run, for the record.
            k_with_truth: Number of candidates with the true class inserted (`oracle_recall`, an upper bound); None: no
                insertion.
            task: Task with the split.
            split: Name of the split.
        """
        tested, own = task.evaluation[split], prompting.train_labels(task, split)
        shots = len(task.train.items) // len(task.train.names)
        origin = candidates.Origin("class_means", dataset_of(task, split), shots, seed)
        mine, parts = share_of(list(tested.items)), []
        for start in range(0, len(mine), vision.batch):
            items = mine[start : start + vision.batch]
            images = [item.image for item in items]
            seen = vision.vectors(images, self.patches).numpy()
            # columns of the split's classes, in their order
            logits = class_mean_logits(seen, self.means)[:, own]
            if k_with_truth is None:
                parts.append(candidates.rank(images, logits, tested.names, origin))
            else:
                truths = [item.label for item in items]
                parts.append(oracle_recall(images, logits, truths, k_with_truth, tested.names, origin))
        batches = [part for of_rank in gather(parts) for part in of_rank]
        return candidates.join(batches, [item.image for item in tested.items])


def class_mean_logits(features: ArrayLike, means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the draft `class_means`: cosine of an image's feature to every class mean (ours; the paper uses CaFo).

    Args:
        features: Features of the images to classify, not all zero. Shape: [N, D].
        means: Class means of unit length, see `alert.references.class_means`. Shape: [C, D].

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
    """Compute the draft `oracle_recall`: the true class and the k - 1 others that a draft ranks highest.

    An upper bound, for studies of the second stage alone (our choice): it uses the labels, and recall@k is 1. The k are
    ordered by the draft's logits, so a true class that the draft misses comes last; `order: shuffle` hides that.

    Args:
        images: Image keys. Length: N.
        logits: Logits of the draft that supplies the others. Shape: [N, C].
        truths: True classes. Length: N.
        k: Candidates per image; no more are kept, since the true class may be the last.
        names: Class names. Length: C.
        origin: Origin of the draft.

    >>> draft = candidates.Origin("class_means", "digits", 16, 1)
    >>> made = oracle_recall(["a.png"], [[0.1, 0.9, 0.5, 0.3]], [0], 2, ("w", "x", "y", "z"), draft)
    >>> made.ranking("a.png"), made.origin.method, made.origin.uses_labels
    ((1, 0), 'oracle_recall of class_means', True)
    """
    # An infinite logit puts the true class among the k; the order then follows the real logits.
    certain = np.array(logits, np.float64)
    certain[np.arange(len(certain)), np.asarray(truths)] = np.inf
    indices = np.sort(
        candidates.select(certain, k, names), axis=1
    )  # by class index, so that the stable sort below keeps ties so
    order = np.argsort(-candidates.logits_of(logits, indices), axis=1, kind="stable")
    indices = np.take_along_axis(indices, order, axis=1)
    marked = replace(origin, method=f"oracle_recall of {origin.method}", uses_labels=True)
    return candidates.Candidates(tuple(images), indices, candidates.logits_of(logits, indices), marked)
