"""The questions of CLS-RL: a class list, and an instruction to think or to answer directly.

Wording from the authors' code where the paper differs (it prints "What kind of object in this phote?"). Sources are
named beside each constant.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

# Instructions: newline, space, then the text, as the authors' data files join them.
THINK = (
    "Please output the thinking process in <think> </think> and final answer in <answer> </answer> tags."  # sec. 3.2
)
NO_THINK = "Please directly output the answer."  # sec. 3.3
# What the authors' evaluation scripts ask instead, outside base classes. The sentence after "First output the thinking"
# is our reading: the wording that the R1-V family of scripts shares.
THINK_OFFICIAL_EVALUATION = (
    "First output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
)
NO_THINK_OFFICIAL_EVALUATION = "Please directly output the answer name."
# The system message of the authors' SFT script asks to think although its targets are bare labels; the wording is the
# one that the R1 family of projects shares.
THINK_SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant"
    " first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning"
    " process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e.,"
    " <think> reasoning process here </think><answer> answer here </answer>"
)

INSTRUCTIONS = {
    ("think", "train"): THINK,
    ("no_think", "train"): NO_THINK,
    ("think", "official"): THINK_OFFICIAL_EVALUATION,
    ("no_think", "official"): NO_THINK_OFFICIAL_EVALUATION,
}


def class_list_size(classes: int, share: float, smallest: int, largest: int) -> int:
    """How many names the question lists (authors' code; the paper, section 4.1, says 40 % of the labels).

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
    """Draw the names to list: shuffle, cut, put the truth in place of the last one if it is missing, shuffle again.

    The authors draw without a seed; here the draw belongs to the image, so it does not change with the order of data.
    Two classes that share one display name are listed once.
    """
    rng = random.Random(f"class-list-{seed}-{image}")
    if size == 0:
        return ()
    pool = list(dict.fromkeys(names))
    if size < len(pool):
        chosen = rng.sample(pool, size)  # what shuffling all and cutting gives, sooner
    else:
        chosen = pool
        rng.shuffle(chosen)
    if truth not in chosen:
        chosen[-1] = truth
    rng.shuffle(chosen)
    return tuple(chosen)


def question(prefix: str, choices: Sequence[str], instruction: str) -> str:
    """The user message.

    >>> print(question("What type of digit is in the photo?", ["one", "two"], NO_THINK))
    What type of digit is in the photo?
    Please choose one from list [ one, two].
     Please directly output the answer.
    """
    listed = f"\nPlease choose one from list [ {', '.join(choices)}]." if choices else ""
    return f"{prefix}{listed}\n {instruction}"
