"""Text for pre-training the tiny models: many wordings of one question, and replies of varying quality.

With a single wording the model would answer by position, and other prompts would have no effect. So the papers'
wordings are mixed with paraphrases. Part of the replies ignores the requested format, which leaves something to learn
from the format and equality rewards of GRPO.
"""

from __future__ import annotations

import random

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CLASSES = (*DIGITS, *GARMENTS)
KINDS = (DIGITS, GARMENTS)
OTHER_NAMES = (
    *("circle", "square", "triangle", "cross", "star", "ring", "arrow", "heart", "white", "gray"),
    *("black", "red", "green", "blue", "yellow", "orange", "pink", "purple"),
)

# The first entry of each list is the wording in the code of CLS-RL; the second of QUESTIONS is that of the paper.
QUESTIONS = (
    "What type of {noun} is in the photo?",
    "What kind of {noun} is in this photo?",
    "Which {noun} does the image show?",
    "What {noun} do you see in the picture?",
    "Name the {noun} in the photo.",
)
NOUNS = {DIGITS: ("digit", "object", "number"), GARMENTS: ("clothing", "object", "garment")}
MIXED = 0.1  # share of the lists that mix digits and garments
LISTS = (
    "\nPlease choose one from list [ {names}].",
    " Please choose one from the list: {names}.",
    "\nOptions: {names}.",
    " Choose from: {names}.",
)
DIRECT = (
    "\n Please directly output the answer.",
    "\n Please directly output the answer name.",
    " Answer with the name only.",
    " Reply with one word.",
)
THINK = (
    "\n Please output the thinking process in <think> </think> and final answer in <answer> </answer> tags.",
    "\n First output the thinking process in <think> </think> tags and then output the final answer in"
    " <answer> </answer> tags.",
    " Think first in <think> </think>, then answer in <answer> </answer>.",
)
CUES = {
    "zero": "one round loop",
    "one": "one straight stroke",
    "two": "a curve and a flat base",
    "three": "two open curves",
    "four": "crossing straight strokes",
    "five": "a flat top and a curve",
    "six": "a loop at the bottom",
    "seven": "a flat top and a slanted stroke",
    "eight": "two closed loops",
    "nine": "a loop at the top",
    "t-shirt": "short sleeves",
    "trouser": "two long legs",
    "pullover": "long sleeves and a closed front",
    "dress": "a narrow waist and a long hem",
    "coat": "long sleeves and an open front",
    "sandal": "straps on a thin sole",
    "shirt": "a collar and buttons",
    "sneaker": "a low shoe with laces",
    "bag": "a handle on a box",
    "ankle boot": "a high shaft on a sole",
}
REASONS = (
    "Let me look at the image. I see {cue} on a dark background. This is a photo of {name}.",
    "The image shows {cue}. Compared with the other names in the list, it looks like {name}.",
    "The object has {cue}, so the answer should be {name}.",
    "This is a photo of {name}.",
)
SLOPPY_DIRECT = ("This is a photo of {name}.", "The answer is {name}.", "<answer>{name}</answer>")
SLOPPY_THINK = ("{reason}", "<think>{reason}</think> {name}", "<answer>{name}</answer>", "{name}")


def mostly_first(options: tuple[str, ...], rng: random.Random) -> str:
    """Return the first option half of the time, otherwise one of the others."""
    return options[0] if rng.random() < 0.5 else rng.choice(options[1:])


def question(name: str, think: bool, rng: random.Random) -> str:
    """Return a user message about an image of `name`: open, or with a list of 2 to 10 candidate names."""
    kind = next(names for names in KINDS if name in names)
    text = mostly_first(QUESTIONS, rng).format(noun=mostly_first(NOUNS[kind], rng))
    count = rng.choice((0, 2, 3, 4, 5, 10, 10, 10))
    if count:
        among = CLASSES if rng.random() < MIXED else kind
        names = [*rng.sample([other for other in among if other != name], count - 1), name]
        rng.shuffle(names)
        text += mostly_first(LISTS, rng).format(names=", ".join(names))
    return text + mostly_first(THINK if think else DIRECT, rng)


def reply(name: str, think: bool, sloppy: float, rng: random.Random) -> str:
    """Return a correct answer; with probability `sloppy` not in the requested format."""
    reason = rng.choice(REASONS).format(cue=CUES[name], name=name)
    if rng.random() < sloppy:
        return rng.choice(SLOPPY_THINK if think else SLOPPY_DIRECT).format(reason=reason, name=name)
    return f"<think>{reason}</think><answer>{name}</answer>" if think else name


def corpus(lines: int = 4000) -> list[str]:
    """Return texts to train the byte-level BPE tokenizer: every wording and name, with and without a leading space."""
    rng = random.Random(0)
    text = []
    for _ in range(lines):
        name, think = rng.choice(CLASSES), rng.random() < 0.5
        text += [question(name, think, rng), reply(name, think, 0.5, rng)]
        other = rng.choice(OTHER_NAMES)
        text += [
            other,
            f" {other}, {rng.choice(OTHER_NAMES)}",
            name,
            "system\nYou are a helpful assistant.",
            "user\n",
            "assistant\n",
        ]
    return text
