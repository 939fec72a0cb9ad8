"""Evaluate a vision-language model on a split: greedy replies, matched with the labels, and label probabilities.

The probability of a class name is that of the reply which gives it, after the model's own reasoning.

Shapes: N prompts, C classes of a split, K names that a prompt lists (at most).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy

from common import parsing
from common.forward.label_scores import LabelScorer, LabelScores
from common.forward.packing import micro_batches
from common.models.encoder import PromptEncoder
from common.rollout.base import Completion, Decoding, Request, Rollout, requests
from common.runtime.distributed import gather, interleave, rank, share_of, world
from common.runtime.progress import progress
from common.types import Answers, Prediction, Probabilities, Prompt, Reply
from common.vlm.prompting import Prompting, TaskPrompts


class Replies:
    """Generate and grade replies to the prompts of a split. Ranks share the work; every rank gets all answers."""

    def __init__(
        self,
        encoder: PromptEncoder,
        labels: LabelScorer | None,
        reasoned: bool,
        max_tokens: int,
        batch: int,
        articles: bool = False,
    ) -> None:
        """
        Args:
            encoder: Encoder of prompts.
            labels: Scorer of the names that a prompt lists; None: no probabilities.
            reasoned: Score a name as the end of the reply, after its reasoning if it is well-formed; False: as a
                reply of its own, without reasoning.
            max_tokens: Largest number of tokens of a reply.
            batch: Number of prompts per batch.
            articles: Accept an article before a name, see `grade`.
        """
        self.encoder, self.labels, self.reasoned, self.articles = encoder, labels, reasoned, articles
        self.decoding, self.batch = greedy(max_tokens), batch

    def __call__(
        self, rollout: Rollout, task_prompts: TaskPrompts, split: str, prompts: Sequence[Prompt], scored: bool
    ) -> Answers:
        """Return the answers to some prompts of a split, in their order; the seconds are those of this rank.

        `scored`: with the probabilities of the names. All ranks call it together.
        """
        began, scoring = time.perf_counter(), 0.0
        labels = self.labels if scored else None
        tested, prompting = task_prompts.task.evaluation[split], task_prompts.prompting
        indices = {item.image: item.label for item in tested.items}
        table = ScoreTable(tested.choices, [prompt.choices for prompt in prompts]) if labels else None
        predictions: list[Prediction] = []
        parts = list(micro_batches(share_of(list(prompts)), self.batch))
        for part in progress(parts, f"evaluating {split}", len(parts)):
            wanted = requests(self.encoder, part, [""] * len(part))  # greedy decoding uses no seed
            groups = rollout.generate(wanted, 1, self.decoding)
            graded = [
                grade(prompting, prompt, indices[prompt.image], group[0], tested.choices, self.articles)
                for prompt, group in zip(part, groups, strict=True)
            ]
            predictions += graded
            if labels is not None and table is not None:
                start = time.perf_counter()
                table.add(self._scores(labels, prompting, tested.choices, part, wanted, graded))
                scoring += time.perf_counter() - start
        # share_of gave prompts to ranks in turn; interleave restores the order
        everyone = interleave(gather(predictions))
        probabilities = None if table is None else table.of_all_ranks()
        seconds = time.perf_counter() - began - scoring
        columns = prompting.extra_columns(task_prompts.task, split, everyone)
        columns["prompt"] = [prompt.text for prompt in prompts]
        return Answers(everyone, seconds, probabilities, scoring, columns)

    def _scores(
        self,
        labels: LabelScorer,
        prompting: Prompting,
        everything: Sequence[str],
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        graded: Sequence[Prediction],
    ) -> list[LabelScores]:
        """Return the scores of the names that each prompt lists; an open question has all of `everything`."""
        responses = [prompting.responses(prompt, prompt.choices or everything) for prompt in prompts]
        texts = [prediction.reply.text if prediction.reply else "" for prediction in graded]
        # what the prompt itself begins the reply with is in its tokens already
        begun = [
            reasoning(prompting, text).removeprefix(prompt.begun) if self.reasoned else ""
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return labels([request.encoded for request in requests], responses, begun)


class ScoreTable:
    """Table of label probabilities: filled with the prompts of this rank, then merged over all ranks."""

    def __init__(self, names: Sequence[str], offered: Sequence[Sequence[str]]) -> None:
        """
        Args:
            names: Names of the classes, each once. Length: C.
            offered: Names that each prompt of all ranks lists; empty: all of them. Length: N.
        """
        self.names = tuple(dict.fromkeys([*names, *(name for choices in offered for name in choices)]))
        index = {name: number for number, name in enumerate(self.names)}
        everything = [index[name] for name in names]
        # -1 pads the rows of prompts that list fewer names
        width = max((len(choices) or len(names) for choices in offered), default=0)
        self.classes = numpy.full((len(offered), width), -1, numpy.int32)  # [N, K]
        for row, choices in zip(self.classes, offered, strict=True):
            shown = [index[name] for name in choices] if choices else everything
            row[: len(shown)] = shown
        mine = len(range(rank(), len(offered), world()))
        self.values, self.raw = (numpy.zeros((mine, width), numpy.float32) for _ in range(2))  # [n, K]
        self.filled = 0

    def add(self, scores: Sequence[LabelScores]) -> None:
        """Fill in the next prompts of this rank, in their order."""
        for score in scores:
            count = len(score.logps)
            self.values[self.filled, :count], self.raw[self.filled, :count] = score.normalised, score.raw
            self.filled += 1

    def of_all_ranks(self) -> Probabilities:
        """Return the table of all ranks. All ranks call it together."""
        values, raw = (numpy.zeros(self.classes.shape, numpy.float32) for _ in range(2))
        # rank r has the rows r, r + world, r + 2 world, ...
        for number, (part, raw_part) in enumerate(gather((self.values, self.raw))):
            values[number :: world()], raw[number :: world()] = part, raw_part
        return Probabilities(self.names, self.classes, values, raw)


def reasoning(prompting: Prompting, completion: str) -> str:
    """Return the beginning of a completion up to its answer; empty if malformed or without reasoning."""
    return parsing.reasoning_before(completion) if prompting.well_formed(completion) else ""


def greedy(max_tokens: int) -> Decoding:
    """Return the decoding of every evaluation, as metrics.json reports it."""
    return Decoding(temperature=0.0, top_k=0, top_p=1.0, max_tokens=max_tokens)


def grade(
    prompting: Prompting,
    prompt: Prompt,
    label_index: int,
    completion: Completion,
    names: Sequence[str] = (),
    articles: bool = False,
) -> Prediction:
    """Compare one completion with its label.

    Args:
        prompting: Method that parses the answer.
        prompt: Prompt with its label and the names that it lists.
        label_index: Index of the label among the classes of the split.
        completion: Reply of the model.
        names: Class names that count as listed by an open question.
        articles: Let "a fox" answer "fox", unless it is itself a name (`protocol.articles`); rewards never allow that.
    """
    text, label = prompt.begun + completion.text, parsing.normalize(prompt.label)
    answer = prompting.read(prompt, text)
    if articles and answer is not None:
        answer = parsing.without_article(answer, (*(prompt.choices or names), prompt.label, *prompt.aliases))
    # an answer that the prompt did not list never counts as correct
    offered = not prompt.choices or label in map(parsing.normalize, prompt.choices)
    official = prompting.matches_officially(text, prompt.label)
    if official is not None:
        official = offered and official
    return Prediction(
        image=prompt.image,
        label=prompt.label,
        label_index=label_index,
        answer=answer or "",
        correct=offered and answer == label,
        correct_alias=offered and answer in (label, *map(parsing.normalize, prompt.aliases)),
        reply=Reply(text, len(completion.ids), completion.truncated, prompting.well_formed(text), official),
    )
