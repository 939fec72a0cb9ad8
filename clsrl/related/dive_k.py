"""DiVE-k (arXiv 2511.18305): candidates mined from the model itself, then a multiple-choice question among them.

First the model is asked with the whole list of names, several times; its most frequent answers are the candidates. Then
it is asked which of them is the most likely, by letters. Training asks the second question alone, with candidates that
the untrained model gave and the label among them; an evaluation asks both with the weights of the moment, so that the
label may be missing. Built from the paper's description; the wording is ours. Mining is in
`clsrl/related/dive_k_learner.py`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from string import ascii_uppercase
from typing import Any

from clsrl.prompting import THINK, TRAINING, ClassListPrompt, question
from common.config.schema import one_of, positive
from common.parsing import normalize, strict_answer
from common.types import Answers, Item, Prediction, Prompt, Sample, Split, Task, UserError

# 1. Candidates and options. Names are class names as they are shown.

OPTION = re.compile(r"\(?([a-z])\)?[.:)]?(?: (.+))?")  # of a normalised answer: b, (b), b. six


def most_frequent(answers: Iterable[str | None], names: Sequence[str], k: int) -> tuple[str, ...]:
    """Return the k class names that are answered most often; the first answered goes first where two are equal.

    Args:
        answers: Normalised answers of the samples, None for those without one. What is no class name is dropped.
        names: Class names.
        k: Number of candidates, at most; there are fewer where the answers have fewer names.

    >>> most_frequent(["nine", "six", None, "six", "a six", "nine", "one"], ["One", "Six", "Nine"], 2)
    ('Nine', 'Six')
    """
    known = {normalize(name): name for name in names}
    return tuple(name for name, _ in Counter(known[said] for said in answers if said in known).most_common(k))


def options(
    candidates: Sequence[str], names: Sequence[str], k: int, seed: int, image: str, truth: str | None = None
) -> tuple[str, ...]:
    """Return the options of an image's question, in an order that depends on its key and the seed.

    Fewer than two candidates are joined by two random other names. The paper skips such an image in training where
    the one candidate is right; here no image is skipped.

    Args:
        candidates: The best ones first.
        names: Class names.
        k: Number of options, at most.
        seed: Seed of the run.
        image: Key of the image.
        truth: Label that must be among the options, in place of the last candidate if there are k; None: it need not.
    """
    rng = random.Random(f"options-{seed}-{image}")
    chosen = list(candidates[:k])
    if len(chosen) < 2:
        others = [name for name in dict.fromkeys(names) if name not in chosen]
        chosen += rng.sample(others, min(2, len(others), k - len(chosen)))
    if truth is not None and truth not in chosen:
        chosen[k - 1 :] = []
        chosen.append(truth)
    rng.shuffle(chosen)
    return tuple(chosen)


def chosen_option(completion: str, choices: Sequence[str]) -> str | None:
    """Return the normalised answer of a reply: the option that its letter stands for, else what it says.

    A letter may have brackets and stand before its own option. The name of an option is an answer as well (our choice).

    >>> [chosen_option(f"<answer>{said}</answer>", ["nine", "six"]) for said in ("B", "(b)", "B. six", "Six", "C")]
    ['six', 'six', 'six', 'six', 'c']
    >>> [chosen_option(said, ["nine", "six"]) for said in ("<answer>A. six</answer>", "A <answer>B</answer>")]
    ['a. six', None]
    """
    said = strict_answer(completion)
    match = OPTION.fullmatch(said) if said is not None else None
    place = ascii_uppercase.index(match[1].upper()) if match is not None else len(choices)
    if match is None or place >= len(choices):
        return said
    name = normalize(choices[place])
    return name if match[2] in (None, name) else said


def right_option(samples: Sequence[Sample]) -> list[float]:
    """Return 1 when the chosen option is the label, else 0. Length: N."""
    return [float(chosen_option(s.completion, s.prompt.choices) == normalize(s.label)) for s in samples]


# 2. The method.

LETTER = f"\n Please {THINK.replace('final answer', 'the letter of the final answer')}"
MOST_LIKELY = "\n Which of these is the most likely?"


class DiveKPrompt(ClassListPrompt):
    """Two questions: one with all names, to mine candidates, and one with the candidates as options."""

    def __init__(
        self,
        *,
        seed: int,
        mining: str = "sampled",
        samples: int = 20,
        temperature: float = 1.0,
        top_p: float = 0.95,
        k: int = 5,
        ask_for: str = "letter",
        list_share: float = 1.0,
    ) -> None:
        """
        Args:
            seed: Seed of lists, samples and orders of options.
            mining: `sampled` (the paper's: the most frequent of several sampled answers, after thinking) or `scores`
                (the names of the highest probability as bare answers, by one forward per image; ours).
            samples: Answers to sample of each image.
            temperature: Temperature of these.
            top_p: Their nucleus.
            k: Options of a question, from 2 to 26.
            ask_for: `letter` (the paper's), or `name`: CLS-RL's wording with the options as the list, for models that
                were taught no letters.
            list_share: 1: the first question lists all names. 0: it lists none.

        Raises:
            UserError: An argument has an impossible value.
        """
        super().__init__(instruction="think", seed=seed, list_share=list_share, list_at_most=10**9)
        one_of("method.mining", mining, ("sampled", "scores"))
        one_of("method.ask_for", ask_for, ("letter", "name"))
        if list_share not in (0, 1):
            raise UserError(f"method.list_share={list_share}: the first question lists all names (1) or none (0)")
        if not 2 <= k <= len(ascii_uppercase):
            raise UserError(f"method.k={k}: a question has from 2 to {len(ascii_uppercase)} options")
        for name, value in (("samples", samples), ("temperature", temperature), ("top_p", top_p)):
            positive(f"method.{name}", value)
        if top_p > 1:
            raise UserError(f"method.top_p={top_p} must be at most 1")
        self.mining, self.samples, self.temperature, self.top_p = mining, samples, temperature, top_p
        self.k, self.ask_for = k, ask_for
        self.mined: Mapping[str, Sequence[str]] | None = None  # candidates of the training images, by image
        self.found: dict[str, Mapping[str, Sequence[str]]] = {}  # those of tested images, by split, of the last time

    @property
    def final(self) -> bool:
        return self.mined is not None

    def first_prompts(self, split: Split) -> list[Prompt]:
        """Return the questions that candidates are mined with, one per item."""
        return self._prompts(split, TRAINING["think" if self.mining == "sampled" else "no_think"])

    def second_prompt(self, split: Split, item: Item | Prompt, name: str, choices: Sequence[str]) -> Prompt:
        """Return the question among options.

        Args:
            split: Split of the image.
            item: What has its key.
            name: Its label; empty if there is none.
            choices: The options, in order.
        """
        aliases = split.aliases.get(name, ())
        if self.ask_for == "name":
            text = question(split.question, choices, TRAINING["think"])
        else:
            rows = "".join(f"\n {letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
            text = f"{split.open_question}{MOST_LIKELY}{rows}{LETTER}"
        return Prompt(item.image, text, name, tuple(choices), aliases=aliases)

    def train_prompts(self, task: Task, epoch: int = 0) -> list[Prompt]:
        """Return the second questions; before anything is mined, with the longest names there are."""
        split, prompts = task.train, []
        longest = sorted(split.choices, key=len)[-self.k :]
        for item in split.items:
            choices: Sequence[str] = longest
            if self.mined is not None:
                choices = options(self.mined[item.image], split.choices, self.k, self.seed, item.image, item.name)
            prompts.append(self.second_prompt(split, item, item.name, choices))
        return prompts

    def evaluation_prompts(self, task: Task, split: str) -> list[Prompt]:
        """Return the first questions; the second ones depend on the answers."""
        return self.first_prompts(task.evaluation[split])

    def read(self, prompt: Prompt, completion: str) -> str | None:
        return chosen_option(completion, prompt.choices)

    def responses(self, prompt: Prompt, names: Sequence[str]) -> list[str]:
        """Return the replies by letters if these are asked for."""
        letters = self.ask_for == "letter" and tuple(names) == prompt.choices
        return [self.label_response(said) for said in (ascii_uppercase[: len(names)] if letters else names)]

    def extra_columns(self, task: Task, split: str, predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
        """Return the mined candidates of every image, the most frequent or most probable one first."""
        columns, found = super().extra_columns(task, split, predictions), self.found[split]
        return {**columns, "candidates": [list(found[each.image]) for each in predictions]}

    def diagnostics(self, task: Task, split: str, answers: Answers) -> dict[str, Any]:
        labels = [prediction.label for prediction in answers.predictions]
        mined = mining_facts(answers.columns["candidates"], labels, self.k)
        return {**super().diagnostics(task, split, answers), "mining": mined}


def mining_facts(candidates: Sequence[Sequence[str]], labels: Sequence[str], k: int) -> dict[str, float]:
    """Return how good the candidates are, as shares of the images with a label.

    `recall@n`: the label is among the first n. `majority_vote`: accuracy of the first one alone, so the same as
    `recall@1`, by the paper's name for it. `candidates`: their mean number.

    >>> mining_facts([["six", "nine"], ["one"], []], ["nine", "one", "two"], 2)["recall@2"]
    0.6666666666666666
    """
    rows = [
        (list(map(normalize, found)), normalize(label))
        for found, label in zip(candidates, labels, strict=True)
        if label
    ]
    if not rows:
        return {}
    recall = {f"recall@{n}": fmean(label in found[:n] for found, label in rows) for n in range(1, k + 1)}
    return {**recall, "majority_vote": recall["recall@1"], "candidates": fmean(len(found) for found, _ in rows)}
