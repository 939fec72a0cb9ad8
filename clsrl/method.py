"""The methods of the CLS-RL paper: they differ in the instruction (think or not) and in the rewards, nothing else.

`method=clsrl`, `method=nothinking`, `method=sft` and `method=zeroshot` are this one class with other arguments; which
trainer and which rewards they use stands in conf/method/.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clsrl import prompts
from common import parsing
from common.types import Answers, Prediction, Prompt, Split, Task, UserError

if TYPE_CHECKING:
    import torch

    from common.models.vision import Vision


class ClosedFormQuestion:
    """Asks for one name out of a list that contains the truth (section 4.1)."""

    def __init__(
        self,
        *,
        instruction: str,
        seed: int,
        list_share: float = 0.4,
        list_all_below: int = 30,
        list_at_most: int = 100,
        evaluation_prompt: str = "train",
        train_system_prompt: str = "default",
    ) -> None:
        """
        Args:
            instruction: `think` (CLS-RL) or `no_think` (No-Thinking-CLS-RL, SFT, zero-shot).
            seed: Seed of the class lists.
            list_share: Share of the class names to list; 0: an open question without a list (open-set setting).
            list_all_below: List all names when the share gives fewer than this.
            list_at_most: Cap on the number of listed names.
            evaluation_prompt: `train` (the training instruction) or `official` (the authors' other wording).
            train_system_prompt: `default` (the chat template's own) or `think` (the authors' SFT quirk).

        Raises:
            UserError: An argument has an unknown value.
        """
        for name, value, allowed in (
            ("instruction", instruction, ("think", "no_think")),
            ("evaluation_prompt", evaluation_prompt, ("train", "official")),
            ("train_system_prompt", train_system_prompt, ("default", "think")),
        ):
            if value not in allowed:
                raise UserError(f"method.{name}={value}: choose one of {', '.join(allowed)}")
        self.instruction, self.seed = instruction, seed
        self.list_share, self.list_all_below, self.list_at_most = list_share, list_all_below, list_at_most
        self.evaluation_prompt = evaluation_prompt
        self.system = prompts.THINK_SYSTEM if train_system_prompt == "think" else None

    def sources(self, task: Task) -> dict[str, str]:
        return {}

    def look(self, vision: Vision, task: Task, place: Path | None = None) -> None:
        return None

    def train_prompts(self, task: Task, epoch: int = 0) -> list[Prompt]:
        return self._prompts(task.train, "train", self.system)

    def evaluation_prompts(self, task: Task, split: str) -> list[Prompt]:
        # the authors' scripts ask base classes as in training, so also those that are watched for them
        as_trained = split == "base" or (split == "val" and "base" in task.evaluation)
        return self._prompts(task.evaluation[split], "train" if as_trained else self.evaluation_prompt, None)

    def well_formed(self, completion: str) -> bool:
        if self.instruction == "think":
            return parsing.is_strict_format(completion)
        return not parsing.TAG.search(completion) and bool(completion.strip())

    def answer(self, completion: str) -> str | None:
        return parsing.strict_answer(completion)

    def label_response(self, name: str) -> str:
        """The bare name, or with `think` the name in its tags."""
        return f"<answer>{name}</answer>" if self.instruction == "think" else name

    def facts(self, task: Task, split: str, found: Answers) -> dict[str, Any]:
        return {}

    def columns(self, task: Task, split: str, predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
        return {}

    def export(self, folder: Path, embeddings: torch.Tensor, task: Task) -> None:
        raise ValueError("this method has no embeddings")

    def _prompts(self, split: Split, wording: str, system: str | None) -> list[Prompt]:
        instruction = prompts.INSTRUCTIONS[self.instruction, wording]
        names = split.choices
        size = prompts.class_list_size(len(names), self.list_share, self.list_all_below, self.list_at_most)
        built = []
        for item in split.items:
            choices = prompts.class_list(names, item.name, size, self.seed, item.image)
            text = prompts.question(split.question if choices else split.open_question, choices, instruction)
            built.append(Prompt(item.image, text, item.name, choices, system, split.aliases.get(item.name, ())))
        return built
