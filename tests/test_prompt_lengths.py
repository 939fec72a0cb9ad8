"""Prompt lengths of all datasets of both papers, as the real tokenizers count them, and every point of every sweep within
its own limits. docs/datasets.md shows the table."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import yaml

from alert.prompting import AlertPrompting
from clsrl.prompting import ClassListPrompt
from common.config.composition import validate
from common.data import task, wordnet
from common.data.names import display, imagenet_names
from common.data.source import Dataset
from common.models import meter
from common.sweep.plan import Spec, expand
from common.types import Item, Source, Split, Task
from common.vlm import check
from common.vlm.prompting import ask, of_config
from tests.conftest import REPOSITORY, TOKENIZERS
from tests.test_sweeps import SWEEPS

SPLITS = TOKENIZERS.parent / "coop_splits"
pytestmark = pytest.mark.skipif(
    not (SPLITS.is_dir() and TOKENIZERS.is_dir()), reason="neither the real tokenizers nor the field's split files"
)
NAMES = json.loads(
    (REPOSITORY / "tests" / "class_names.json").read_text("utf-8")
)  # of datasets without split file here
SPLIT = {
    "caltech101": "Caltech101",
    "dtd": "DescribableTextures",
    "eurosat": "EuroSAT",
    "flowers102": "OxfordFlowers",
    "oxford_pets": "OxfordPets",
    "stanford_cars": "StanfordCars",
    "ucf101": "UCF101",
}
CONFIG = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (REPOSITORY / "conf" / "data").glob("*.yaml")}


@cache
def names_of(data):
    """Class names by label, as prompts have them."""
    if data in NAMES:
        return tuple(NAMES[data])
    if data in SPLIT:
        rows = json.loads((SPLITS / f"split_zhou_{SPLIT[data]}.json").read_text("utf-8"))["test"]
        return tuple(display(name) for _, name in sorted({(label, name) for _, label, name in rows}))
    names = imagenet_names()
    subset = data if data in wordnet.SUBSETS else "imagenet"
    return tuple(names[wnid] for wnid in wordnet.wnids(subset))


@pytest.fixture(scope="module")
def metre(real_vocabulary):
    """`metre(family)`: counts as the published model's processor does; of its weights it needs none."""
    return cache(lambda family: meter.of_folder(real_vocabulary(family), family))


def asked_about(data, names, images):
    """A task with this many images, their classes spread over the names."""
    config = CONFIG[data]
    labels = [number * len(names) // images for number in range(images)]
    items = tuple(Item(f"{data}/{number}.jpg", label, names[label]) for number, label in enumerate(labels))
    split = Split(items, names, config["question"], config.get("open_question", ""))
    return Task(split, {"test": split}, None, "", {})


class Row(NamedTuple):
    """Tokens of one dataset's prompts.

    names: listed in a question. direct: No-Thinking's questions, SFT's and those to the untrained model; shortest and
    longest of 50. most: of one that lists the longest names. open: of one without a list. alert: of a training prompt
    with two references of the shortest names, and eight of the longest. candidates: of a test prompt with the two
    longest. reply: `<answer>` with the longest name, in either tokenizer.
    """

    names: int
    direct: tuple[int, int]
    most: int
    open: int
    alert: tuple[int, int]
    candidates: int
    reply: int


LENGTHS = {
    "imagenet": Row(100, (564, 604), 848, 224, (1005, 2622), 1024, 18),
    "caltech101": Row(40, (340, 360), 378, 224, (1005, 2590), 1007, 11),
    "oxford_pets": Row(37, (393, 393), 393, 232, (1005, 2598), 1012, 12),
    "stanford_cars": Row(78, (1094, 1166), 1278, 224, (1021, 2685), 1028, 25),
    "flowers102": Row(40, (392, 426), 452, 232, (1006, 2606), 1012, 13),
    "food101": Row(40, (376, 391), 414, 232, (1007, 2593), 1009, 12),
    "fgvc_aircraft": Row(40, (490, 536), 595, 224, (1011, 2610), 1014, 17),
    "sun397": Row(100, (530, 565), 663, 224, (1005, 2597), 1011, 12),
    "dtd": Row(47, (386, 386), 386, 224, (1005, 2586), 1009, 11),
    "eurosat": Row(10, (276, 276), 276, 224, (1005, 2592), 1009, 12),
    "ucf101": Row(40, (377, 390), 413, 224, (1005, 2596), 1009, 11),
}
THINK = 18  # tokens of CLS-RL's instruction beyond those of No-Thinking's


def questions(data, names, images, share=0.4, **choices):
    """Questions of CLS-RL's methods: those of the training, those of the test."""
    asks = ClassListPrompt(**{"instruction": "no_think", "seed": 1, "list_share": share, **choices})
    asked = asked_about(data, names, images)
    return asks.train_prompts(asked), asks.evaluation_prompts(asked, "test")


def longest_in_a_list(measure, names, count):
    """The names that take the most tokens between commas."""
    tokens = {name: len(measure.tokenizer.encode(f" {name},").ids) for name in names}
    return tuple(sorted(tokens, key=tokens.get)[-count:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "data", [pytest.param(data, marks=[pytest.mark.faults] * (data in ("imagenet", "sun397"))) for data in LENGTHS]
)
def test_lengths(metre, data):
    qwen, gemma, names = metre("qwen2_vl"), metre("gemma3"), names_of(data)
    assert len(names) == CONFIG[data]["published"]["classes"]
    trained, asked = questions(data, names, 50)
    listed = len(asked[0].choices)
    longest = longest_in_a_list(qwen, names, listed)
    most = max(qwen.tokens(questions(data, longest, 1, share=1.0)[1], 384))
    (without,) = qwen.tokens(questions(data, names, 1, share=0.0)[1], 384)
    direct, think = qwen.tokens(asked, 384), qwen.tokens(questions(data, names, 50, instruction="think")[1], 384)
    assert [a - b for a, b in zip(think, direct, strict=True)] == [THINK] * 50, "nothing else differs"
    assert trained == asked and max(direct) <= most

    few = tuple(sorted(dict.fromkeys(names), key=lambda name: len(name.encode()))[:2])
    two = gemma.tokens(AlertPrompting(seed=1).train_prompts(asked_about(data, few, 2)), 896)
    every = asked_about(data, names, len(names))
    eight = gemma.tokens(AlertPrompting(seed=1).train_prompts(every), 896)
    tested = gemma.tokens(AlertPrompting(seed=1, k=2).evaluation_prompts(every, "test"), 896)
    replies = [len(m.tokenizer.encode(f"<answer>{name}</answer>").ids) for m in (qwen, gemma) for name in names]
    found = Row(listed, (min(direct), max(direct)), most, without, (min(two), max(eight)), max(tested), max(replies))
    assert found == LENGTHS[data]


@pytest.mark.parametrize("data", LENGTHS)
def test_the_documentation_shows_the_table(data):
    names, *rest = LENGTHS[data]
    cells = [" – ".join(f"{n:,}" for n in dict.fromkeys(c)) if isinstance(c, tuple) else f"{c:,}" for c in rest]
    page = (REPOSITORY / "docs" / "datasets.md").read_text("utf-8")
    assert f"| {data} | {names} | {' | '.join(cells)} |\n" in page


@pytest.mark.slow
def test_a_prompt_counted_by_hand(metre):
    """Chat, question and image of one prompt each, written down whole."""
    qwen, gemma = metre("qwen2_vl"), metre("gemma3")
    names = ("cat", "dog")
    ((_, prompt),) = zip(*questions("dtd", names, 1, share=1.0), strict=True)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|vision_end|>"
        f"What type of texture is in the photo?\n Please choose one from list [ {', '.join(prompt.choices)}].\n Please"
        " directly output the answer.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert qwen.tokens([prompt], 384) == [len(qwen.tokenizer.encode(text).ids) + 14 * 14]
    prompt = AlertPrompting(seed=1).train_prompts(asked_about("dtd", names, 2))[0]
    written = prompt.text.replace("<category>", "<pad>")
    text = f"<bos><start_of_turn>user\n{written}\n\n<start_of_image><end_of_image>\n\n<end_of_turn>\n<start_of_turn>model\n"
    ids = gemma.tokenizer.encode(text, add_special_tokens=False).ids
    assert gemma.tokens([prompt], 896) == [len(ids) - 2 + 3 * 256], "two categories and the image"


# ---- every point of every sweep

LEARNERS = {path.stem for path in (REPOSITORY / "conf" / "few_shot").glob("*.yaml")}  # they ask nothing
ASKS = ("method", "model", "data", "setting", "setting.test_on", "method.k", "method.instruction", "trainer")
CONTEXT = {"qwen2_vl": 32_768, "gemma3": 131_072}  # tokens; Gemma's config.json leaves it to the architecture
# The longest prompt of any point, in tokens. Mini sweeps are run whole elsewhere; ALERT's figure 3 shows its
# table 1, and the averages of few-shot learners ask nothing.
LONGEST = {
    **dict.fromkeys([f"alert_table{number}" for number in range(1, 7)] + ["alert_fig5"], 2622),
    "alert_fig4": 2685,
    "clsrl_fig1": 1192,
    "clsrl_fig2": 1192,
    "clsrl_fig3": 441,
    "clsrl_fig4": 1192,
    "clsrl_fig5": 1192,
    "clsrl_table1": 1179,
    "clsrl_table2": 1192,
    "clsrl_table3": 648,
    "clsrl_table4": 250,
    "clsrl_thinking": 1201,
    "refine_rft": 250,
}


def points(sweep):
    """What the points of a sweep choose that a prompt depends on, each once, those that others need included."""
    keys = yaml.safe_load((REPOSITORY / "sweeps" / f"{sweep}.yaml").read_text("utf-8"))["hydra"]["sweeper"]
    waiting = expand(Spec({"seed": 1} | keys["params"], keys.get("named", {}), keys["points"]), {})
    found = {}
    while waiting:
        point = waiting.pop()
        waiting += point.needs.values()
        if point.overrides["method"] not in LEARNERS:
            chosen = tuple(f"{key}={value}" for key, value in point.overrides.items() if key in ASKS)
            found[(*chosen, "shots=1", *(["method.draft=class_means"] if "draft" in str(point.overrides) else []))] = (
                None
            )
    return [*found]


def unseen(config, only_test=False, contents=None, min_per_class=1):
    """A dataset of pictures that nobody opens: one of each class to train on, ten to test."""
    names = names_of(config.name)
    train, val, test = (
        tuple(
            Item(
                f"{config.name}/{part}/{number}.jpg", number * len(names) // count, names[number * len(names) // count]
            )
            for number in range(count)
        )
        for part, count in (("train", len(names)), ("val", min(10, len(names))), ("test", 10))
    )
    return Dataset(config, Source(names, train, val, test, None, config.name, ""), {})


@pytest.fixture(scope="module")
def tokens(metre):
    """`tokens(family, prompt, size)`, each text counted once: sweeps share most of their questions."""
    return cache(lambda family, prompt, size: metre(family).tokens([prompt], size)[0])


SHORT = ("alert_fig5", "alert_table1", "clsrl_fig3", "clsrl_table3", "refine_rft")  # seconds for all of them


@pytest.mark.parametrize(
    "sweep",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SHORT else pytest.mark.faults)
        for name in SWEEPS
        if name not in ("alert_fig3", "few_shot_averages")
    ],
)
def test_every_point_of_a_sweep_fits(metre, tokens, compose, monkeypatch, sweep):
    """The check of a run passes, and beside what it checks, the longest name fits into a reply."""
    monkeypatch.setattr(task, "load_dataset", unseen)
    lengths = []
    for overrides in points(sweep):
        config = validate(compose(*overrides))
        measure, asked = metre(config.model.family), ask(of_config(config), task.build(config).task)
        every_split = [asked.train, *asked.evaluation.values()]
        check.check_lengths(config, every_split, measure)
        room = config.rollout.max_completion_tokens
        longest = 0
        for prompt in {p.text: p for part in every_split for p in part}.values():
            bare = replace(prompt, image="", label="", choices=(), aliases=())
            longest = max(longest, tokens(config.model.family, bare, config.model.image_size))
        lengths.append(longest)
        assert longest + room <= CONTEXT[config.model.family], overrides
        names = {name for split in (asked.task.train, *asked.task.evaluation.values()) for name in split.choices}
        replies = [f"<think></think>{asked.prompting.label_response(name)}" for name in names]
        assert max(len(each.ids) for each in measure.tokenizer.encode_batch(replies)) < room, overrides
    assert max(lengths) == LONGEST[sweep]
