"""Fine-R1 (arXiv 2602.07605): GRPO whose groups are sampled about two pictures of a class, away from a similar class.

Its second stage, TAPO. Half of a group's completions are sampled about the picture that is trained (the anchor), half
about another picture of its class (the partner); all are compared with each other and trained about the anchor. The
loss (`clsrl/related/tapo.py`) also moves the policy away from what it would say about a picture of a similar class
(the negative). Which class is similar to which is decided by the model before training
(`clsrl/related/fine_r1_learner.py`) or by a file. The first stage, SFT on 404 written thoughts, is not here.

Partner and negative are drawn anew in every epoch, by seed, epoch and key of the anchor (our choice: the authors' data,
which could not be read, have columns for them). The question has no list of names; its wording is ours.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from clsrl.prompting import TRAINING, ClassListPrompt
from clsrl.rewards import Match, accuracy_reward
from common.counted import counted
from common.data.manifest import digest
from common.types import Item, Prompt, Sample, Split, Task, UserError

# 1. The reward: 0.9 for the answer, 0.1 for the form.

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
WHOLE_ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL)  # to the last closing tag
AROUND_SIGNS = re.compile(r"\s*([<>/])\s*")


def contains_label(completion: str, label: str) -> bool:
    """Return whether the first `<answer>` contains the label, lower-cased, as in the authors' reward.

    White space around `<`, `>` and `/` is dropped first. A list of all names earns as much as the right one.

    >>> contains_label("<answer>an owl or an Arctic Fox</answer>", "arctic fox"), contains_label("arctic fox", "fox")
    (True, False)
    """
    found = ANSWER.search(AROUND_SIGNS.sub(r"\1", completion))
    return found is not None and label.lower() in found[1].strip().lower()


def accuracy(samples: Sequence[Sample], *, match: Match = "official") -> list[float]:
    """Return 1 when the answer is the label, else 0.

    Args:
        samples: Completions to score. Length: N.
        match: `official`: `contains_label`. `strict`: normalised equality of the one answer.
    """
    if match == "strict":
        return accuracy_reward(samples, match="strict")
    return [float(contains_label(s.completion, s.label)) for s in samples]


# 2. The other pictures. A class is known by its name.


def pictures_of(items: Iterable[Item]) -> dict[str, list[str]]:
    """Return the keys of the training images by class name, both in their order."""
    found: dict[str, list[str]] = {}
    for item in items:
        found.setdefault(item.name, []).append(item.image)
    return found


def draw(kind: str, pictures: Sequence[str], seed: int, epoch: int, anchor: str) -> str:
    """Return one of the pictures, never the anchor; the draw depends on the other arguments alone."""
    others = [picture for picture in pictures if picture != anchor]
    return random.Random(f"{kind}-{seed}-{epoch}-{anchor}").choice(others)


def read_similar(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Return a similar class for each class, from rows `class,similar`.

    Args:
        path: CSV file, UTF-8, without a header.
        names: Class names that have training images.

    Raises:
        UserError: It cannot be read, or a class has no row, an unknown class, or itself as the similar one.
    """
    key = f"method.similar={path}"
    try:
        with path.expanduser().open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{key} cannot be read ({error}); give a CSV file of rows class,similar, or confusions"
        ) from error
    if wrong := next((row for row in rows if len(row) != 2), None):
        raise UserError(f"{key}: the row {','.join(wrong)} has {counted(len(wrong), 'column')}; write class,similar")
    found = {name.strip(): other.strip() for name, other in rows}
    for name in names:
        if found.get(name) not in names or found[name] == name:
            said = f"has '{found[name]}'" if name in found else "has no row"
            raise UserError(f"{key}: class '{name}' {said}; give it another class that has training images")
    return {name: found[name] for name in names}


def most_confused(
    labels: Sequence[str], probabilities: Sequence[Sequence[float]], names: Sequence[str]
) -> dict[str, str]:
    """Return for each class the other one whose name is the most probable about its pictures, on average.

    Args:
        labels: Class of each picture. Length: N.
        probabilities: Of each name about each picture. Shape: [N, C].
        names: Class names, each with a picture; of two that are equal the earlier one is taken. Length: C.

    >>> most_confused(["a", "b", "c"], [[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.2, 0.2, 0.6]], ["a", "b", "c"])
    {'a': 'b', 'b': 'a', 'c': 'a'}
    """
    found = {}
    for name in names:
        rows = [row for label, row in zip(labels, probabilities, strict=True) if label == name]
        means = {other: sum(column) for other, column in zip(names, zip(*rows, strict=True), strict=True)}
        found[name] = max((other for other in names if other != name), key=means.__getitem__)
    return found


# 3. The method.

CONFUSIONS = "confusions"


class FineR1Prompt(ClassListPrompt):
    """Prompting that thinks and names the class, whose training prompts have a partner and a negative."""

    def __init__(
        self,
        *,
        seed: int,
        list_share: float = 0.0,
        evaluation_prompt: str = "train",
        prefill: str = "",
        intra_class: bool = True,
        inter_class: bool = True,
        similar: str = CONFUSIONS,
    ) -> None:
        """
        Args:
            seed: Seed of partners, negatives and lists.
            list_share: Share of the class names to list, as for CLS-RL; 0: an open question.
            evaluation_prompt: `train` or `official` (CLS-RL's other wordings).
            prefill: Beginning of every reply in the evaluation.
            intra_class: Sample half of each group about a partner. False: all about the anchor.
            inter_class: Score completions about a negative as well. False: the loss has neither of its terms.
            similar: The class of a negative: `confusions` (the one whose name the untrained model finds the most
                probable about the pictures of the anchor's class) or a file, see `read_similar`.
        """
        super().__init__(
            instruction="think",
            seed=seed,
            list_share=list_share,
            evaluation_prompt=evaluation_prompt,
            prefill=prefill,
        )
        self.intra_class, self.inter_class, self.similar = intra_class, inter_class, similar
        self.confused: Mapping[str, str] | None = None  # similar class by class, measured

    @property
    def final(self) -> bool:
        return not self.inter_class or self.similar != CONFUSIONS or self.confused is not None

    def train_prompts(self, task: Task, epoch: int = 0) -> list[Prompt]:
        """Return the prompts with their other pictures; before the confusions are known, with some other class's.

        Raises:
            UserError: A class has one training image and no partner, or there is a single class.
        """
        prompts, pictures = super().train_prompts(task, epoch), pictures_of(task.train.items)
        if prompts and self.intra_class and (alone := next((n for n in pictures if len(pictures[n]) == 1), None)):
            raise UserError(
                f"class '{alone}' has a single training image, and half of a group is sampled about another one of its"
                " class: give it more (shots=2 or above), or set method.intra_class=false"
            )
        similar = self._similar(list(pictures))
        found = []
        for prompt in prompts:
            image, name = prompt.image, prompt.label
            partner = (draw("partner", pictures[name], self.seed, epoch, image),) if self.intra_class else ()
            others = pictures[similar[name]] if self.inter_class else ()
            negative = (draw("negative", others, self.seed, epoch, image),) if others else ()
            found.append(replace(prompt, sampled_with=partner, scored_with=negative))
        return found

    def _similar(self, names: Sequence[str]) -> Mapping[str, str]:
        """Return the similar class of each class with training images; none without any."""
        if not names or not self.inter_class:
            return {}
        if len(names) == 1:
            raise UserError(
                f"all training images are of class '{names[0]}', and a negative is of another one: set"
                " method.inter_class=false"
            )
        if self.similar != CONFUSIONS:
            return read_similar(Path(self.similar), names)
        if self.confused is None:
            return dict(zip(names, [*names[1:], names[0]], strict=True))
        return self.confused

    def sources(self, task: Task) -> dict[str, str]:
        if self.similar == CONFUSIONS or not self.inter_class or not task.train.items:
            return {}
        return {"method.similar": digest(self._similar(list(pictures_of(task.train.items))))}

    def bare_prompts(self, split: Split) -> list[Prompt]:
        """Return the questions by whose bare answers the confusions are measured, one per item."""
        return self._prompts(split, TRAINING["no_think"])

    def matches_officially(self, completion: str, label: str) -> bool:
        """Return whether the answer contains the label, lower-cased and with `_` as blanks: their closed evaluation."""
        found = WHOLE_ANSWER.search(completion)
        said, name = (text.lower().replace("_", " ") for text in (found[1].strip() if found else "", label))
        return bool(said) and name in said
