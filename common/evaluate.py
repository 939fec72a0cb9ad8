"""Evaluation: greedy answers to the prompts of a split, matched strictly and as the authors' code does, and the
probability of every name that a prompt offers, after the reply's own reasoning.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

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
from common.types import Answers, Method, Prediction, Prompt

T = TypeVar("T")
# Name in metrics.jsonl to its name in a summary's `probability`.
PROBABILITY = {"probability_accuracy": "top1", "top5_accuracy": "top5", "ece": "ece", "brier": "brier"}


@dataclass(frozen=True)
class Evaluation:
    """Predictions by split, in the order of the task, and their summaries (see `metrics.summarize`)."""

    predictions: dict[str, list[Prediction]]
    summary: dict[str, dict[str, Any]]

    @property
    def overall(self) -> dict[str, float]:
        """See `metrics.overall`."""
        return metrics.overall({split: found["accuracy"] for split, found in self.summary.items()})

    @property
    def scalars(self) -> dict[str, float]:
        """Metric name to value, as metrics.jsonl and the tracker take them."""
        scalars: dict[str, float] = {}
        for split, found in self.summary.items():
            scalars |= {f"eval/{split}/{key}": found[key] for key in ("accuracy", "accuracy_official", "n")}
            if "probability" in found:
                scalars |= {f"eval/{split}/{name}": found["probability"][key] for name, key in PROBABILITY.items()}
        return scalars | {f"eval/{name}": value for name, value in self.overall.items()}


class Recorder(Protocol):
    """Where finished splits are kept (see common/recorder.py)."""

    def kept(self, phase: str, split: str) -> Answers | None:
        """A finished split."""

    def keep(self, phase: str, split: str, found: Answers) -> None:
        """Keep a finished split."""


class Evaluator:
    """Asks the model the evaluation questions. Ranks share the work, and every rank gets all predictions."""

    def __init__(
        self,
        rollout: Rollout,
        encoder: Encoder,
        questions: Questions,
        config: RolloutConfig,
        labels: LabelScorer | None,
        reasoned: bool = True,
    ) -> None:
        """
        Args:
            rollout: Sampling backend, used greedily.
            encoder: Prompts to tensors.
            questions: Task and method.
            config: Limits on tokens and batch size.
            labels: Scores the class names in `all_splits`; None leaves them out.
            reasoned: They are scored as the end of the reply, after its own reasoning where it has the format for one;
                False: as replies of their own, without reasoning.
        """
        self.reasoned = reasoned
        self.rollout, self.encoder, self.questions, self.labels = rollout, encoder, questions, labels
        self.decoding, self.batch = greedy(config.max_completion_tokens), config.evaluation_batch

    def all_splits(self, phase: str, recorder: Recorder) -> Evaluation:
        """Every image of every split, answers and probabilities.

        Splits that an earlier attempt of the run finished are not asked again.
        """
        predictions, summary = {}, {}
        for split, prompts in self.questions.evaluation.items():
            found = recorder.kept(phase, split)
            if found is None:
                found = self._answer(prompts, split, phase.replace("_", "-"), self.labels)
                recorder.keep(phase, split, found)
            predictions[split], summary[split] = found.predictions, self._summary(found, split)
        return Evaluation(predictions, summary)

    def during_training(self, limit: int | None) -> Evaluation:
        """`limit` images of val where the task has one, else of test (see `spread`); answers only."""
        found = self._answer(spread(self.questions.evaluation[self.watched], limit), self.watched, "training", None)
        return Evaluation({self.watched: found.predictions}, {self.watched: self._summary(found, self.watched)})

    @property
    def watched(self) -> str:
        """The split that is evaluated during training: val where there is one, else the first test."""
        return "val" if "val" in self.questions.evaluation else next(iter(self.questions.evaluation))

    def _summary(self, found: Answers, split: str) -> dict[str, Any]:
        asked = self.questions.task.evaluation[split]
        summary = metrics.summarize(found.predictions, asked.choices, found.seconds, found.scoring_seconds)
        if asked.aliases:
            summary["accuracy_aliases"] = sum(p.correct_alias for p in found.predictions) / len(found.predictions)
        return summary | self.questions.method.facts(self.questions.task, split, found)

    def _answer(self, prompts: list[Prompt], split: str, occasion: str, labels: LabelScorer | None) -> Answers:
        """The predictions of all ranks; the seconds are this one's."""
        began, scoring = time.perf_counter(), 0.0
        slices = list(micro_batches(share_of(prompts), self.batch))
        found = []
        for part in progress(slices, f"evaluating {split} ({occasion})", len(slices)):
            encoded = self.encoder(part)
            groups = self.rollout.generate(encoded, 1, self.decoding, [""] * len(part))
            graded = [grade(self.questions.method, p, group[0]) for p, group in zip(part, groups, strict=True)]
            if labels is not None:
                start = time.perf_counter()
                graded = self._with_probabilities(labels, split, part, encoded, graded)
                scoring += time.perf_counter() - start
            found += graded
        predictions = interleave(gather(found))
        seconds = time.perf_counter() - began - scoring
        columns = self.questions.method.columns(self.questions.task, split, predictions)
        return Answers(predictions, seconds, scoring, columns)

    def _with_probabilities(
        self,
        labels: LabelScorer,
        split: str,
        prompts: Sequence[Prompt],
        encoded: Sequence[Encoded],
        graded: Sequence[Prediction],
    ) -> list[Prediction]:
        """Add the probabilities of the names that each prompt offers; an open question offers all of the split."""
        everything = self.questions.task.evaluation[split].choices
        choices = [prompt.choices or everything for prompt in prompts]
        responses = [[self.questions.method.label_response(name) for name in c] for c in choices]
        begun = [reasoning(self.questions.method, p.completion) if self.reasoned else "" for p in graded]
        scores = labels(encoded, responses, begun)
        return [
            replace(prediction, choices=names, probabilities=score.normalised, probabilities_raw=score.raw)
            for prediction, names, score in zip(graded, choices, scores, strict=True)
        ]


def spread(items: list[T], limit: int | None) -> list[T]:
    """At most `limit` of them, evenly spaced: splits are often in the order of the classes.

    >>> spread([0, 1, 2, 3, 4, 5, 6], 3), spread([0, 1], 3), spread([0, 1], None)
    ([0, 2, 4], [0, 1], [0, 1])
    """
    if limit is None or limit >= len(items):
        return items
    return [items[place * len(items) // limit] for place in range(limit)]


def reasoning(method: Method, completion: str) -> str:
    """The beginning of a completion up to its answer; nothing if it is malformed or the method asks for none."""
    return parsing.reasoning_before(completion) if method.well_formed(completion) else ""


def greedy(max_tokens: int) -> Decoding:
    """The decoding of every evaluation; named in metrics.json."""
    return Decoding(temperature=0.0, top_k=0, top_p=1.0, max_tokens=max_tokens)


def grade(method: Method, prompt: Prompt, completion: Completion) -> Prediction:
    """Compare one completion with its label."""
    text, label = completion.text, parsing.normalize(prompt.label)
    answer = method.answer(text)
    # a label that was not offered cannot be chosen
    offered = not prompt.choices or label in map(parsing.normalize, prompt.choices)
    return Prediction(
        image=prompt.image,
        label=prompt.label,
        answer=answer or "",
        completion=text,
        correct=offered and answer == label,
        correct_official=offered and parsing.matches_officially(text, prompt.label),
        correct_alias=offered and answer in (label, *map(parsing.normalize, prompt.aliases)),
        formatted=method.well_formed(text),
        tokens=len(completion.ids),
        truncated=completion.truncated,
    )
