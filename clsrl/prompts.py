"""The questions of CLS-RL: a class list, and an instruction to think or to answer directly.

Wording of the authors' code where the paper differs (it prints "What kind of object in this phote?"). Their files are
named beside each constant.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

THINK = "output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
# What follows the question in training: grpo.py, grpo_direct.py (sections 3.2 and 3.3).
TRAINING = {"think": f"\n Please {THINK}", "no_think": "\n Please directly output the answer."}
# In their evaluation: test_qwen2vl_fewshot.py, .._b2n_new.py; and .._b2n_base.py, .._open_fewshot.py.
OFFICIAL_FEW_SHOT = {"think": f" First {THINK}", "no_think": " Please directly output the answer name."}
OFFICIAL_BASE_OR_OPEN = {"think": f" Please {THINK}", "no_think": " Please directly output the answer name."}
# The system message of sft.py, whose targets do not think.
SFT_SYSTEM = "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."


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
    """The user message: the dataset's question, the names to choose from, and an instruction as it stands, if any.

    >>> print(question("What type of digit is in the photo?", ["one", "two"], TRAINING["no_think"]))
    What type of digit is in the photo?
     Please choose one from list [ one, two].
     Please directly output the answer.
    """
    listed = f"\n Please choose one from list [ {', '.join(choices)}]." if choices else ""
    return f"{prefix}{listed}{instruction}"
