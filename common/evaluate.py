"""Evaluation: greedy answers to the prompts of a split, matched strictly and as the authors' code does, and the
probability of every name that a prompt offers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from common import metrics, parsing
from common.distributed import gather, interleave, share_of
from common.engine import micro_batches
from common.grpo.packing import Encoded
from common.label_scores import LabelScorer
from common.models.vlm import Encoder
from common.progress import progress
from common.rollout.base import Completion, Decoding, Rollout
from common.schema import Rollout as RolloutConfig
from common.task import Questions
from common.types import Method, Prediction, Prompt

# Name in metrics.jsonl to its name in a summary's `probability`.
PROBABILITY = {"probability_accuracy": "top1", "top5_accuracy": "top5", "ece": "ece", "brier": "brier"}


@dataclass(frozen=True)
class Evaluation:
    """Predictions by split, in the order of the task, and their summaries (see `metrics.summarize`)."""

    predictions: dict[str, list[Prediction]]
    summary: dict[str, dict[str, Any]]

    @property
    def scalars(self) -> dict[str, float]:
        """Metric name to value, as metrics.jsonl and the tracker take them."""
        scalars: dict[str, float] = {}
        for split, found in self.summary.items():
            scalars |= {f"eval/{split}/{key}": found[key] for key in ("accuracy", "accuracy_official", "n")}
            if "probability" in found:
                scalars |= {f"eval/{split}/{name}": found["probability"][key] for name, key in PROBABILITY.items()}
        return scalars


class Evaluator:
    """Asks the model the evaluation questions. Ranks share the work, and every rank gets all predictions."""

    def __init__(
        self,
        rollout: Rollout,
        encoder: Encoder,
        questions: Questions,
        config: RolloutConfig,
        labels: LabelScorer | None,
    ) -> None:
        """
        Args:
            rollout: Sampling backend, used greedily.
            encoder: Prompts to tensors.
            questions: Task and method.
            config: Limits on tokens and batch size.
            labels: Scores the class names in `all_splits`; None leaves them out.
        """
        self.rollout, self.encoder, self.questions, self.labels = rollout, encoder, questions, labels
        self.decoding, self.batch = greedy(config.max_completion_tokens), config.evaluation_batch

    def all_splits(self, note: str) -> Evaluation:
        """Every image of every split, answers and probabilities."""
        return self._evaluate(list(self.questions.evaluation), None, note, self.labels)

    def during_training(self, limit: int | None) -> Evaluation:
        """The first `limit` images of val where the task has one, else of test; answers only."""
        return self._evaluate(["val" if "val" in self.questions.evaluation else "test"], limit, "training", None)

    def _evaluate(self, splits: list[str], limit: int | None, note: str, labels: LabelScorer | None) -> Evaluation:
        predictions, summary = {}, {}
        for split in splits:
            start = time.perf_counter()
            prompts = self.questions.evaluation[split][:limit]
            found, scoring = self._predict(prompts, f"evaluating {split} ({note})", labels)
            seconds = time.perf_counter() - start - scoring
            predictions[split] = found
            summary[split] = metrics.summarize(found, self.questions.task.names, seconds, scoring)
        return Evaluation(predictions, summary)

    def _predict(
        self, prompts: list[Prompt], description: str, labels: LabelScorer | None
    ) -> tuple[list[Prediction], float]:
        """The predictions of all ranks, and the seconds that this one spent on the class names."""
        slices = list(micro_batches(share_of(prompts), self.batch))
        found, seconds = [], 0.0
        for part in progress(slices, description, len(slices)):
            encoded = self.encoder(part)
            groups = self.rollout.generate(encoded, 1, self.decoding, [""] * len(part))
            graded = [grade(self.questions.method, p, group[0]) for p, group in zip(part, groups, strict=True)]
            if labels is not None:
                start = time.perf_counter()
                graded = self._with_probabilities(labels, part, encoded, graded)
                seconds += time.perf_counter() - start
            found += graded
        return interleave(gather(found)), seconds

    def _with_probabilities(
        self, labels: LabelScorer, prompts: Sequence[Prompt], encoded: Sequence[Encoded], graded: Sequence[Prediction]
    ) -> list[Prediction]:
        """Add the probabilities of the names that each prompt offers; an open question offers all names of the task."""
        everything = tuple(dict.fromkeys(self.questions.task.names))  # two classes may share a display name
        choices = [prompt.choices or everything for prompt in prompts]
        scores = labels(encoded, [[self.questions.method.label_response(name) for name in c] for c in choices])
        return [
            replace(prediction, choices=names, probabilities=score.normalised, probabilities_raw=score.raw)
            for prediction, names, score in zip(graded, choices, scores, strict=True)
        ]


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
