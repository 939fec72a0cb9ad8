"""The methods of the CLS-RL paper: they differ in the instruction (think or not) and in the rewards, nothing else.

`method=clsrl`, `method=nothinking`, `method=sft` and `method=zeroshot` are this one class with other arguments; which
trainer and which rewards they use stands in conf/method/.
"""

from __future__ import annotations

from dataclasses import replace

from clsrl import matching, prompts
from common import parsing
from common.config.checks import one_of
from common.types import Prompt, Split, Task, UserError
from common.vlm.prompting import Prompting


class ClassListPrompt(Prompting):
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
        train_question: str = "instructed",
        train_image: str = "first",
        train_target: str = "label",
    ) -> None:
        """
        Args:
            instruction: `think` (CLS-RL) or `no_think` (No-Thinking-CLS-RL, SFT, zero-shot).
            seed: Seed of the class lists.
            list_share: Share of the class names to list; 0: an open question without a list (open-set setting).
            list_all_below: List all names when the share gives fewer than this.
            list_at_most: Cap on the number of listed names.
            evaluation_prompt: `train` (the training instruction) or `official` (the authors' other wordings).
            train_system_prompt: `default` (the chat template's own) or `think` (asks to think, as the authors' SFT).
            train_question: `instructed` or `bare` (without an instruction, as the authors' SFT).
            train_image: `first` (before the question) or `last` (behind it, as the authors' SFT).
            train_target: Of supervised training: `label` (with `think` in its tags) or `tagged` (always).

        Raises:
            UserError: An argument has an unknown value.
        """
        for name, value, allowed in (
            ("instruction", instruction, ("think", "no_think")),
            ("evaluation_prompt", evaluation_prompt, ("train", "official")),
            ("train_system_prompt", train_system_prompt, ("default", "think")),
            ("train_question", train_question, ("instructed", "bare")),
            ("train_image", train_image, ("first", "last")),
            ("train_target", train_target, ("label", "tagged")),
        ):
            one_of(f"method.{name}", value, allowed)
        self.instruction, self.seed = instruction, seed
        self.list_share, self.list_all_below, self.list_at_most = list_share, list_all_below, list_at_most
        self.evaluation_prompt = evaluation_prompt
        self.train_system = prompts.SFT_SYSTEM if train_system_prompt == "think" else None
        self.train_ending = "" if train_question == "bare" else prompts.TRAINING[instruction]
        self.train_image_last = train_image == "last"
        self.tagged = instruction == "think" or train_target == "tagged"

    def train_prompts(self, task: Task, epoch: int = 0) -> list[Prompt]:
        asked = self._prompts(task.train, self.train_ending)
        return [replace(prompt, system=self.train_system, image_last=self.train_image_last) for prompt in asked]

    def evaluation_prompts(self, task: Task, split: str) -> list[Prompt]:
        ending = prompts.TRAINING
        if self.evaluation_prompt == "official":
            base = split == "base" or (split == "val" and "base" in task.evaluation)  # val is watched for base
            ending = prompts.OFFICIAL_BASE_OR_OPEN if base or self.list_share == 0 else prompts.OFFICIAL_FEW_SHOT
        return self._prompts(task.evaluation[split], ending[self.instruction])

    def well_formed(self, completion: str) -> bool:
        if self.instruction == "think":
            return parsing.is_strict_format(completion)
        return not parsing.TAG.search(completion) and bool(completion.strip())

    def answer(self, completion: str) -> str | None:
        return parsing.strict_answer(completion)

    def matches_officially(self, completion: str, label: str) -> bool:
        return matching.matches_officially(completion, label)

    def label_response(self, name: str) -> str:
        """The bare name, or the name in its tags where the reply is asked or trained to have them."""
        return f"<answer>{name}</answer>" if self.tagged else name

    def _prompts(self, split: Split, instruction: str) -> list[Prompt]:
        names = split.choices
        size = prompts.class_list_size(len(names), self.list_share, self.list_all_below, self.list_at_most)
        if size and (several := next((name for name in names if "," in name), None)):
            raise UserError(
                f"class '{several}' has a comma, which separates the names that a question lists; rename it, or ask"
                " without a list: setting=open_set"
            )
        built = []
        for item in split.items:
            listed = size if item.name or not size else len(names)  # nobody knows the truth: it is among all names
            choices = prompts.class_list(names, item.name or names[0], listed, self.seed, item.image)
            text = prompts.question(split.question if choices else split.open_question, choices, instruction)
            built.append(Prompt(item.image, text, item.name, choices, aliases=split.aliases.get(item.name, ())))
        return built
