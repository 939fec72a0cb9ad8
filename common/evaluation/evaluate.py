"""Evaluate a learner on the splits of its task: collect answers and compute metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from common.evaluation import metrics
from common.evaluation.metrics import Summary
from common.types import Answers, Task

T = TypeVar("T")
# Names in metrics.jsonl, and the fields of a summary's `probability`.
PROBABILITY = {"probability_accuracy": "top1", "top5_accuracy": "top5", "ece": "ece", "brier": "brier"}


class Predictor(ABC):
    """Interface for evaluation. Ranks share the work of `predict`, and every rank gets all answers."""

    task: Task

    @abstractmethod
    def predict(self, split: str, limit: int | None = None) -> Answers:
        """Return answers to a split of the task, with class probabilities if the learner has them.

        `limit`: answer only so many images (see `evenly_spaced`), without probabilities.
        """

    def diagnostics(self, split: str, answers: Answers) -> dict[str, Any]:
        """Return further entries of metrics.json on a split's predictions, beside the accuracies.

        The answers may be from an earlier attempt of the run; their columns describe that attempt.
        """
        return {}


class PredictionCache(Protocol):
    """Storage of finished splits (see common/run/recorder.py)."""

    def kept(self, phase: str, split: str) -> Answers | None:
        """Return the answers of a finished split, or None."""

    def keep(self, phase: str, split: str, answers: Answers) -> None:
        """Save the answers of a finished split."""


@dataclass(frozen=True)
class Evaluation:
    """Answers by split, in the order of the task, and their summaries."""

    answers: dict[str, Answers]
    summary: dict[str, Summary]

    @property
    def overall(self) -> dict[str, float]:
        """Numbers for several splits, see `metrics.overall`."""
        return metrics.overall({split: summary.accuracy for split, summary in self.summary.items()})

    @property
    def scalars(self) -> dict[str, float]:
        """Metrics by name, for metrics.jsonl and the tracker."""
        scalars: dict[str, float] = {}
        for split, summary in self.summary.items():
            named = {name: getattr(summary, name) for name in ("accuracy", "accuracy_macro", "accuracy_official", "n")}
            if summary.probability is not None:
                named |= {name: getattr(summary.probability, key) for name, key in PROBABILITY.items()}
            scalars |= {f"eval/{split}/{name}": value for name, value in named.items() if value is not None}
        return scalars | {f"eval/{name}": value for name, value in self.overall.items()}


def all_splits(predictor: Predictor, phase: str, cache: PredictionCache) -> Evaluation:
    """Evaluate every image of every split, `before` or `after` training.

    Splits that an earlier attempt of the run finished are read from the cache.
    """
    answers = {}
    for split in predictor.task.evaluation:
        known = cache.kept(phase, split)
        answers[split] = predictor.predict(split) if known is None else known
        if known is None:
            cache.keep(phase, split, answers[split])
    return _summarized(predictor, answers)


def during_training(predictor: Predictor, limit: int | None) -> Evaluation:
    """Evaluate `limit` images of the monitored split, without probabilities."""
    split = monitor_split(predictor.task)
    images = len(predictor.task.evaluation[split].items)
    return _summarized(predictor, {split: predictor.predict(split, images if limit is None else limit)})


def monitor_split(task: Task) -> str:
    """Return the split to evaluate during training: val if there is one, else the first test split."""
    return "val" if "val" in task.evaluation else next(iter(task.evaluation))


def _summarized(predictor: Predictor, answers: dict[str, Answers]) -> Evaluation:
    summary = {}
    for split, split_answers in answers.items():
        tested = predictor.task.evaluation[split]
        facts = predictor.diagnostics(split, split_answers)
        summary[split] = metrics.summarize(split_answers, tested.choices, aliases=bool(tested.aliases), facts=facts)
    return Evaluation(answers, summary)


def evenly_spaced(items: Sequence[T], limit: int | None) -> list[T]:
    """Return at most `limit` items, evenly spaced, since splits are often sorted by class.

    >>> evenly_spaced([0, 1, 2, 3, 4, 5, 6], 3), evenly_spaced([0, 1], 3), evenly_spaced([0, 1], None)
    ([0, 2, 4], [0, 1], [0, 1])
    """
    if limit is None or limit >= len(items):
        return list(items)
    return [items[number * len(items) // limit] for number in range(limit)]
