"""The recipe of ALERT's tiny model: what it is shown in pre-training is what the framework shows it later."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice

import pytest
import torch

from alert.prompt import meta_task
from alert.tiny import episodes as tiny_episodes
from alert.tiny import layout as tiny_layout
from alert.tiny import pretrain as tiny_guidance
from alert.tiny import pretrain as tiny_pretrain
from alert.tiny import recipe as tiny_gemma3
from alert.tiny.episodes import Reference
from common import parsing
from common.data.loading import Loader
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, pack_plain
from common.models import extra_embeddings, files, meter, vlm
from common.models.encoder import PromptEncoder
from common.models.tiny import gemma3 as untrained
from common.models.tiny import model_cache
from common.models.tiny.wordings import DIGITS, GARMENTS
from common.types import Prompt


@pytest.fixture(scope="module")
def processor():
    return untrained.build_processor(tiny_episodes.corpus)


@pytest.fixture
def model(processor):
    return untrained.build_model(processor.tokenizer, seed=0)


@pytest.fixture
def policy(model, processor, model_config, tmp_path):
    """The untrained model as runs load it."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return vlm.load(tmp_path / "model", model_config(family="gemma3"), torch.device("cpu"))


NAMES = tiny_episodes.DIGITS


def asked(items, categories):
    names = [NAMES[c] for c in categories]
    return [
        Prompt(i.image, meta_task(names, "short"), i.name, tuple(names), None, (), categories, image_last=True)
        for i in items
    ]


@pytest.mark.parametrize("categories", [(3, 8), (0, 9, 4, 6, 1)], ids=["two", "five, beyond the window"])
def test_loss_is_that_of_each_reply_alone(model, policy, processor, digits_task, categories):
    items = digits_task.train.items[:3]
    bank = torch.randn(10, 4, 96, generator=torch.Generator().manual_seed(0))
    policy = replace(policy, extra_embeddings=extra_embeddings.attach(policy.model, bank, trainable=False))
    prompts = PromptEncoder(policy, Loader(digits_task.images, 32), 512)(asked(items, categories))
    episodes = tiny_pretrain.Episodes(model, processor, seed=0)
    replies = [episodes.ids(text) for text in ("<think>It is.</think><answer>six</answer>", "nine", "The answer")]
    groups = [PromptGroup(p, (torch.tensor(reply),)) for p, reply in zip(prompts, replies, strict=True)]
    packed = pack_plain(groups, policy.family, policy.pad, policy.device)
    logps, _ = PolicyScorer(replace(policy, banned=()), 1.0, 1024)(packed)

    beginning, image = episodes.prompt(meta_task([NAMES[c] for c in categories], "short"), categories)
    assert all(prompt.ids.tolist() == beginning + image for prompt in prompts)
    # two rows, so that the first is padded
    rows = [
        tiny_layout.Row(beginning, image, replies[2:], [0], [0]),
        tiny_layout.Row(beginning, image, replies[:2], [0, 0], [0, 0]),
    ]
    features = model.model.get_image_features(torch.cat([prompts[i].pixel_values for i in (2, 0, 1)])).pooler_output
    laid_out = tiny_layout.lay_out(rows, model.config.image_token_id, processor.tokenizer.pad_token_id)
    seen = tiny_layout.visible(laid_out, model.config.text_config.sliding_window)
    output = tiny_layout.forward(model, laid_out, seen, bank, features, episodes.first)
    loss = tiny_layout.reply_loss(model, laid_out, output.last_hidden_state)
    assert loss.item() == pytest.approx(-logps.mean().item(), abs=1e-5)


# Beginning: a name (30), a word (2), a category of two embeddings (50 51: entry 0), a name (31), a word, entry 1 (52 53).
# Then parts: an image of two tokens (9 9), a word (4) and a reply.
BEGINNING = [30, 2, 50, 51, 31, 2, 52, 53]


@pytest.fixture
def laid_out():
    """Two parts in the first row, one (that shows entry 0, called 30) in the second, which is padded."""
    rows = [
        tiny_layout.Row(BEGINNING, [9, 9, 4], [[31, 5], [6]], [1, 0], [31, 30]),
        tiny_layout.Row(BEGINNING, [9, 9, 4], [[7, 30]], [0], [30]),
    ]
    return tiny_layout.lay_out(rows, image_token=9, pad=0)


def test_layout_by_hand(laid_out):
    assert laid_out.ids.tolist() == [
        [*BEGINNING, 9, 9, 4, 31, 5, 9, 9, 4, 6],
        [*BEGINNING, 9, 9, 4, 7, 30, 0, 0, 0, 0],
    ]
    assert laid_out.positions.tolist() == [
        [*range(8), *range(8, 13), *range(8, 12)],
        [*range(8), *range(8, 13), 0, 0, 0, 0],
    ]
    assert laid_out.ids[laid_out.targets].tolist() == [31, 5, 6, 7, 30]
    assert laid_out.names[0].tolist() == [-1] * 8 + [31] * 5 + [30] * 4


def places_of(mask):
    return [row.nonzero()[:, 0].tolist() for row in mask]


def test_visible_by_hand(laid_out):
    found = tiny_layout.visible(laid_out, window=3)
    full, sliding = places_of(found["full_attention"][0]), places_of(found["sliding_attention"][0])
    assert full[:8] == [list(range(n + 1)) for n in range(8)]
    assert full[8] == full[9] == [*range(8), 8, 9], "both tokens of the first image"
    assert full[13] == full[14] == [*range(8), 13, 14], "the second part does not see the first"
    assert full[16] == [*range(8), 13, 14, 15, 16]
    assert sliding[12] == [10, 11, 12] and sliding[13] == [6, 7, 13, 14] and sliding[15] == [13, 14, 15]
    assert found["sliding_attention"].any(-1).all(), "padding sees something"


def test_guidance_by_hand(laid_out):
    seen = tiny_layout.visible(laid_out, window=7)["sliding_attention"]
    names, alike, image = tiny_guidance.positions(laid_out, seen, first=50, width=2)
    assert places_of(names[0])[:8] == [[], [], [0], [0], [], [], [4], [4]]
    # entry 1 is near enough for the first image; of entry 0 the second image's first token (position 8) sees
    # positions 2 and 3, its second one (position 9) only 3
    assert {n: p for n, p in enumerate(places_of(alike[0])) if p} == {8: [6, 7], 9: [6, 7], 13: [2, 3], 14: [3]}
    assert {n: p for n, p in enumerate(places_of(image[0])) if p} == {10: [8, 9]}, "where 31 comes next"
    assert {n: p for n, p in enumerate(places_of(image[1])) if p} == {11: [8, 9]}, "where 30 comes next"


def test_pixels_equal_the_processor(processor):
    from PIL import Image

    grey = torch.arange(256, dtype=torch.uint8).reshape(2, 128).repeat_interleave(4, 0)[:, :32].repeat(4, 1)
    image = Image.fromarray(grey.numpy()).convert("RGB")
    stock = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    assert torch.allclose(tiny_pretrain.pixels(grey[None, None] / 255), stock, atol=1e-6)


@pytest.mark.slow
def test_first_steps_are_deterministic(processor):
    def first(seed):
        fresh = untrained.build_model(processor.tokenizer, seed)
        return list(islice(tiny_pretrain.losses(fresh, processor, seed), 3))

    assert first(0) == first(0) != first(1)


@pytest.mark.slow
@pytest.mark.parametrize("captions", [40, 0], ids=["captions", "episodes"])
def test_loss_falls(model, processor, monkeypatch, captions):
    monkeypatch.setattr(tiny_pretrain, "CAPTION_STEPS", captions)
    monkeypatch.setattr(tiny_pretrain, "CAPTION_SHARE", 0.0)
    monkeypatch.setattr(tiny_pretrain, "WARMUP_STEPS", 5)
    found = list(islice(tiny_pretrain.losses(model, processor, seed=0), 15))
    assert max(found[-3:]) < 0.75 * found[0]


def test_built_once_and_an_ordinary_folder(tmp_path, monkeypatch, model_config, digits_task):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    monkeypatch.setattr(tiny_pretrain, "CAPTION_STEPS", 1)
    monkeypatch.setattr(tiny_pretrain, "EPISODE_STEPS", 1)
    monkeypatch.setattr(tiny_gemma3, "SHIPPED", tmp_path / "nothing")
    folder = files.build("alert.tiny.recipe", str(tmp_path))
    assert type(AutoModelForImageTextToText.from_pretrained(folder)).__name__ == "Gemma3ForConditionalGeneration"
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "Gemma3Processor"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]

    monkeypatch.setattr(tiny_pretrain, "pretrain", None)  # not called again
    assert tiny_gemma3.build(tmp_path) == folder

    policy = vlm.load(folder, model_config(family="gemma3"), torch.device("cpu"))
    policy = replace(
        policy, extra_embeddings=extra_embeddings.attach(policy.model, torch.zeros(10, 4, 96), trainable=False)
    )
    prompts = asked(digits_task.train.items[:2], (1, 7, 4))
    lengths = [len(e.ids) for e in PromptEncoder(policy, Loader(digits_task.images, 32), 512)(prompts)]
    assert tiny_gemma3.meter().tokens(prompts, 32) == meter.of_folder(folder, "gemma3").tokens(prompts, 32)
    assert tiny_gemma3.meter().tokens(prompts, 32) == lengths


def test_cache_follows_the_code_not_the_comments(tmp_path):
    source = tmp_path / "recipe.py"
    source.write_text("steps = 3\n")
    first = model_cache.syntax_hash([source])
    source.write_text("# a comment\nsteps   =   3\n")
    assert model_cache.syntax_hash([source]) == first
    source.write_text("steps = 4\n")
    assert model_cache.syntax_hash([source]) != first


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        model_cache.build_once(tmp_path / "model", fail)
    assert not list(tmp_path.iterdir())


def test_whoever_finishes_first_wins(tmp_path):
    def slower(folder):
        (folder / "weights").write_text("second")
        model_cache.build_once(tmp_path / "model", lambda other: (other / "weights").write_text("first"))

    folder = model_cache.build_once(tmp_path / "model", slower)
    assert (folder / "weights").read_text() == "first" and list(tmp_path.iterdir()) == [folder]


def test_replies_answer_and_compare():
    rng = random.Random(0)
    six, others = Reference("six", "six"), [Reference("nine", "red"), Reference("two", "two")]
    replies = [tiny_episodes.reply(six, others, 0.0, rng) for _ in range(400)]
    assert all(parsing.is_strict_format(text) and parsing.matches_strictly(text, "six") for text in replies)
    compared = [text for text in replies if "red" in text or "two" in text]
    assert len(compared) / 400 == pytest.approx(tiny_episodes.CONTRAST_SHARE, abs=0.07), "three standard errors"
    assert all(("a loop at the top" in text) == ("red" in text) for text in compared), "what the images show, not names"
    sloppy = [tiny_episodes.reply(six, others, 1.0, rng) for _ in range(50)]
    assert all("six" in text and not parsing.is_strict_format(text) for text in sloppy)


def test_an_episode_is_about_its_references(model, processor):
    episodes = tiny_pretrain.Episodes(model, processor, seed=0)
    for kind, count in ((DIGITS, 2), (GARMENTS, 8)):
        row = episodes.episode(kind, count, true_names=False)
        listed = {token for token in row.beginning if token >= episodes.first}
        assert len(listed) == 4 * count
        assert all({episodes.first + 4 * c + j for j in range(4)} <= listed for c in row.categories)
        unlisted = episodes.unlisted(row, 10)
        assert not set(row.categories) & set(unlisted)
        assert sorted({*unlisted, *((token - episodes.first) // 4 for token in listed)}) == list(range(10))
        assert set(row.names) <= set(row.beginning), "the answer's name stands in the prompt"


def test_blends_keep_some_images_whole(model, processor):
    episodes = tiny_pretrain.Episodes(model, processor, seed=0)
    digits, others = ["one"] * 300, ["zero"] * 300
    state = episodes.images.get_state()
    found = episodes.blend(digits, others)
    episodes.images.set_state(state)
    torch.rand(600, generator=episodes.images)  # the weights and the choice
    whole = (found == episodes.render(digits)).flatten(1).all(1)
    assert float(whole.float().mean()) == pytest.approx(1 - tiny_pretrain.BLENDED, abs=0.09), "three standard errors"


def test_an_episode_shows_what_it_names(model, processor, monkeypatch):
    """Rendered are classes of the kind whose names the prompt lists."""
    episodes = tiny_pretrain.Episodes(model, processor, seed=0)
    model.set_attn_implementation({"text_config": "eager"})  # as in the training
    shown = []
    monkeypatch.setattr(episodes, "render", lambda names: shown.extend(names) or torch.zeros(len(names), 1, 32, 32))
    episodes.meta_tasks()
    assert set(shown) <= set(DIGITS) or set(shown) <= set(GARMENTS)


def test_names_are_single_tokens_wherever_they_stand(processor):
    for name in tiny_episodes.NAMES:
        for text in (name, f" {name}", f" {name},"):
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) == len(name.split()) + text.endswith(","), text
