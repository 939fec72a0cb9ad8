"""Write texts for the tiny model's pre-training: replies of varying quality to the meta-task prompt.

A good reply compares: what the image shares with the chosen category, and how another one differs. Some replies do not
compare, and some ignore the requested tags, so that GRPO's contrastive and format rewards have something to improve.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from alert.prompt import meta_task
from common.models.tiny.wordings import CLASSES, CUES, DIGITS, KINDS, OTHER_NAMES
from common.types import CATEGORY

CONTRASTS = (
    "Similar to {name}: {cue}. Different from {other}: it has {difference}.",
    "The input image has {cue}, like {name}. It is not {other}, which has {difference}.",
    "I see {cue} as in {name}, but not {difference} as in {other}.",
)
ASSERTIONS = ("The input image is {name}.", "It looks like {name}.")
CONTRAST_SHARE = 0.7  # share of replies that compare; the others only assert
SLOPPY = ("{reason}", "<think>{reason}</think> {name}", "<answer>{name}</answer>", "{name}")
NAMES = (*CLASSES, *OTHER_NAMES)  # possible names of a category
BEGINNINGS = ("user", "model", "Class", "Dataset", "User", "Similar", "The", "It", "I")  # of lines, without a space
PUNCTUATION = re.compile(r"([.,:])")


@dataclass(frozen=True)
class Reference:
    """A category in a prompt: the class that its images show, and the name it has there."""

    shown: str
    name: str

    @property
    def cue(self) -> str:
        """Return the visible feature of its images."""
        return CUES[self.shown]


def draw(kind: Sequence[str], count: int, true_names: bool, rng: random.Random) -> list[Reference]:
    """Draw different reference categories of `kind`, with their own names or random ones.

    >>> draw(DIGITS, 2, True, random.Random(1))
    [Reference(shown='two', name='two'), Reference(shown='one', name='one')]
    """
    shown = rng.sample(kind, count)
    return [Reference(*pair) for pair in zip(shown, shown if true_names else rng.sample(NAMES, count), strict=True)]


def reply(shown: Reference, others: Sequence[Reference], sloppy: float, rng: random.Random) -> str:
    """Write a right answer; with probability `sloppy` in a form that the instruction did not ask for.

    Args:
        shown: Category of the image.
        others: Other reference categories, at least one.
        sloppy: Share of replies without the requested tags.
        rng: Random generator.

    >>> reply(Reference("six", "six"), [Reference("nine", "red")], 0.0, random.Random(4))
    '<think>I see a loop at the bottom as in six, but not a loop at the top as in red.</think><answer>six</answer>'
    """
    other = rng.choice(others)
    templates = CONTRASTS if rng.random() < CONTRAST_SHARE else ASSERTIONS
    reason = rng.choice(templates).format(name=shown.name, cue=shown.cue, other=other.name, difference=other.cue)
    form = rng.choice(SLOPPY) if rng.random() < sloppy else "<think>{reason}</think><answer>{name}</answer>"
    return form.format(reason=reason, name=shown.name)


def corpus(lines: int = 2000) -> list[str]:
    """Write text for training the tokenizer: prompts, replies, and every name with and without a leading space.

    Punctuation is separated, so that a word is the same token whatever follows it.
    """
    rng = random.Random(0)
    text = [meta_task(DIGITS[:2]).replace(CATEGORY, " ")] * (lines // 50)
    for _ in range(lines):
        kind = rng.choice(KINDS)
        listed = draw(kind, 3, True, rng)
        prompt = meta_task([reference.name for reference in listed], "short")
        text += [prompt.replace(CATEGORY, " "), reply(listed[0], listed[1:], 0.3, rng)]
        text += [*(reference.name for reference in draw(kind, 3, False, rng)), *BEGINNINGS]
        text += [f" {reference.name}" for reference in draw(kind, 3, False, rng)]
    return [PUNCTUATION.sub(r" \1 ", line) for line in text]
