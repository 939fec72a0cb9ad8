"""Evaluation: greedy answers to the prompts of a split, matched strictly and as the authors' code does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

from common import metrics, parsing
from common.distributed import gather, interleave, share_of
from common.engine import micro_batches
from common.models.vlm import Encoder
from common.progress import progress
from common.rollout.base import Completion, Decoding, Rollout
from common.schema import Rollout as RolloutConfig
from common.task import Questions
from common.types import Method, Prediction, Prompt


@dataclass(frozen=True)
class Evaluation:
    """Predictions by split, in the order of the task, and their summaries (see `metrics.summarize`)."""

    predictions: dict[str, list[Prediction]]
    summary: dict[str, dict[str, Any]]

    @property
    def accuracies(self) -> dict[str, float]:
        """Metric name to value, as metrics.jsonl and the tracker take them."""
        return {
            f"eval/{split}/{key}": found[key]
            for split, found in self.summary.items()
            for key in ("accuracy", "accuracy_official", "n")
        }


class Recorder(Protocol):
    """Where finished splits are kept (see common/recorder.py)."""

    def kept(self, phase: str, split: str) -> tuple[list[Prediction], float] | None:
        """Predictions and seconds of a finished split."""

    def keep(self, phase: str, split: str, found: list[Prediction], seconds: float) -> None:
        """Keep them."""


class Evaluator:
    """Asks the model the evaluation questions. Ranks share the work, and every rank gets all predictions."""

    def __init__(self, rollout: Rollout, encoder: Encoder, questions: Questions, config: RolloutConfig) -> None:
        """
        Args:
            rollout: Sampling backend, used greedily.
            encoder: Prompts to tensors.
            questions: Task and method.
            config: Limits on tokens and batch size.
        """
        self.rollout, self.encoder, self.questions = rollout, encoder, questions
        self.decoding, self.batch = greedy(config.max_completion_tokens), config.evaluation_batch

    def all_splits(self, phase: str, recorder: Recorder) -> Evaluation:
        """Every image of every split; splits that an earlier attempt of the run finished are not asked again."""
        predictions, summary = {}, {}
        for split, prompts in self.questions.evaluation.items():
            kept = recorder.kept(phase, split)
            if kept is None:
                start = time.perf_counter()
                found = self._predict(prompts, f"evaluating {split} ({phase.replace('_', '-')})")
                kept = found, time.perf_counter() - start
                recorder.keep(phase, split, *kept)
            predictions[split] = kept[0]
            summary[split] = metrics.summarize(kept[0], self.questions.task.names, kept[1])
        return Evaluation(predictions, summary)

    def during_training(self, limit: int | None) -> Evaluation:
        """The first `limit` images of val where the task has one, else of test."""
        start = time.perf_counter()
        found = self._predict(self.questions.evaluation[self.watched][:limit], f"evaluating {self.watched} (training)")
        summary = metrics.summarize(found, self.questions.task.names, time.perf_counter() - start)
        return Evaluation({self.watched: found}, {self.watched: summary})

    @property
    def watched(self) -> str:
        """The split that is evaluated during training."""
        return "val" if "val" in self.questions.evaluation else "test"

    def _predict(self, prompts: list[Prompt], description: str) -> list[Prediction]:
        slices = list(micro_batches(share_of(prompts), self.batch))
        found = []
        for part in progress(slices, description, len(slices)):
            groups = self.rollout.generate(self.encoder(part), 1, self.decoding, [""] * len(part))
            found += [grade(self.questions.method, p, group[0]) for p, group in zip(part, groups, strict=True)]
        return interleave(gather(found))


def greedy(max_tokens: int) -> Decoding:
    """The decoding of every evaluation; named in metrics.json."""
    return Decoding(temperature=0.0, top_k=0, top_p=1.0, max_tokens=max_tokens)


def grade(method: Method, prompt: Prompt, completion: Completion) -> Prediction:
    """Compare one completion with its label."""
    text = completion.text
    strict = parsing.strict_answer(text)
    return Prediction(
        image=prompt.image,
        label=prompt.label,
        answer=strict or "",
        completion=text,
        correct=parsing.matches_strictly(text, prompt.label),
        correct_official=parsing.matches_officially(text, prompt.label),
        formatted=method.well_formed(text),
        tokens=len(completion.ids),
        truncated=completion.truncated,
    )
