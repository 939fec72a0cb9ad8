"""ALERT as the learner of a run: a vision-language model with a bank of category embeddings behind its vocabulary.

It extends `VLMLearner` at five points: before the model is loaded, a few-shot learner may be fitted as the draft; once
it is loaded, its vision tower encodes the few-shot images, which gives the similarities of the categories, the
candidates, and the bank that training starts from; the bank is saved beside the weights; and the draft's own confidence
may take part in the answer (alert/fusion.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alert import fusion as fusions
from alert import references as reference
from alert.bank import embeddings as bank
from alert.bank import file as bank_file
from alert.draft import FILE, ClassMeans, FewShotDraft
from alert.export import into_vocabulary
from alert.prompting import AlertPrompting
from common.config.schema import Config, TrainerConfig
from common.data.loading import make_loader
from common.data.task import dataset_of
from common.evaluation.metrics import truth_places
from common.few_shot import candidates
from common.few_shot.candidates import Candidates
from common.models import files, vlm
from common.models.extra_embeddings import ExtraEmbeddings, attach
from common.models.offloaded import Rule, attach_offloaded
from common.models.vision import VisionTower
from common.run.recorder import Recorder
from common.runtime.distributed import gather, rank
from common.types import Answers, Task, UserError
from common.vlm.learner import VLMLearner
from common.vlm.prompting import Words, ask

EMBEDDINGS = "embeddings"  # folder beside the weights
KEPT = (bank_file.FACTS, bank_file.ENTRIES, FILE)  # files that inference needs beside the weights


class AlertLearner(VLMLearner):
    """ALERT's model with its bank and draft; implements `Learner` (common/learner.py)."""

    prompting: AlertPrompting
    draft: FewShotDraft | None = None  # only with method.draft=few_shot
    means: ClassMeans | None = None
    ranks: Callable[[Task, str], Candidates] | None = None  # candidates of later images
    begun: str | None = None  # hash of the bank that training starts from
    tower: VisionTower  # encodes the images for means and candidates
    fusion: fusions.Fusion | None = None  # of the present weights, once it is fitted

    def prepare(self) -> None:
        """Fit the few-shot learner that serves as the draft, if one is configured."""
        if self.prompting.draft == "few_shot":
            self.draft = FewShotDraft(self.config, self.data, self.device, self.folder / "draft")
            self.prompting.drafted, self.ranks = self.draft.candidates(), self.draft.of

    def setup(self) -> None:
        """Encode the few-shot images, choose the candidates, and put the bank behind the vocabulary."""
        config, prompting = self.config, self.prompting
        trains = config.trainer.name != "none" and config.doctor is not True  # doctor=true leaves no files
        self.tower = tower = self._tower()
        # 1. Initial bank and class means, from the few-shot images (or from an earlier attempt's files).
        entries, self.means = begin(prompting, tower, self.task, self.folder / "model" / EMBEDDINGS if trains else None)
        if trains:
            self.begun = bank_file.bank_hash(entries.float(), self.task.train.names)
        # 2. Candidates of every tested image.
        ranks = name_candidates(prompting, self.means, tower, self.task, self.folder / "draft" if trains else None)
        if not trains and prompting.draft in ("class_means", "oracle_recall"):
            self.ranks = ranks
        elif prompting.patches:
            self.means = None  # ImageNet's patches are 38 GB
        # 3. The bank becomes trainable rows behind the vocabulary; prompts are final from here on.
        extra = attach_bank(self.policy.model, entries, prompting.trainable, config.trainer)
        self.policy = replace(self.policy, extra_embeddings=extra)
        self.prompts = ask(prompting, self.task)

    def sources(self) -> dict[str, str]:
        bank = {} if self.begun is None else {f"model/{EMBEDDINGS}/{bank_file.BEGUN}": self.begun}
        return {**super().sources(), **bank}

    def _tower(self) -> VisionTower:
        """Return the vision tower that encodes images: the model's own, or that of the weights before training."""
        load, policy = make_loader(self.config, self.task), self.policy
        if self.prompting.tower is not None:
            policy = vlm.load(self.prompting.tower, self.config.model, self.device, train=False)
        return VisionTower(policy, load)

    def set_task(self, task: Task) -> None:
        self.tower.load_images = make_loader(self.config, task)
        for split, tested in task.evaluation.items():
            if self.task.evaluation.get(split) is not tested:
                self.prompting.drafted.pop(split, None)
                if self.ranks is not None:
                    self.prompting.drafted[split] = self.ranks(task, split)
        super().set_task(task)

    def train(self, recorder: Recorder) -> int:
        self.fusion = None  # that of the untrained model
        return super().train(recorder)

    def predict(self, split: str, limit: int | None = None) -> Answers:
        answers, kind = super().predict(split, limit), self.prompting.fusion
        if kind == "none" or limit is not None:  # evaluations during training show the model alone
            return answers
        if split == "val" or self.fusion is None:
            self.fusion = self._fused_by(kind, answers if split == "val" else super().predict("val"))
        return fusions.fused(answers, self.prompting.drafted[split], self.task.evaluation[split], self.fusion)

    def _fused_by(self, kind: str, held_out: Answers) -> fusions.Fusion:
        """Return the fusion fitted on answers to the validation images, and write it beside the weights."""
        draft, model = fusions.both(held_out, self.prompting.drafted["val"], self.task.evaluation["val"].names)
        assert held_out.probabilities is not None
        truths = truth_places(held_out.probabilities, [p.label for p in held_out.predictions])
        found = fusions.fit(kind, draft, model, truths)
        if rank() == 0:
            found.save(self.folder / "model")
        return found

    def load(self, folder: Path) -> None:
        if self.prompting.fusion != "none":
            self.fusion = fusions.Fusion.load(folder)

    def save_weights(self, folder: Path) -> None:
        super().save_weights(folder)
        assert self.policy.extra_embeddings is not None
        architecture = str(self.policy.model.config.model_type)
        table = self.policy.extra_embeddings.table().cpu()
        bank_file.export(folder / EMBEDDINGS, table, self.task.train.names, architecture)
        if self.means is not None:
            self.means.save(folder / EMBEDDINGS)

    @classmethod
    def restored(cls, config: Config, folder: Path, began: Callable[[], Config]) -> Config:
        embeddings = folder / EMBEDDINGS
        if not embeddings.is_dir():
            return config
        method = {**config.method, "bank": str(embeddings)}
        if not config.model.freeze_vision:  # candidates come from the tower as it was before training
            method["tower"] = str(files.weights_folder(began()))
        return replace(config, method=method)

    @classmethod
    def answers_alone(cls, config: Config, folder: Path) -> bool:
        return config.method["draft"] == "class_means" and all((folder / EMBEDDINGS / name).is_file() for name in KEPT)

    @classmethod
    def into_vocabulary(cls, config: Config, policy: vlm.VLM, folder: Path) -> Words:
        if not (folder / EMBEDDINGS).is_dir():
            raise UserError(
                f"method={config.method['name']} has trained no category embeddings, and without them its model is the"
                " one that it began from"
            )
        instruction = config.method["instruction"]
        return into_vocabulary(policy.model, policy.processor, policy.pad, folder / EMBEDDINGS, instruction)

    @classmethod
    def kept_files(cls, config: Config, folder: Path) -> tuple[str, ...] | None:
        if not config.model.freeze_vision or not cls.answers_alone(config, folder):
            return None  # candidates could not be chosen again
        fused = [] if config.method.get("fusion", "none") == "none" else [fusions.FILE]
        return (*(f"{EMBEDDINGS}/{name}" for name in KEPT), *fused)


def begin(
    prompting: AlertPrompting, vision: VisionTower, task: Task, folder: Path | None
) -> tuple[torch.Tensor, ClassMeans]:
    """Compute the bank that training starts from and the class means, and set the similarities of the prompting.

    All ranks call it together.

    Args:
        prompting: Prompting of the run, which says how the bank is initialised and receives the similarities.
        vision: Tower and projector of the model.
        task: Task with the few-shot images. Without any, a finished run is loaded, whose bank has what is needed.
        folder: Folder where the initial bank is kept; a resumed run reads it from there. None: nothing is trained, so
            nothing will be resumed.

    Returns:
        The bank, shape [C, m, D], and the mean features of the categories.
    """
    train, count = task.train, len(task.train.names)
    # An earlier attempt counts only if every rank sees its files: they decide together.
    known = folder if folder is not None and all(gather((folder / bank_file.BEGUN).is_file())) else None
    means = None if train.items or prompting.bank is None else ClassMeans.load(prompting.bank)
    image = next(item.image for split in (train, *task.evaluation.values()) for item in split.items)
    shape = (count, *bank.shape_of(vision, image))
    entries = bank_file.known_entries(known, prompting.bank, train.names, shape, vision.architecture)
    # Kept, not recomputed: references are drawn by them, and rounding on another GPU would change the draws.
    prompting.similarities = None if known is None else bank_file.read_similarities(known)
    if means is None or entries is None:
        how = prompting.initialisation if entries is None else None
        seen, fresh = bank.see(vision, train.items, count, how, prompting.seed, prompting.patches)
        entries = fresh if entries is None else entries
        means = ClassMeans(reference.class_means(seen.numpy(), range(count), count), prompting.patches)
    assert entries is not None
    if prompting.similarities is None:
        prompting.similarities = reference.similarities(means.means)
    if folder is not None and known is None and rank() == 0:
        bank_file.save_similarities(folder, prompting.similarities)
        bank_file.export_begun(folder, entries)  # last: its presence marks the files as complete
    return entries, means


def name_candidates(
    prompting: AlertPrompting, means: ClassMeans, vision: VisionTower, task: Task, folder: Path | None = None
) -> Callable[[Task, str], Candidates]:
    """Set the candidates of every split for which no other draft has set them. All ranks call it together.

    Args:
        prompting: Prompting of the run, which receives the candidates.
        means: Mean features of the categories.
        vision: Vision tower that the means were computed with.
        task: Task with the images.
        folder: Folder where candidates are kept; a resumed run reads them from there. None: they are not kept.

    Returns:
        A function that does the same for later images: from a task and the name of a split to its candidates.
    """
    k_with_truth = prompting.k if prompting.draft == "oracle_recall" else None
    ranks = partial(means.candidates, vision, prompting.seed, k_with_truth)
    for split, tested in task.evaluation.items():
        if split in prompting.drafted:
            continue
        path = None if folder is None else folder / candidates.FOLDER / split
        images = [item.image for item in tested.items]
        if path is not None and all(gather(path.with_suffix(".json").is_file())):
            prompting.drafted[split] = candidates.read_candidates(
                path, images, tested.names, dataset_of(task, split), split
            )
            continue
        prompting.drafted[split] = ranks(task, split)
        if path is not None and rank() == 0:
            truths = [item.label for item in tested.items]
            candidates.write_candidates(path, prompting.drafted[split], tested.names, truths)
    return ranks


def attach_bank(model: Any, entries: torch.Tensor, trainable: bool, trainer: TrainerConfig) -> ExtraEmbeddings:
    """Put the bank behind the vocabulary of a model. All ranks call it together.

    Args:
        model: Model to change, in place.
        entries: Category embeddings. Shape: [C, m, D].
        trainable: Train the embeddings.
        trainer: Trainer configuration: place of the bank (device or host) and its optimizer values.
    """
    if trainer.embeddings == "host" and trainable and trainer.name != "none":
        rule = Rule((trainer.betas[0], trainer.betas[1]), trainer.weight_decay)
        return attach_offloaded(model, entries, True, rule)
    return attach(model, entries, trainable)
