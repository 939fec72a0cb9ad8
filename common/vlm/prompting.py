"""Interface of a method: how it prompts a vision-language model and parses replies. Needs no torch.

A method is a class that derives from `Prompting`; `method._target_` names it. Most need only the five abstract members;
the others have defaults that do nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.config.composition import method_arguments
from common.config.schema import Config
from common.data.manifest import digest
from common.plugins import locate
from common.types import Answers, Prediction, Prompt, Task, UserError


class Prompting(ABC):
    """Prompts for the images of a task, and the format of replies."""

    @abstractmethod
    def train_prompts(self, task: Task, epoch: int = 0) -> list[Prompt]:
        """Return one prompt per training item, in the order of `task.train.items`."""

    @abstractmethod
    def evaluation_prompts(self, task: Task, split: str) -> list[Prompt]:
        """Return one prompt per item of `task.evaluation[split]`, in its order."""

    @abstractmethod
    def well_formed(self, completion: str) -> bool:
        """Return whether the reply follows the requested format."""

    @abstractmethod
    def answer(self, completion: str) -> str | None:
        """Return the one answer of a reply, normalised; None if there is none or more than one."""

    @abstractmethod
    def label_response(self, name: str) -> str:
        """Return the reply, without reasoning, that answers `name`; its probability counts as that of the name."""

    def read(self, prompt: Prompt, completion: str) -> str | None:
        """Return the answer of a reply to a prompt, like `answer`, for methods whose replies need their prompt."""
        return self.answer(completion)

    def responses(self, prompt: Prompt, names: Sequence[str]) -> list[str]:
        """Return the replies to a prompt whose probabilities count as those of the names, see `label_response`."""
        return [self.label_response(name) for name in names]

    @property
    def final(self) -> bool:
        """Return whether the prompts are final; if not, they are upper bounds in length until `VLMLearner.setup` or
        `VLMLearner.finish_prompts`.
        """
        return True

    def embeddings(self, task: Task) -> int:
        """Return the number of trainable embeddings behind the vocabulary that the prompts refer to."""
        return 0

    def sources(self, task: Task) -> dict[str, str]:
        """Return a hash of every file, data aside, that decides the prompts, by its configuration key."""
        return {}

    def evaluates_by(self, task: Task, rewards: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return the name of the reward that `extra_columns` needs, such as a judge; None: it needs none.

        `rewards`: those of the configuration, by name.

        Raises:
            UserError: It is not among them.
        """
        return None

    def use_reward(self, reward: Any) -> None:
        """Evaluate by the reward that `evaluates_by` names, prepared; called once, before anything is computed."""
        return

    def matches_officially(self, completion: str, label: str) -> bool | None:
        """Return whether the authors' code counts the reply as correct; None if it has no matching rule of its own."""
        return None

    def extra_columns(self, task: Task, split: str, predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
        """Return more columns of predictions.parquet: by column, one value per prediction. All ranks call it together.

        A value is text, a truth value, a number, a list of these, or None.
        """
        return {}

    def diagnostics(self, task: Task, split: str, answers: Answers) -> dict[str, Any]:
        """Return entries of metrics.json about a split's predictions, in addition to the accuracies.

        The answers may come from an earlier attempt of the run; use their columns, not the current state.
        """
        return {}


@dataclass(frozen=True)
class TaskPrompts:
    """Task with one prompt for each of its images. Lists are in the order of the items."""

    task: Task
    prompting: Prompting
    train: list[Prompt]
    evaluation: dict[str, list[Prompt]]

    def hashes(self) -> dict[str, str]:
        """Return a hash of the prompts of every split, for the run folder (common/data/manifest.py)."""
        return {split: prompts_hash(prompts) for split, prompts in {"train": self.train, **self.evaluation}.items()}


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of system and user texts of all prompts, of begun replies and other images, in order."""
    others = [[p.sampled_with, p.scored_with] if p.sampled_with or p.scored_with else [] for p in prompts]
    begun = [[p.begun] if p.begun else [] for p in prompts]
    return digest([[p.system, p.text, *b, *o] for p, b, o in zip(prompts, begun, others, strict=True)])


def ask(prompting: Prompting, task: Task) -> TaskPrompts:
    """Return every prompt of a task.

    Raises:
        UserError: The method has no prompts for this task.
    """
    evaluation = {split: prompting.evaluation_prompts(task, split) for split in task.evaluation}
    return TaskPrompts(task, prompting, prompting.train_prompts(task), evaluation)


def of_config(config: Config) -> Prompting:
    """Return an object of the class that `method._target_` names.

    Raises:
        UserError: `method._target_` is missing or names no class.
    """
    if "_target_" not in config.method:
        raise UserError("method._target_ is missing; a method of learner=vlm has it, see conf/method/ for examples")
    prompting: Prompting = locate(config.method["_target_"], "method._target_")(**method_arguments(config))
    return prompting


@dataclass(frozen=True)
class Words:
    """Trained embeddings as tokens of the vocabulary, so that other code can use an exported model.

    ids: the new tokens and those that pad the vocabulary; none of them may be generated.
    of_names: text that stands for each class name.
    example: a prompt that has some of them.
    """

    ids: range
    of_names: dict[str, str]
    example: Prompt
