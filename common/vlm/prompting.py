"""How a method asks a vision-language model, and what a reply looks like. No torch.

A method is a class that derives from `Prompting`; `method._target_` names it. Most need the five abstract members
alone; the others have defaults that do nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.config.composition import method_arguments
from common.config.schema import Config
from common.data.manifest import digest
from common.plugins import locate
from common.types import Answers, Prediction, Prompt, Task, UserError


class Prompting(ABC):
    """How to ask about the images of a task."""

    @abstractmethod
    def train_prompts(self, task: Task, epoch: int = 0) -> list[Prompt]:
        """One prompt per training item, in the order of `task.train.items`."""

    @abstractmethod
    def evaluation_prompts(self, task: Task, split: str) -> list[Prompt]:
        """One prompt per item of `task.evaluation[split]`, in its order."""

    @abstractmethod
    def well_formed(self, completion: str) -> bool:
        """Whether the reply follows the requested format."""

    @abstractmethod
    def answer(self, completion: str) -> str | None:
        """The one answer that a reply gives, normalised; None if it gives none or several."""

    @abstractmethod
    def label_response(self, name: str) -> str:
        """The answer `name` without reasoning: a reply, or the end of one, whose probability is that of the name."""

    @property
    def final(self) -> bool:
        """Whether the prompts are already those that will be asked. False: they are the longest that could be, until
        the learner has seen the pictures.
        """
        return True

    def embeddings(self, task: Task) -> int:
        """How many trainable embeddings the prompts refer to, behind the vocabulary."""
        return 0

    def sources(self, task: Task) -> dict[str, str]:
        """A hash of every file that decides the prompts beside the data, by its configuration key."""
        return {}

    def matches_officially(self, completion: str, label: str) -> bool | None:
        """Whether the authors' code counts the reply as the label, where it matches in a way of its own; else None."""
        return None

    def extra_columns(self, task: Task, split: str, predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
        """More columns of predictions.parquet: one value per prediction (text, truth value, number, a list of them or
        None), by column.
        """
        return {}

    def diagnostics(self, task: Task, split: str, answers: Answers) -> dict[str, Any]:
        """What metrics.json says of a split's predictions beside the accuracies.

        The answers may be those of an earlier attempt of the run; their columns say what was true of each then.
        """
        return {}


@dataclass(frozen=True)
class TaskPrompts:
    """A task with a prompt for each of its images. Lists are in the order of the items."""

    task: Task
    prompting: Prompting
    train: list[Prompt]
    evaluation: dict[str, list[Prompt]]

    def hashes(self) -> dict[str, str]:
        """A hash of the prompts of every split, for the run folder (common/data/manifest.py)."""
        return {split: prompts_hash(prompts) for split, prompts in {"train": self.train, **self.evaluation}.items()}


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of what is said about each image, in order."""
    return digest([[prompt.system, prompt.text] for prompt in prompts])


def ask(prompting: Prompting, task: Task) -> TaskPrompts:
    """Every prompt of a task.

    Raises:
        UserError: The method cannot ask about it.
    """
    evaluation = {split: prompting.evaluation_prompts(task, split) for split in task.evaluation}
    return TaskPrompts(task, prompting, prompting.train_prompts(task), evaluation)


def of_config(config: Config) -> Prompting:
    """The prompting that `method._target_` names.

    Raises:
        UserError: It names none.
    """
    if "_target_" not in config.method:
        raise UserError("method._target_ is missing; a method of learner=vlm has it, see conf/method/ for examples")
    prompting: Prompting = locate(config.method["_target_"], "method._target_")(**method_arguments(config))
    return prompting


@dataclass(frozen=True)
class Words:
    """Embeddings that have become words of the vocabulary, for readers that know nothing of a method: the ids of these,
    and of what fills the vocabulary up, none of which is ever said; the word that stands for each name; and a prompt
    that has some of them.
    """

    ids: range
    of_names: dict[str, str]
    example: Prompt
