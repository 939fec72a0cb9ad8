"""ALERT as the learner of a run: a vision-language model with a bank of category embeddings behind its vocabulary.

It differs from `VLMLearner` in a few steps: before the model is loaded, a few-shot learner may name the candidates;
once it is loaded, it sees the few-shot images, which gives the similarities of the categories, the candidates and the
bank that training starts from; the bank is saved beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alert import references as reference
from alert.bank import embeddings as bank
from alert.bank import file as bank_file
from alert.draft import FILE, ClassMeans, FewShotDraft
from alert.export import into_vocabulary
from alert.prompting import AlertPrompting
from common.config.schema import Config, TrainerConfig
from common.data.loading import make_loader
from common.data.task import dataset_of
from common.few_shot import candidates
from common.few_shot.candidates import Candidates
from common.models import files, vlm
from common.models.hosted_slots import attach_hosted
from common.models.lazy_adamw import Rule
from common.models.slots import Slots, attach
from common.models.vision import VisionTower
from common.runtime.distributed import gather, rank
from common.types import Task, UserError
from common.vlm import prompting
from common.vlm.learner import VLMLearner
from common.vlm.prompting import Words

EMBEDDINGS = "embeddings"  # folder beside the weights
KEPT = (bank_file.FACTS, bank_file.ENTRIES, FILE)  # all that answering needs, beside the weights


class AlertLearner(VLMLearner):
    """See `Learner` in common/learner.py."""

    prompting: AlertPrompting
    draft: FewShotDraft | None = None  # the few-shot learner that names the candidates, if one does
    means: ClassMeans | None = None
    ranks: Callable[[Task, str], Candidates] | None = None  # names candidates of pictures that come later
    begun: str | None = None  # hash of the bank that training starts from
    tower: VisionTower  # what sees the pictures

    def prepare(self) -> None:
        """Fit the few-shot learner that names the candidates, if the draft is one."""
        if self.prompting.draft == "few_shot":
            self.draft = FewShotDraft(self.config, self.data, self.device, self.folder / "draft")
            self.prompting.drafted, self.ranks = self.draft.candidates(), self.draft.of

    def setup(self) -> None:
        """See the pictures, name the candidates, and put the bank behind the vocabulary."""
        config, asked = self.config, self.prompting
        trains = config.trainer.name != "none" and config.doctor is not True  # which leaves nothing behind
        self.tower = tower = self._tower()
        entries, self.means = begin(asked, tower, self.task, self.folder / "model" / EMBEDDINGS if trains else None)
        if trains:
            self.begun = bank_file.bank_hash(entries.float(), self.task.train.names)
        ranks = name_candidates(asked, self.means, tower, self.task, self.folder / "draft" if trains else None)
        if not trains and asked.draft in ("class_means", "oracle_recall"):
            self.ranks = ranks
        elif asked.patches:
            self.means = None  # ImageNet's patches are 38 GB
        slots = attach_bank(self.policy.model, entries, asked.trainable, config.trainer)
        self.policy = replace(self.policy, slots=slots)
        self.prompts = prompting.ask(asked, self.task)

    def sources(self) -> dict[str, str]:
        bank = {} if self.begun is None else {f"model/{EMBEDDINGS}/{bank_file.BEGUN}": self.begun}
        return {**super().sources(), **bank}

    def _tower(self) -> VisionTower:
        """What sees the pictures: the model's own tower, or the one that chose the candidates before it was trained."""
        load, policy = make_loader(self.config, self.task), self.policy
        if self.prompting.tower is not None:
            policy = vlm.load(self.prompting.tower, self.config.model, self.device, train=False)
        return VisionTower(policy, load)

    def set_task(self, task: Task) -> None:
        self.tower.load_images = make_loader(self.config, task)
        for split, asked in task.evaluation.items():
            if self.task.evaluation.get(split) is not asked:
                self.prompting.drafted.pop(split, None)
                if self.ranks is not None:
                    self.prompting.drafted[split] = self.ranks(task, split)
        super().set_task(task)

    def save_weights(self, folder: Path) -> None:
        super().save_weights(folder)
        assert self.policy.slots is not None
        architecture = str(self.policy.model.config.model_type)
        table = self.policy.slots.table().cpu()
        bank_file.export(folder / EMBEDDINGS, table, self.task.train.names, architecture)
        if self.means is not None:
            self.means.save(folder / EMBEDDINGS)

    @classmethod
    def restored(cls, config: Config, folder: Path, began: Callable[[], Config]) -> Config:
        embeddings = folder / EMBEDDINGS
        if not embeddings.is_dir():
            return config
        method = {**config.method, "bank": str(embeddings)}
        if not config.model.freeze_vision:  # the run chose its candidates before it trained the tower
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
            return None  # nobody else could choose its candidates
        return tuple(f"{EMBEDDINGS}/{name}" for name in KEPT)


def begin(
    asked: AlertPrompting, vision: VisionTower, task: Task, folder: Path | None
) -> tuple[torch.Tensor, ClassMeans]:
    """See every few-shot image: tell the prompting which categories are alike, and return what training starts from.
    All ranks call it together.

    Args:
        asked: Says how; is told the similarities.
        vision: Tower and projector of the model.
        task: With the few-shot images. Without any, a finished run is asked: its bank holds what was seen of them.
        folder: Where the bank that a training starts from is kept; a continued run takes it from there. None: nothing
            is trained, so nothing will be continued.

    Returns:
        The bank, shape [C, m, D], and the mean features of the categories.
    """
    train, count = task.train, len(task.train.names)
    known = folder if folder is not None and all(gather((folder / bank_file.BEGUN).is_file())) else None
    means = None if train.items or asked.bank is None else ClassMeans.load(asked.bank)
    image = next(item.image for split in (train, *task.evaluation.values()) for item in split.items)
    shape = (count, *bank.shape_of(vision, image))
    entries = bank_file.known_entries(known, asked.bank, train.names, shape, vision.architecture)
    asked.similarities = None if known is None else bank_file.read_similarities(known)
    if means is None or entries is None:
        how = asked.initialisation if entries is None else None
        seen, fresh = bank.see(vision, train.items, count, how, asked.seed, asked.patches)
        entries = fresh if entries is None else entries
        means = ClassMeans(reference.class_means(seen.numpy(), range(count), count), asked.patches)
    assert entries is not None
    if asked.similarities is None:
        asked.similarities = reference.similarities(means.means)
    if folder is not None and known is None and rank() == 0:
        bank_file.save_similarities(folder, asked.similarities)
        bank_file.export_begun(folder, entries)  # at last: with it all of them are known
    return entries, means


def name_candidates(
    asked: AlertPrompting, means: ClassMeans, vision: VisionTower, task: Task, folder: Path | None = None
) -> Callable[[Task, str], Candidates]:
    """Tell the prompting the candidates of every split that no other draft has named. All ranks call it together.

    Args:
        asked: Is told the candidates.
        means: Mean features of the categories.
        vision: What the means were seen with.
        task: With the images.
        folder: Where they are kept; a continued run takes them from there. None: they are not kept.

    Returns:
        The same for pictures that come later: from a task and the name of a split to its candidates.
    """
    ranks = partial(means.candidates, vision, asked.seed, asked.k if asked.draft == "oracle_recall" else None)
    for split, tested in task.evaluation.items():
        if split in asked.drafted:
            continue
        path = None if folder is None else folder / candidates.FOLDER / split
        images = [item.image for item in tested.items]
        if path is not None and all(gather(path.with_suffix(".json").is_file())):
            asked.drafted[split] = candidates.read_candidates(
                path, images, tested.names, dataset_of(task, split), split
            )
            continue
        asked.drafted[split] = ranks(task, split)
        if path is not None and rank() == 0:
            truths = [item.label for item in tested.items]
            candidates.write_candidates(path, asked.drafted[split], tested.names, truths)
    return ranks


def attach_bank(model: Any, entries: torch.Tensor, trainable: bool, trainer: TrainerConfig) -> Slots:
    """Put the bank behind the vocabulary of a model. All ranks call it together.

    Args:
        model: Is changed.
        entries: The bank. Shape: [C, m, D].
        trainable: Whether training moves it.
        trainer: Says where it lies and how it is trained.
    """
    if trainer.embeddings == "host" and trainable and trainer.name != "none":
        rule = Rule((trainer.betas[0], trainer.betas[1]), trainer.weight_decay)
        return attach_hosted(model, entries, True, rule)
    return attach(model, entries, trainable)
