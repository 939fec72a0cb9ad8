"""Prompts of the CLS-RL paper's methods: a class list, and an instruction to think or to answer directly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from clsrl import rewards
from common import parsing
from common.config.schema import one_of
from common.evaluation import consistency
from common.types import Answers, Prediction, Prompt, Split, Task, UserError
from common.vlm.prompting import Prompting

# Wording: that of the authors' code where the paper differs (it prints "What kind of object in this phote?"). Their
# files are named beside each constant.

THINK = "output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
# Instruction after the question in training: grpo.py, grpo_direct.py (sections 3.2 and 3.3).
TRAINING = {"think": f"\n Please {THINK}", "no_think": "\n Please directly output the answer."}
# In their evaluation: test_qwen2vl_fewshot.py, .._b2n_new.py; and .._b2n_base.py, .._open_fewshot.py.
OFFICIAL_FEW_SHOT = {"think": f" First {THINK}", "no_think": " Please directly output the answer name."}
OFFICIAL_BASE_OR_OPEN = {"think": f" Please {THINK}", "no_think": " Please directly output the answer name."}
# The instructions of the paper's version 6 (NeurIPS 2025), whose text and code could not be read: our wording.
TRAINING |= {
    "think_after": "\n Please output the final answer in <answer> </answer> and then the thinking process in"
    " <think> </think> tags.",
    "adaptive": "\n Please output the final answer in <answer> </answer> tags, after the thinking process in"
    " <think> </think> tags if it helps, or directly.",
}
TAGGED = ("think", "think_after", "adaptive")  # instructions that ask for tags
# The system message of sft.py, whose targets have no thinking part.
SFT_SYSTEM = "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."


FORMS: dict[str, rewards.Form] = {"think": "think_first", "think_after": "answer_first", "adaptive": "either"}


def class_list_size(classes: int, share: float, smallest: int, largest: int) -> int:
    """Return how many names the question lists (authors' code; the paper, section 4.1, says 40 % of the labels).

    >>> [class_list_size(c, 0.4, 30, 100) for c in (1000, 397, 196, 102, 100, 47, 37, 10)]
    [100, 100, 78, 40, 40, 47, 37, 10]

    Base-to-new lists 80 % of the half; a share of 0 lists none:

    >>> [class_list_size(c, 0.8, 30, 100) for c in (500, 51, 24, 5)], class_list_size(1000, 0.0, 30, 100)
    ([100, 40, 24, 5], 0)
    """
    if share == 0:
        return 0
    size = int(share * classes)
    return classes if size < smallest else min(size, largest)


def class_list(names: Sequence[str], truth: str, size: int, seed: int, image: str) -> tuple[str, ...]:
    """Draw the names to list: shuffle, cut, replace the last one by the label if that is missing, shuffle again.

    The authors draw without a seed; here the draw depends on the image key, so it does not change with the order of
    data. Two classes with the same display name are listed once.
    """
    rng = random.Random(f"class-list-{seed}-{image}")
    if size == 0:
        return ()
    pool = list(dict.fromkeys(names))
    if size < len(pool):
        chosen = rng.sample(pool, size)  # same distribution as shuffle and cut, but faster
    else:
        chosen = pool
        rng.shuffle(chosen)
    if truth not in chosen:
        chosen[-1] = truth
    rng.shuffle(chosen)
    return tuple(chosen)


def question(prefix: str, choices: Sequence[str], instruction: str) -> str:
    """Return the user message: the dataset's question, the names to choose from if any, and an instruction.

    >>> print(question("What type of digit is in the photo?", ["one", "two"], TRAINING["no_think"]))
    What type of digit is in the photo?
     Please choose one from list [ one, two].
     Please directly output the answer.
    """
    listed = f"\n Please choose one from list [ {', '.join(choices)}]." if choices else ""
    return f"{prefix}{listed}{instruction}"


# The methods differ only in the instruction (think or not) and in the rewards. `method=clsrl`, `method=nothinking`,
# `method=sft` and `method=zeroshot` are this one class with other arguments; conf/method/ chooses trainer and rewards.


class ClassListPrompt(Prompting):
    """Prompting that asks for one name out of a list that contains the label (section 4.1)."""

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
        prefill: str = "",
    ) -> None:
        """
        Args:
            instruction: `think` (CLS-RL), `no_think` (No-Thinking-CLS-RL, SFT, zero-shot), `think_after` (answer first,
                then the thoughts) or `adaptive` (with or without thoughts, as the model chooses).
            seed: Seed of the class lists.
            list_share: Share of the class names to list; 0: an open question without a list (open-set setting).
            list_all_below: List all names when the share gives fewer than this.
            list_at_most: Cap on the number of listed names.
            evaluation_prompt: `train` (the training instruction) or `official` (the authors' other wordings).
            train_system_prompt: `default` (the chat template's own) or `think` (asks to think, as the authors' SFT).
            train_question: `instructed` or `bare` (without an instruction, as the authors' SFT).
            train_image: `first` (before the question) or `last` (after it, as the authors' SFT).
            train_target: Target of supervised training: `label` (in tags only with `think`) or `tagged` (always).
            prefill: Beginning of every reply in the evaluation, which the model continues. `<think></think>`, an empty
                thought, lets a model that was trained to think answer at once (version 6, NeurIPS 2025).

        Raises:
            UserError: An argument has an unknown value.
        """
        for name, value, allowed in (
            ("instruction", instruction, ("no_think", *TAGGED)),
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
        self.train_system = SFT_SYSTEM if train_system_prompt == "think" else None
        self.prefill = prefill
        self.train_ending = "" if train_question == "bare" else TRAINING[instruction]
        self.train_image_last = train_image == "last"
        self.tagged = instruction in TAGGED or train_target == "tagged"
        if evaluation_prompt == "official" and instruction not in OFFICIAL_FEW_SHOT:
            raise UserError(
                "method.evaluation_prompt=official: the authors' code has no wording for"
                f" method.instruction={instruction}; use protocol=clean"
            )

    def train_prompts(self, task: Task, epoch: int = 0) -> list[Prompt]:
        prompts = self._prompts(task.train, self.train_ending)
        return [replace(prompt, system=self.train_system, image_last=self.train_image_last) for prompt in prompts]

    def evaluation_prompts(self, task: Task, split: str) -> list[Prompt]:
        ending = TRAINING
        if self.evaluation_prompt == "official":
            base = split == "base" or (split == "val" and "base" in task.evaluation)  # val: base classes
            ending = OFFICIAL_BASE_OR_OPEN if base or self.list_share == 0 else OFFICIAL_FEW_SHOT
        prompts = self._prompts(task.evaluation[split], ending[self.instruction])
        return [replace(prompt, begun=self.prefill) for prompt in prompts]

    def well_formed(self, completion: str) -> bool:
        if self.instruction in TAGGED:
            return rewards.has_form(completion, FORMS[self.instruction])
        return not parsing.TAG.search(completion) and bool(completion.strip())

    def answer(self, completion: str) -> str | None:
        if self.instruction == "think_after":
            return parsing.answer_first(completion)
        return parsing.strict_answer(completion)

    def extra_columns(self, task: Task, split: str, predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
        """Return whether the answer is what the thoughts conclude; None without thoughts that name a class."""
        if self.instruction not in TAGGED:
            return {}
        names, replies = task.evaluation[split].choices, [p.reply.text if p.reply else "" for p in predictions]
        agrees = [consistency.agrees(reply, p.answer, names) for reply, p in zip(replies, predictions, strict=True)]
        return {"reasoning_agrees": agrees}

    def diagnostics(self, task: Task, split: str, answers: Answers) -> dict[str, Any]:
        """Return how many replies think, and how often their thoughts and answers agree; counts of images."""
        if self.instruction not in TAGGED:
            return {}
        said = zip(answers.predictions, answers.columns["reasoning_agrees"], strict=True)
        verdicts = [verdict for p, verdict in said if p.reply and consistency.thoughts(p.reply.text) is not None]
        return {"reasoning": consistency.agreement(verdicts, len(answers.predictions) - len(verdicts))}

    def matches_officially(self, completion: str, label: str) -> bool:
        return rewards.matches_officially(completion, label)

    def label_response(self, name: str) -> str:
        """Return the bare name, or the name in its tags where the reply must have them."""
        return f"<answer>{name}</answer>" if self.tagged else name

    def _prompts(self, split: Split, instruction: str) -> list[Prompt]:
        names = split.choices
        size = class_list_size(len(names), self.list_share, self.list_all_below, self.list_at_most)
        if size and (several := next((name for name in names if "," in name), None)):
            raise UserError(
                f"class '{several}' has a comma, which separates the names that a question lists; rename it, or ask"
                " without a list: setting=open_set"
            )
        built = []
        for item in split.items:
            listed = size if item.name or not size else len(names)  # unlabelled image: list all names
            choices = class_list(names, item.name or names[0], listed, self.seed, item.image)
            text = question(split.question if choices else split.open_question, choices, instruction)
            built.append(Prompt(item.image, text, item.name, choices, aliases=split.aliases.get(item.name, ())))
        return built
