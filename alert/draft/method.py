"""The method of a run whose learner is a classifier on frozen features: it asks no questions, and accounts for the
candidates that the classifier would give ALERT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alert.draft import accounting, published, settled
from alert.draft.candidates import DEPTH
from common.config.schema import Config
from common.data.manifest import digest
from common.data.task import Questions
from common.types import Answers, Prediction, Prompt, Task


class Classify:
    """See `Method` in common/method.py; nothing of it is ever said to a model."""

    def __init__(self, *, seed: int, learner: str, shots: int | str, prompts: str | None = None) -> None:
        """
        Args:
            seed: Of the draw, for the record.
            learner: An entry of `few_shot`.
            shots: Of the training.
            prompts: File of sentences about the classes, if CLIP reads one; a run freezes its hash.
        """
        self.seed, self.learner, self.shots, self.prompts = seed, learner, shots, prompts
        self.chosen: dict[str, Any] = {}  # by the learner, once it is fitted: alpha and beta, a strength, an epoch

    def train_prompts(self, task: Task, epoch: int = 0) -> list[Prompt]:
        return [Prompt(item.image, "", item.name) for item in task.train.items]

    def evaluation_prompts(self, task: Task, split: str) -> list[Prompt]:
        asked = task.evaluation[split]
        return [Prompt(item.image, "", item.name, asked.choices) for item in asked.items]

    def well_formed(self, completion: str) -> bool:
        return True

    def answer(self, completion: str) -> str | None:
        return completion

    def label_response(self, name: str) -> str:
        return name

    def sources(self, task: Task) -> dict[str, str]:
        if self.prompts is None:
            return {}
        return {"clip.prompts": digest(Path(self.prompts).expanduser().read_text(encoding="utf-8"))}

    def facts(self, task: Task, split: str, answers: Answers) -> dict[str, Any]:
        """recall@k of the ranking, and whether a published accuracy of ALERT lies above it."""
        ranks: list[int | None] = answers.columns["truth_rank"]
        depth = min(DEPTH, len(task.evaluation[split].choices))
        found = accounting.recall(ranks, depth, (*accounting.RECALL_AT, DEPTH))
        chosen = {"chosen": self.chosen} if self.chosen else {}
        return {**chosen, "draft": found | published.above(settled.dataset_of(task, split), self.shots, found)}

    def columns(self, task: Task, split: str, predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
        return {}  # the learner itself says the rank of the truth


def check(config: Config, questions: Questions) -> None:
    """See `Check` in common/learner.py."""
    settled.check(config, config.method["learner"], questions.task)
