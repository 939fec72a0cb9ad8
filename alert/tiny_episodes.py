"""Texts of the tiny model's pre-training: the meta-task prompt with replies of varying quality.

A reply compares: what the image shares with the chosen category, and how another one differs. Part of the replies
compares nothing, and part ignores the requested tags: there the contrastive and the format rewards of GRPO have
something to teach.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from alert.prompt import meta_task
from common.models.wordings import CUES, DIGITS, OTHER_NAMES
from common.types import CATEGORY

CONTRASTS = (
    "Similar to {name}: {cue}. Different from {other}: it has {difference}.",
    "The input image has {cue}, like {name}. It is not {other}, which has {difference}.",
    "I see {cue} as in {name}, but not {difference} as in {other}.",
)
ASSERTIONS = ("The input image is {name}.", "It looks like {name}.")
CONTRAST_SHARE = 0.7  # the other replies assert without comparing
SLOPPY = ("{reason}", "<think>{reason}</think> {name}", "<answer>{name}</answer>", "{name}")
BEGINNINGS = ("user", "model", "Class", "Dataset", "User", "Similar", "The", "It", "I")  # of lines, without a space
PUNCTUATION = re.compile(r"([.,:])")


def reply(name: str, others: Sequence[str], sloppy: float, rng: random.Random) -> str:
    """A right answer; with probability `sloppy` in a form that the instruction did not ask for.

    Args:
        name: The digit in the image.
        others: The other reference categories, at least one.
        sloppy: Share of replies without the requested tags.
        rng: Of the choices.

    >>> reply("six", ["nine"], 0.0, random.Random(0))
    '<think>It looks like six.</think><answer>six</answer>'
    """
    other = rng.choice(others)
    templates = CONTRASTS if rng.random() < CONTRAST_SHARE else ASSERTIONS
    reason = rng.choice(templates).format(name=name, other=other, cue=CUES[name], difference=CUES[other])
    form = rng.choice(SLOPPY) if rng.random() < sloppy else "<think>{reason}</think><answer>{name}</answer>"
    return form.format(reason=reason, name=name)


def corpus(lines: int = 2000) -> list[str]:
    """Text for training the tokenizer: prompts, replies, and every name with and without a leading space.

    Punctuation stands apart, so that a word is the same token whatever follows it.
    """
    rng = random.Random(0)
    text = [meta_task(DIGITS[:2]).replace(CATEGORY, " ")] * (lines // 50)
    for _ in range(lines):
        names = rng.sample(DIGITS, 3)
        text += [meta_task(names, "short").replace(CATEGORY, " "), reply(names[0], names[1:], 0.3, rng)]
        text += [*names, f" {rng.choice(OTHER_NAMES)}", rng.choice(OTHER_NAMES), *BEGINNINGS]
    return [PUNCTUATION.sub(r" \1 ", line) for line in text]
