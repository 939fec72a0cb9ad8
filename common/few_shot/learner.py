"""Run a few-shot learner on frozen features: as the learner of a run (common/learner.py), or as ALERT's draft."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from common.config.schema import Config
from common.data import manifest
from common.data.duplicates import thumbnail
from common.data.folder import is_added
from common.data.loading import on_all
from common.data.manifest import digest
from common.data.task import TaskData, dataset_of, own_labels
from common.evaluation import novelty
from common.evaluation.calibration import log_probabilities, log_softmax
from common.evaluation.evaluate import Evaluation, evenly_spaced
from common.few_shot import candidates, doubts
from common.few_shot.check import make, name_of
from common.few_shot.encoders import generated, texts
from common.few_shot.encoders.encoder import TEST, TextEncoder, View, load
from common.few_shot.encoders.store import CachedFeatures, Rows
from common.few_shot.heads.base import CHUNK, FewShotHead, Pictures, Support, Text
from common.few_shot.heads.folds import FOLDS, divide, out_of_fold, out_of_selection, stratified
from common.few_shot.heads.zero_shot import text_weights
from common.learner import Learner
from common.run import loop
from common.run.checkpoint import Checkpoints
from common.run.recorder import Recorder
from common.runtime import saved
from common.runtime.distributed import barrier, rank
from common.runtime.progress import doing
from common.training.base import Step
from common.types import Answers, Images, Item, Prediction, Probabilities, Task, UserError

# Features: the encoders of a run, applied to the images and class names of a task.


class FeatureExtractor:
    """The encoders that a learner needs, and their cached features. All ranks call the methods together."""

    def __init__(self, config: Config, learner: FewShotHead, device: torch.device) -> None:
        """
        Args:
            config: Configuration of the run.
            learner: Learner whose `needs` decide which encoders are loaded.
            device: Device of the encoders and of the features.

        Raises:
            UserError: Weights are missing or of another model.
        """
        self.config, self.needs, self.crop, self.device = config, learner.needs, learner.crop, device
        cache = Path(config.cache_dir)
        clip_config, visual_config = config.clip, config.visual  # at least one is set: `check_fit` has seen to it
        self.clip = (
            cast(TextEncoder, load("clip", clip_config, device, cache)) if clip_config and clip_config.load else None
        )
        # The visual encoder replaces a missing CLIP; beside CLIP only a learner that uses a second encoder gets it.
        beside = self.clip is None or "second" in learner.needs
        self.visual = (
            load("visual", visual_config, device, cache) if beside and visual_config and visual_config.load else None
        )
        encoders = [each for each in (self.clip, self.visual) if each is not None]
        self.weights = {
            "path": "; ".join(each.source for each in encoders),
            "sha256": "+".join(each.identity for each in encoders),
        }
        # CLIP comes first, so encoded[0] gives the main features and encoded[1], if any, the second ones.
        self.encoded = [
            CachedFeatures(each, cache, chosen.dtype, chosen.batch)
            for chosen, each in ((clip_config, self.clip), (visual_config, self.visual))
            if chosen is not None and each is not None
        ]

    def close(self) -> None:
        """Close this process's cache files."""
        for each in self.encoded:
            each.close()

    def text(self, names: Sequence[str]) -> Text:
        """Encode class names with CLIP's text tower, one weight vector per class; without CLIP, keep only the names."""
        chosen = self.config.clip
        if self.clip is None or chosen is None:
            return Text(tuple(names))
        if chosen.prompts is None:
            sentences = texts.of_templates(names, chosen.templates)
        else:
            sentences = texts.of_file(Path(chosen.prompts).expanduser(), names)
        # One forward over the sentences of all classes, then back to one tensor per class.
        features = self.clip.texts([sentence for each in sentences for sentence in each])
        parts = features.split([len(each) for each in sentences])
        return Text(
            tuple(names), text_weights(parts).to(self.device), self.clip, tuple(p.to(self.device) for p in parts)
        )

    def chunks(self, images: Images, items: Sequence[Item]) -> Iterator[Pictures]:
        """Yield the test views of images, CHUNK at a time, which bounds the memory."""
        rows = self._rows(images, items, TEST, maps="maps" in self.needs)
        for start in range(0, len(items), CHUNK):
            yield self._pictures(rows, items[start : start + CHUNK], slice(start, start + CHUNK))

    def pictures(self, images: Images, items: Sequence[Item]) -> Pictures:
        """Return the test views of images, all at once."""
        return self._pictures(self._rows(images, items, TEST, maps="maps" in self.needs), items, slice(None))

    def support(self, task: Task, source: str | None = None, per_class: int = 0) -> Support:
        """Return the shots of a task, with generated images as more shots if there are any."""
        made = replace(
            self._support(task.images, task.train.items), groups=tuple(item.group for item in task.train.items)
        )
        if source is None or not per_class:
            return made
        drawn = generated.pick("few_shot.generated", source, per_class, task.train.names, self.config.seed)
        return replace(made, generated=self._support(generated.Folder(), drawn))

    def _support(self, images: Images, items: Sequence[Item]) -> Support:
        chosen = self.config.clip if self.clip is not None else self.config.visual
        assert chosen is not None, "an encoder was loaded"
        scale = self.crop if chosen.crop is None else (chosen.crop[0], chosen.crop[1])
        known: dict[int, list[Rows | None]] = {}  # rows on disk, by view: all features would fill the memory

        def view(number: int) -> Pictures:
            if number not in known:
                wanted = View(number, self.config.seed, scale, chosen.flip)
                known[number] = self._rows(images, items, wanted, maps=False)
            return self._pictures(known[number], items, slice(None))

        return Support(self.pictures(images, items), view, chosen.views)

    def _rows(self, images: Images, items: Sequence[Item], view: View, maps: bool) -> list[Rows | None]:
        keys = [item.image for item in items]
        # Always three entries: main features, second features or None, maps or None.
        rows: list[Rows | None] = [each.images(images, keys, view) for each in self.encoded]
        rows = [*rows, None] if len(rows) == 1 else rows
        return [*rows, self.encoded[0].maps(images, keys, view) if maps else None]

    def _pictures(self, rows: list[Rows | None], items: Sequence[Item], part: slice) -> Pictures:
        images, second, maps = (None if each is None else each[part].to(self.device) for each in rows)
        assert images is not None
        return Pictures(images, torch.tensor([item.label for item in items], device=self.device), maps, second)


# The learner of a run. One update in the log is one epoch; a learner that is fitted in one go makes a single update.
log = logging.getLogger(__name__)
STATE = "few_shot.pt"


class FewShotLearner(Learner):
    """A few-shot learner as `Learner`, and as `Trainer` (common/training/base.py) with one epoch per step."""

    tokens = 0.0

    def __init__(
        self, config: Config, data: TaskData, device: torch.device, folder: Path, checkpoints: Checkpoints
    ) -> None:
        """Build the learner and its encoders; arguments as in `Learner`. `folder` receives the candidates for ALERT."""
        self.config, self.data, self.task, self.name = config, data, data.task, name_of(config)
        self.folder, self.checkpoints = folder, checkpoints
        manifest.freeze_prompts(folder, {}, sources(config))
        self.learner: FewShotHead = make(config)
        self.features = FeatureExtractor(config, self.learner, device)
        self.weights = self.features.weights
        # Refuses to continue a run whose encoder weights have changed.
        checkpoints.begin_from(self.weights["sha256"], self.weights["path"])
        self.texts: dict[tuple[str, ...], Text] = {}
        self.facts: dict[str, Any] = {}
        self.begun = False
        # Of a fit with cross-validation: logits of the training images by fits on others [N, C], NaN for images in no
        # part; and what tells unusual images.
        self.out_of_fold: torch.Tensor | None = None
        self.detector: novelty.Detector | None = None
        self.is_restored = False

    @property
    def decoding(self) -> str:
        return f"the highest of {self.name}'s logits"

    @property
    def blank(self) -> bool:
        return self.learner.steps > 0 and self.features.clip is None

    @property
    def remarks(self) -> list[str]:
        by_test = "selected on the test images" if self.begun and self.learner.chosen_by_test else ""
        return [each for each in (self.learner.remark, by_test) if each]

    def predict(self, split: str, limit: int | None = None) -> Answers:
        began, tested = time.perf_counter(), self.task.evaluation[split]
        items = evenly_spaced(list(tested.items), limit)
        logits = self.logits(split, items)
        chosen = logits.argmax(1)
        # A classifier is right if the class index is; aliases and the official matching do not apply.
        made = [
            Prediction(item.image, item.name, item.label, tested.names[c], bool(c == item.label), bool(c == item.label))
            for item, c in zip(items, chosen.tolist(), strict=True)
        ]
        ranks: list[Any] = self._truth_ranks(split, items, logits, write=limit is None)
        likely = probabilities(logits, tested.names, tested.choices)
        columns: dict[str, list[Any]] = {"truth_rank": ranks}
        if self.is_restored and self.detector is not None:
            features = [part.images.float().cpu().numpy() for part in self.features.chunks(self.task.images, items)]
            columns["p_value"] = self.detector.p_values(np.concatenate(features)).tolist()
        return Answers(made, time.perf_counter() - began, likely, 0.0, columns)

    def diagnostics(self, split: str, answers: Answers) -> dict[str, Any]:
        """Return what the fit chose, and recall@k of the ranking."""
        ranks: list[int | None] = answers.columns["truth_rank"]
        depth = min(candidates.DEPTH, len(self.task.evaluation[split].choices))
        found = candidates.recall(ranks, depth, (*candidates.RECALL_AT, candidates.DEPTH))
        return {**({"chosen": self.facts} if self.facts else {}), "draft": found}

    def held_out(self, after: Evaluation) -> tuple[str, Answers] | None:
        """Return the predictions of the training images out of cross-validation, or those of the validation images."""
        if self.out_of_fold is None:
            return super().held_out(after)
        rows = self.out_of_fold.cpu().numpy()
        there = ~np.isnan(rows).any(1)
        train = self.task.train
        items = [item for item, known in zip(train.items, there.tolist(), strict=True) if known]
        made = [
            Prediction(item.image, item.name, item.label, train.names[c], c == item.label, c == item.label)
            for item, c in zip(items, rows[there].argmax(1).tolist(), strict=True)
        ]
        return "folds", Answers(made, 0.0, probabilities(rows[there], train.names, train.choices))

    def examine_data(self, held_out: Answers, after: Evaluation) -> None:
        """Write doubts.csv: labels that learners contradict that had not seen them, outliers, copies."""
        task = self.task
        # two classes of one name (ImageNet's missiles) cannot be told apart by an answer
        if self.out_of_fold is None or len(task.train.choices) < len(task.train.names):
            return
        items, parts = list(task.train.items), ["train"] * len(task.train.items)
        known = dict(zip([p.image for p in held_out.predictions], rows_of(held_out), strict=True))
        if (answers := after.answers.get("test")) is not None:
            own = own_labels(task, "test")
            items += [replace(item, label=own[item.label]) for item in task.evaluation["test"].items]
            parts += ["test"] * len(task.evaluation["test"].items)
            known |= dict(zip([p.image for p in answers.predictions], rows_of(answers), strict=True))
        unknown = np.full(len(task.train.choices), np.nan)
        dataset = self.config.data.name
        # photos that a table of corrections has added were labelled by hand, and lie elsewhere
        own_photos = [number for number, item in enumerate(items) if not is_added(item.image, dataset)]
        items, parts = [items[number] for number in own_photos], [parts[number] for number in own_photos]
        features = self.features.pictures(task.images, items).images.cpu().numpy()
        if rank() == 0:
            keys = [item.image for item in items]
            small = on_all(lambda key: thumbnail(task.images.open(key)), keys, os.cpu_count() or 1)
            photos = doubts.Examined(
                [item.image.removeprefix(f"{dataset}/") for item in items],
                parts,
                np.array([item.label for item in items]),
                np.array([known.get(item.image, unknown) for item in items]),
                features,
                np.stack(small),
            )
            doubts.write(doubts.find(photos, task.train.names), self.folder / doubts.FILE)
        barrier()

    def write_unselected(self) -> None:
        """Write the validation images' candidates for ALERT by fits that did not choose their settings by them."""
        if not (self.learner.steps and self.learner.chooses):
            self.predict("val")
            return
        items = list(self.task.evaluation["val"].items)
        with doing(f"{self.name}: {FOLDS} fits more, for validation images that chose nothing"):
            found = out_of_selection(self.learner, lambda: make(self.config), self.config.seed)
        # columns of the split's classes, which the fit has as training classes
        self._truth_ranks("val", items, found.cpu().numpy()[:, own_labels(self.task, "val")], write=True)

    def set_task(self, task: Task) -> None:
        self.task = task  # cached features are keyed by the content of images, so none becomes stale

    def train(self, recorder: Recorder) -> int:
        return self.fit(recorder)

    @classmethod
    def answers_alone(cls, config: Config, folder: Path) -> bool:
        return True  # the model folder holds the fitted head

    def load(self, folder: Path) -> None:
        head = saved.load(folder / STATE, self.features.device)
        try:
            self.learner.ready(head, self._text(self.task.train.names))
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{folder / STATE} is of a version that kept less of {self.name} ({error}); fit it again under another"
                " run_name"
            ) from error
        self.detector, self.is_restored = novelty.Detector.load(folder), True

    def _begin(self) -> None:
        learner, task = self.learner, self.task
        support = self.features.support(task, learner.generated, learner.generated_per_class)
        learner.begin(support, self._labelled("val"), self._text(task.train.names), self._tested())
        self.begun = True

    def fit(self, recorder: Recorder) -> int:
        """Make all steps, resuming from the last checkpoint, and return their number."""
        learner = self.learner
        if not learner.steps:
            return 0
        self._begin()
        if self.checkpoints.resumed is not None:
            learner.restore(saved.load(self.checkpoints.resumed / STATE, self.features.device))
        # `self` is both what the loop evaluates (predictor) and what it trains (trainer).
        made = loop.train(self, self, learner.steps, self.config, self.checkpoints, recorder, self._save_state)
        self.facts = learner.end()
        self._cross_validate()
        log.info("%s chose %s", self.name, self.facts)
        return made

    def _cross_validate(self) -> None:
        """Take over the predictions of a fit that was cross-validated, or make them with `calibration=folds`."""
        learner, train = self.learner, self.learner.train
        found = learner.out_of_fold()
        if found is not None:
            # One repeat, so that every image counts once, as a new one would.
            parts, self.out_of_fold = found[0], found[1][0].float()
        elif self.config.calibration == "folds":
            (parts,) = divide(train.seen.labels.tolist(), train.groups, FOLDS, 1, self.config.seed)
            with doing(f"{self.name}: {FOLDS} fits more, to calibrate confidences"):
                self.out_of_fold = out_of_fold(learner, lambda: make(self.config), parts)
        if self.out_of_fold is not None and not self.out_of_fold.isnan().all():
            features, labels = (each.cpu().numpy() for each in (train.seen.images.float(), train.seen.labels))
            self.detector = novelty.calibrated(features, labels, parts)
        else:
            self.out_of_fold = None

    def novelty(self) -> dict[str, Any]:
        """Measure how well photos of a class that is left out are told from the others."""
        if self.detector is None:
            return {}
        train = self.learner.train
        features, labels = (each.cpu().numpy() for each in (train.seen.images.float(), train.seen.labels))
        return novelty.measure(
            features,
            labels,
            self.task.train.names,
            lambda kept: stratified(kept.tolist(), FOLDS, str(self.config.seed)),
        )

    def step(self, update: int) -> Step:
        clock = time.perf_counter()
        metrics = self.learner.step(update)
        return Step(metrics, {"fitting": time.perf_counter() - clock}, [])

    def save(self, folder: Path) -> None:
        self._write(folder, self.learner.head())
        if self.detector is not None and rank() == 0:
            self.detector.save(folder)

    def _save_state(self, folder: Path) -> None:
        self._write(folder, self.learner.state())

    def _write(self, folder: Path, values: dict[str, Any]) -> None:
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(values, folder / STATE)
        barrier()

    @contextmanager
    def sampling(self, sampler_only: bool = False) -> Iterator[None]:
        yield

    def restore(self, folder: Path, done: int) -> None:
        self.learner.restore(saved.load(folder / STATE, self.features.device))

    def close(self) -> None:
        self.features.close()

    def logits(self, split: str, items: list[Item]) -> NDArray[np.float32]:
        """Return the logits of images of a split over the split's classes. Shape: [N, C]."""
        task = self.task
        # A learner of fixed classes gives one column per training class: the split's own classes are picked from them
        # below.
        fixed = self.learner.fixed_classes
        text = self._text(task.train.names if fixed else task.evaluation[split].names)
        parts = []
        with torch.no_grad():
            for part in self.features.chunks(task.images, items):
                parts.append(self.learner.logits(part, text).float().cpu().numpy())
        logits = np.concatenate(parts)
        return logits[:, own_labels(task, split)] if fixed else logits

    def _text(self, names: tuple[str, ...]) -> Text:
        if names not in self.texts:
            self.texts[names] = self.features.text(names)
        return self.texts[names]

    def _labelled(self, split: str) -> Pictures | None:
        """Return the images of a split, labelled with the training classes."""
        task = self.task
        if split not in task.evaluation:
            return None
        own = own_labels(task, split)
        items = [replace(item, label=own[item.label]) for item in task.evaluation[split].items]
        return self.features.pictures(task.images, items)

    def _tested(self) -> Pictures | None:
        """Return, with `selection=paper`, the images of the first test split, labelled with the training classes."""
        if self.config.selection != "paper":
            return None
        first = next(split for split in self.task.evaluation if split != "val")
        return self._labelled(first)

    def _truth_ranks(self, split: str, items: list[Item], logits: NDArray[np.float32], write: bool) -> list[int | None]:
        """Return the rank of the true class per image, from 1, or None. With `write` also write the candidates."""
        task, config = self.task, self.config
        tested, dataset = task.evaluation[split], dataset_of(task, split)
        origin = candidates.Origin(self.name, dataset, config.shots, config.seed)
        ranked = candidates.rank([item.image for item in items], logits, tested.names, origin)
        truths = [item.label for item in items]
        if write and rank() == 0:
            about = {
                "manifest": self.data.manifest["hash"],
                "selection": config.selection,
                "chosen": self.facts,
                **self.weights,
            }
            candidates.write_candidates(self.folder / candidates.FOLDER / split, ranked, tested.names, truths, about)
        barrier()
        return candidates.truth_ranks(ranked, tested.names, truths)


def rows_of(answers: Answers) -> NDArray[np.float64]:
    """Return the probabilities by which labels are doubted. Shape: [N, C]."""
    # By logarithms, so that very unlikely labels keep their order. Uncalibrated: with labels swapped on purpose, a
    # temperature found no more of them and the calibrated curve none, since it takes the wrong labels for errors.
    assert answers.probabilities is not None, "a few-shot learner has probabilities"
    return np.exp(log_probabilities(answers.probabilities))


def probabilities(logits: NDArray[np.float32], names: tuple[str, ...], choices: tuple[str, ...]) -> Probabilities:
    """Return the softmax over class names; classes with the same name are added up.

    Args:
        logits: Logits of the classes. Shape: [N, C].
        names: Class names. Length: C.
        choices: Names without duplicates.
    """
    logs = log_softmax(logits.astype(np.float64))
    if len(choices) < len(names):
        place = {name: number for number, name in enumerate(choices)}
        merged = np.full((len(logs), len(choices)), -np.inf)
        for label, name in enumerate(names):
            merged[:, place[name]] = np.logaddexp(merged[:, place[name]], logs[:, label])
        logs = merged
    everyone = np.broadcast_to(np.arange(len(choices), dtype=np.int32), logs.shape)
    return Probabilities(choices, everyone, np.exp(logs).astype(np.float32), logs=logs.astype(np.float32))


def sources(config: Config) -> dict[str, str]:
    """Return a hash of the file with sentences about the classes, if CLIP reads one."""
    if config.clip is None or config.clip.prompts is None:
        return {}
    return {"clip.prompts": digest(Path(config.clip.prompts).expanduser().read_text(encoding="utf-8"))}
