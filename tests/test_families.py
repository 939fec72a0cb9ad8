"""The families that followed Qwen2-VL, against transformers' own forward, positions, features and samples."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, masking_utils
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from common import Classifier
from common.config.composition import validate
from common.config.schema import FAMILIES as SHORT_NAMES
from common.config.schema import LoraConfig
from common.data.digits import Digits
from common.data.loading import Loader
from common.data.task import build
from common.export import __main__ as command
from common.forward.label_scores import LabelScorer
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, pack_plain, pack_shared
from common.models import families, meter
from common.models.encoder import PromptEncoder
from common.models.meter import messages
from common.models.vision import FeatureStore, VisionTower
from common.models.vlm import rendered
from common.rollout.base import Decoding
from common.rollout.hf import HFRollout
from common.training.sft import target
from common.types import Prompt, UserError
from common.vlm.check import check_vlm, check_weights
from tests.conftest import SQUARE
from tests.rollouts import requests
from tests.test_predict import expected
from tests.test_shared_prefix import (
    exact_towers,  # noqa: F401
    groups,
    model_for_parity,
    relative_l2,
    scores_and_gradient,
)
from tests.test_training import grpo, sft_losses

QWEN = ["qwen2_5_vl", "qwen3_vl"]
FAMILIES = [*QWEN, *SQUARE]
ONE_TILE = {
    "smolvlm": {"do_image_splitting": False, "size": {"longest_edge": 32}},
    "internvl": {"crop_to_patches": False},
    "gemma4": {"max_soft_tokens": 70},
}
LEADS = {"smolvlm": " "}  # behind "Assistant:"
GREEDY = Decoding(temperature=0.0, top_k=0, top_p=1.0, max_tokens=16)
FAST = ("qwen3_vl", "smolvlm")  # the others are like one of these
each_family = pytest.mark.parametrize(
    "family", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
each_qwen = pytest.mark.parametrize("family", QWEN)
each_square = pytest.mark.parametrize("family", SQUARE)
# what docs/models.md promises
all_families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.faults) if name in SQUARE else name for name in SHORT_NAMES]
)


# whole runs of each family take long; those of the family that differs most from the first are in `make test`
def run(names):
    return [name if name == "qwen3_vl" else pytest.param(name, marks=pytest.mark.faults) for name in names]


EXTENDING = [name for name in SHORT_NAMES if families.family(name).extends]
whole_runs = pytest.mark.parametrize("family", run(SHORT_NAMES))
extending = pytest.mark.parametrize("family", run(EXTENDING))
not_extending = pytest.mark.parametrize("family", [name for name in SHORT_NAMES if name not in EXTENDING])


@pytest.fixture
def asked(digits_task, think, no_think):
    """Three prompts of two lengths, each with an image of its own."""
    return [
        think.train_prompts(digits_task)[0],
        no_think.train_prompts(digits_task)[20],
        think.train_prompts(digits_task)[40],
    ]


@pytest.fixture
def encoded(digits_task, asked):
    return lambda vlm, store=None: PromptEncoder(vlm, Loader(digits_task.images, 32), 512, store)(asked)


def stock(vlm, prompt, completion):
    """Inputs of transformers' own forward: no positions, no layout, but what its processor gives beside the pixels."""
    ids = torch.cat([prompt.ids, completion])[None]
    beside = {"pixel_attention_mask": torch.ones(1, 1, 32, 32, dtype=torch.long)}
    if vlm.model.config.model_type in QWEN:
        beside = {"image_grid_thw": prompt.grid, "mm_token_type_ids": (ids == vlm.model.config.image_token_id).int()}
    elif vlm.model.config.model_type != "smolvlm":
        beside = {} if prompt.grid is None else {"image_position_ids": prompt.grid}
    pixels = prompt.pixel_values.to(vlm.model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **beside}


def stock_logps(vlm, prompt, completion, temperature=1.0):
    """Log-probabilities of a completion by transformers' forward, its ids banned and its softmax written out."""
    logits = vlm.model(**stock(vlm, prompt, completion)).logits[0, len(prompt.ids) - 1 : -1]
    kept = torch.tensor([i not in vlm.banned for i in range(logits.shape[1])])
    scaled = (logits / temperature).masked_fill(~kept, -torch.inf)
    return scaled.gather(1, completion[:, None])[:, 0] - scaled.logsumexp(1)


@each_family
def test_a_row_of_several_prompts_equals_transformers_forward(load_vlm, digits_task, asked, family, record_property):
    """In fp64, with an image in every prompt: log-probabilities and gradients of all weights, the tower's too."""
    vlm = model_for_parity(load_vlm, torch.float64, family=family)
    encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
    batch = groups(vlm, asked, encoder, [3, 2, 4], [2, 9, 1, 5], image=True)
    scorer = PolicyScorer(vlm, temperature=0.9, chunk=7)
    found = scores_and_gradient(scorer, pack_shared(batch, vlm.family, vlm.device))
    scorer.zero_grad(set_to_none=True)
    vlm.model.config.get_text_config()._attn_implementation = "sdpa"  # as transformers loads it
    pairs = [(group.prompt, ids) for group in batch for ids in group.completions]
    expected = torch.cat([stock_logps(vlm, prompt, ids, 0.9) for prompt, ids in pairs])
    (expected * torch.linspace(-1, 1, len(expected), dtype=torch.float64)).sum().backward()
    gradient = {n: p.grad for n, p in scorer.named_parameters() if p.grad is not None}
    assert float(expected.detach().std()) > 0.5, "flat logits would prove nothing"
    differences = float((found[0] - expected.detach()).abs().max()), relative_l2(found[2], gradient)
    record_property("log-probabilities, gradient", differences)
    assert max(differences) <= 1e-9
    tower = [name for name in gradient if set(name.split(".")) & set(vlm.family.vision)]
    assert tower and all(gradient[name].any() for name in tower if name.endswith("weight")), "the image matters"


@each_family
def test_greedy_equals_transformers_generate(load_vlm, encoded, family):
    vlm = load_vlm(family=family)
    prompts = encoded(vlm)
    found = HFRollout(vlm).generate(requests(prompts, [""] * 3), 1, GREEDY)
    for prompt, (completion,) in zip(prompts, found, strict=True):
        expected = vlm.model.generate(
            **stock(vlm, prompt, prompt.ids[:0]), do_sample=False, max_new_tokens=16, suppress_tokens=list(vlm.banned)
        )[0, len(prompt.ids) :]
        assert completion.ids.tolist() == expected.tolist()[: len(completion.ids)]
        assert len(set(completion.ids.tolist())) > 2, "it says more than one thing"


@each_family
def test_label_scores_equal_transformers_forward(load_vlm, digits_task, asked, encoded, no_think, family):
    vlm = load_vlm(family=family)
    prompts, names = encoded(vlm), ["cat", "caterpillar", "a very long name of a class", "six"]
    responses = [[no_think.label_response(name) for name in names]] * 3
    found = LabelScorer(vlm)(prompts, responses)
    with torch.no_grad():
        for prompt, scores in zip(prompts, found, strict=True):
            texts = [LEADS.get(family, "") + text for text in responses[0]]
            replies = [vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            own = [stock_logps(vlm, prompt, torch.tensor([*ids, vlm.end_of_turn])).double().sum() for ids in replies]
            assert float((scores.logps - torch.stack(own)).abs().max()) <= 1e-4
    assert float((found[0].logps - found[2].logps).abs().max()) > 1e-3, "the image matters"


@each_qwen
@pytest.mark.parametrize("grid", [[[1, 4, 4]], [[1, 8, 4], [1, 4, 12]]], ids=["one", "two images"])
def test_positions_equal_transformers(load_vlm, family, grid):
    vlm = load_vlm(family=family)
    token = vlm.processor.tokenizer.convert_tokens_to_ids
    ids = [100, 101]
    for _, high, wide in grid:
        image = [token("<|image_pad|>")] * (high * wide // 4)
        ids += [token("<|vision_start|>"), *image, token("<|vision_end|>"), 102, 103]
    ids, grid = torch.tensor(ids), torch.tensor(grid)
    kinds = (ids == token("<|image_pad|>")).int()
    expected, _ = vlm.model.model.get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grid)
    assert torch.equal(vlm.family.positions(ids, grid, vlm.model.config), expected[:, 0])


@each_qwen
@pytest.mark.parametrize("side", [32, 64, 72])
def test_image_tokens_and_bounds_are_those_of_the_processor(load_vlm, untrained_folders, family, side):
    """For squares of any size, with a processor that allows larger ones than the tiny model's."""
    vlm = load_vlm(family=family)
    processor = vlm.processor
    free = {"shortest_edge": 8 * 8, "longest_edge": 512 * 512}  # pixels
    processor.image_processor.size = free
    grids = processor.image_processor([Image.new("RGB", (side, side))], return_tensors="pt")["image_grid_thw"]
    config = meter.of_folder(untrained_folders[family], family).config
    tokens = vlm.family.image_tokens(config, side)
    assert tokens == int(grids.prod()) // processor.image_processor.merge_size**2
    vlm.family.bound(processor, side)
    larger = processor.image_processor([Image.new("RGB", (400, 400))], return_tensors="pt")["image_grid_thw"]
    assert int(larger.prod()) == int(grids.prod()), "a larger picture becomes the square of that size"


@pytest.mark.parametrize(("family", "patch", "cells"), [("qwen2_5_vl", 14, 14), ("qwen3_vl", 16, 12)])
def test_image_tokens_at_the_size_of_the_presets(family, patch, cells):
    """384 pixels are 14 cells of 28, or 12 of 32; saved configurations leave out what is the architecture's default."""
    for config in ({"spatial_merge_size": 2}, {"patch_size": patch}):
        assert families.family(family).image_tokens({"vision_config": config}, 384) == cells**2
    images = SimpleNamespace(patch_size=patch, merge_size=2, size={})
    families.family(family).bound(SimpleNamespace(image_processor=images), 384)
    assert images.size["longest_edge"] == (cells * 2 * patch) ** 2


@pytest.mark.parametrize(("family", "smallest"), [("qwen2_5_vl", 56), ("qwen3_vl", 256)])
def test_pictures_that_the_processor_would_enlarge_are_refused(compose, untrained_folders, tmp_path, family, smallest):
    """Before weights are read. The published processors' smallest sizes, in the files that hold them."""
    folder = shutil.copytree(untrained_folders[family], tmp_path / "model")

    config = validate(compose(*of_model(folder, family)))

    def check(size):
        return check_weights(replace(config, model=replace(config.model, image_size=size))).smallest

    assert check(32) == 32
    for content in ({"size": {"shortest_edge": smallest**2, "longest_edge": 4096**2}}, {"min_pixels": smallest**2}):
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
        assert check(smallest) == smallest
        with pytest.raises(
            UserError, match=f"image_size={smallest - 1}: .* enlarges .* set model.image_size={smallest} "
        ):
            check(smallest - 1)


@each_family
def test_projected_states_are_the_features_in_order(load_vlm, digits_task, asked, family):
    """Of three images in one forward; the states are in the order of the patches, whatever the tower computes in."""
    vlm = load_vlm(family=family)
    tower = VisionTower(vlm, Loader(digits_task.images, 32))
    prompts = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(asked)
    with torch.no_grad():
        hidden = tower.hidden([prompt.image for prompt in asked])
        pixels = vlm.family.pixel_inputs([p.pixel_values for p in prompts], [p.grid for p in prompts])
        expected = torch.stack(list(vlm.model.get_image_features(**pixels).pooler_output))
    assert float((tower.project(hidden) - expected).abs().max()) <= 1e-5
    assert float((expected[:, 1:] - expected[:, :-1]).abs().amax(-1).min()) > 1e-3, "no two cells are alike"


def test_the_windows_of_the_tiny_tower_reorder_its_cells(load_vlm):
    """Otherwise the test above would not see a forgotten order. Of 4 x 6 cells, for which there and back differ."""
    vlm = load_vlm(family="qwen2_5_vl")
    states = torch.arange(2 * 96.0)[:, None].expand(-1, 3)  # two images of 8 x 12 patches
    found = vlm.family.in_order(vlm.model, states, [torch.tensor([[1, 8, 12]])] * 2)
    cells = found[::4, 0] / 4
    # window by window: cells 0, 1, 6, 7, then 2, 3, 8, 9, ...
    assert cells[:12].tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    assert cells[12:24].tolist() == [12 + cell for cell in cells[:12].tolist()]
    assert cells[24:].tolist() == [24 + cell for cell in cells[:24].tolist()]


@each_family
def test_stored_features_stand_for_pixels(load_vlm, digits_task, encoded, tmp_path, family):
    """Kept on the disk, they give the scores and the replies that the pixels give: several prompts in a row."""
    vlm = load_vlm(family=family, freeze_vision=True)
    store = FeatureStore(tmp_path, 10**8)
    fresh, kept, pixels = encoded(vlm, store), encoded(vlm, store), encoded(vlm)
    assert store.used > 0 and all(p.pixel_values is None and p.features is not None for p in fresh)
    assert all(torch.equal(a.features, b.features) for a, b in zip(fresh, kept, strict=True))
    completions = (torch.tensor([110, 120, 130]), torch.tensor([140]))
    scorer = PolicyScorer(vlm, 1.0, 64).eval()
    rows = [[PromptGroup(prompt, completions) for prompt in prompts] for prompts in (pixels, kept)]
    with torch.no_grad():
        expected, *found = (
            scorer(packed)[0]
            for packed in (
                pack_shared(rows[0], vlm.family, vlm.device),
                pack_shared(rows[1], vlm.family, vlm.device),
                pack_plain(rows[1], vlm.family, vlm.pad, vlm.device),
            )
        )
    assert max(float((each - expected).abs().max()) for each in found) <= 1e-5
    rollout = HFRollout(vlm)
    replies = [rollout.generate(requests(prompts, [""] * 3), 1, GREEDY) for prompts in (pixels, kept)]
    assert [c.ids.tolist() for (c,) in replies[0]] == [c.ids.tolist() for (c,) in replies[1]]


@each_family
def test_prompts_are_measured_and_end_as_the_processor_has_them(load_vlm, untrained_folders, asked, encoded, family):
    vlm = load_vlm(family=family)
    asked.append(replace(asked[0], system="Be brief. "))
    lengths = [len(prompt.ids) for prompt in encoded(vlm)]
    said = [vlm.processor.tokenizer.decode(prompt.ids) for prompt in encoded(vlm)]
    assert ["Be brief." in text for text in said] == [False, False, False, True], "no template drops it"
    assert meter.of_folder(untrained_folders[family], family).tokens(asked, 32) == lengths
    assert import_module(f"common.models.tiny.{family}").meter().tokens(asked, 32) == lengths
    end = {"smolvlm": "<end_of_utterance>", "gemma4": "<turn|>"}.get(family, "<|im_end|>")
    assert vlm.end_of_turn == vlm.processor.tokenizer.convert_tokens_to_ids(end) and vlm.end_of_turn in vlm.eos


@each_family
def test_what_leads_to_a_reply_is_no_part_of_its_text(load_vlm, family):
    """Yet it is trained, scored and sampled: SmolVLM2's template writes a space before what the assistant says."""
    vlm, lead = load_vlm(family=family), LEADS.get(family, "")
    tokenizer = vlm.processor.tokenizer
    ids = target(vlm, "seven", "answer")
    assert tokenizer.decode(ids[:-1]) == lead + "seven" and ids[-1] == vlm.end_of_turn
    (completion,) = HFRollout(vlm)._completions(ids[None], torch.zeros(1, len(ids)))
    assert completion.text == "seven" and torch.equal(completion.ids, ids)
    turns = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    turns.append({"role": "assistant", "content": [{"type": "text", "text": "seven"}]})
    whole = tokenizer(vlm.processor.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    start = len(whole) - whole[::-1].index(int(ids[-1])) - len(ids)
    assert whole[start : start + len(ids)] == ids.tolist(), "as the template writes it"


@each_family
def test_the_default_adapters_are_on_the_language_model(load_vlm, family):
    vlm = load_vlm(family=family, lora=LoraConfig(r=4), freeze_vision=True)
    text = vlm.model.config.get_text_config()
    expected = 7 * text.num_hidden_layers - 2 * getattr(
        text, "num_kv_shared_layers", 0
    )  # these have no keys and values
    assert sum("lora_A" in name for name, _ in vlm.model.named_parameters()) == expected


@each_square
def test_an_encoded_prompt_is_what_the_processor_makes_of_one_tile(load_vlm, untrained_folders, asked, encoded, family):
    """Loaded as it is saved, and told to enlarge and cut nothing: the same ids, pixels and places of patches."""
    vlm = load_vlm(family=family)
    processor = AutoProcessor.from_pretrained(untrained_folders[family])
    for prompt, found in zip(asked, encoded(vlm), strict=True):
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt.text}]}]
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        photo = Digits().open(prompt.image).convert("RGB").resize((32, 32), 1)
        options = {**ONE_TILE[family], "add_special_tokens": False}  # Gemma's template writes its first token itself
        stock = processor(text=[text], images=[[photo]], return_tensors="pt", **options)
        assert torch.equal(found.ids, stock["input_ids"][0])
        assert torch.equal(found.pixel_values, stock["pixel_values"])
        assert found.grid is None or torch.equal(found.grid, stock["image_position_ids"])
        assert found.positions.tolist() == [list(range(len(found.ids)))]


@each_square
def test_a_picture_of_any_size_is_one_image(load_vlm, untrained_folders, family):
    vlm = load_vlm(family=family)
    pictures = [[Image.new("RGB", (32 * side, 32 * side))] for side in (1, 3)]
    made = vlm.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert made.shape[-2:] == ((4 * 70, 3 * 2**2) if family == "gemma4" else (32, 32))
    text = rendered(vlm.processor, messages(Prompt("0", "?", "")))
    batch = vlm.processor(text=[text] * 2, images=pictures, return_tensors="pt", padding=True)
    config = meter.of_folder(untrained_folders[family], family).config
    tokens = (batch["input_ids"] == vlm.model.config.image_token_id).sum(1).tolist()
    assert tokens == [families.family(family).image_tokens(config, 32)] * 2 == [64 if family == "gemma4" else 4] * 2
    assert vlm.family.smallest({}) == 0
    assert vlm.processor.image_processor.to_dict().items() >= ONE_TILE[family].items(), "an exported one says so"


@each_square
def test_no_mask_is_built_for_a_shared_row(load_vlm, encoded, monkeypatch, family):
    """transformers would take positions that begin anew for texts of their own: L x L numbers that nobody reads."""

    def build(positions):
        raise AssertionError("a mask is built")

    vlm = load_vlm(family=family)
    completions = (torch.tensor([110, 120, 130]), torch.tensor([140]))
    packed = pack_shared([PromptGroup(p, completions) for p in encoded(vlm)], vlm.family, vlm.device)
    scorer = PolicyScorer(vlm, 1.0, 64)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", build)
    scorer(packed)
    packed.inputs["attention_mask"] = None
    with pytest.raises(AssertionError, match="a mask is built"):
        scorer(packed)


PRESETS = [
    ("smolvlm", {"vision_config": {"image_size": 512, "patch_size": 16}, "scale_factor": 4}, 64),
    ("smolvlm", {"vision_config": {"image_size": 384, "patch_size": 14}, "scale_factor": 3}, 81),
    ("internvl", {"vision_config": {}}, 256),
    ("internvl", {"vision_config": {}, "image_seq_length": 64}, 64),
]


@pytest.mark.parametrize(("family", "config", "tokens"), PRESETS)
def test_image_tokens_of_published_sizes(family, config, tokens):
    """Those of the published processors (their image_seq_len), whatever the size of the picture."""
    assert {families.family(family).image_tokens(config, size) for size in (32, 512, 1000)} == {tokens}


@pytest.mark.parametrize(("side", "tokens"), [(384, 64), (528, 121), (768, 256), (896, 529), (1584, 1089)])
def test_image_tokens_of_gemma_4(side, tokens):
    """Of patches of 16 pixels, nine to a token: transformers' own computation, for the budget that the size needs."""
    budget = {64: 70, 121: 140, 256: 280, 529: 560, 1089: 1120}[tokens]
    high, wide = get_aspect_ratio_preserving_size(side, side, 16, budget * 9, 3)
    assert families.family("gemma4").image_tokens({"vision_config": {}}, side) == tokens == high * wide // 48**2


@pytest.mark.parametrize(
    ("side", "budget", "tokens"), [(32, 70, 64), (33, 140, 121), (64, 280, 256), (100, 1120, 1089), (400, 1120, 1089)]
)
def test_the_image_size_chooses_gemma_4_s_budget_of_tokens(load_vlm, untrained_folders, side, budget, tokens):
    """The smallest in which a square is not reduced, cells being 4 pixels wide: 8 x 8, 11 x 11, 16 x 16 … 33 x 33."""
    vlm = load_vlm(family="gemma4", image_size=side)
    made = vlm.processor.image_processor([Image.new("RGB", (side, side))], return_tensors="pt")
    assert vlm.processor.image_processor.max_soft_tokens == budget
    assert made["num_soft_tokens_per_image"].tolist() == [tokens]
    config = meter.of_folder(untrained_folders["gemma4"], "gemma4").config
    assert vlm.family.image_tokens(config, side) == tokens


def test_what_hears_is_never_trained(load_vlm):
    trained = {name.split(".")[1] for name, p in load_vlm(family="gemma4").model.named_parameters() if p.requires_grad}
    assert trained == {"language_model", "vision_tower", "embed_vision"}


def test_large_sizes_of_gemma_4_are_refused(untrained_folders, tmp_path):
    folder = shutil.copytree(untrained_folders["gemma4"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["use_bidirectional_attention"] = "vision"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="use_bidirectional_attention is vision, .* take E2B or E4B"):
        meter.of_folder(folder, "gemma4")


@each_family
def test_the_tiny_checkpoint_is_of_the_real_architecture(untrained_folders, family):
    model = AutoModelForImageTextToText.from_pretrained(untrained_folders[family])
    names = {
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
        "smolvlm": "SmolVLMForConditionalGeneration",
        "internvl": "InternVLForConditionalGeneration",
        "gemma4": "Gemma4ForConditionalGeneration",
    }
    assert type(model).__name__ == names[family] and model.config.model_type == family
    assert families.family(family).model_type == family


# ---- training, and what is done with it

LORA = LoraConfig(r=4, alpha=8, targets=r".*(language|text)_model.*\.(q_proj|v_proj)")
KINDS = {
    "whole": {},
    "frozen tower": {"freeze_vision": True},
    "adapters": {"lora": LORA},
    "adapters, frozen tower": {"lora": LORA, "freeze_vision": True},
}


def moved(vlm, before):
    return {name for name, p in vlm.model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.faults] * (len(kind) == 1)) for kind in KINDS.values()],
    ids=KINDS,
)
@all_families
def test_an_update_moves_what_is_trained(load_vlm, digits_task, think, family, kind):
    """GRPO, its self-check included: the sampler's numbers are the trainer's, and nothing else moves."""
    torch.manual_seed(0)
    vlm = load_vlm(family=family, **kind)
    before = {name: p.detach().clone() for name, p in vlm.model.named_parameters()}
    trainer = grpo(vlm, digits_task, think, beta=0.04)
    steps = [trainer.step(update) for update in range(2)]
    trainer.close()
    trained = {name for name, p in vlm.model.named_parameters() if p.requires_grad}
    assert moved(vlm, before) == trained
    inside = any(set(name.split(".")) & set(vlm.family.vision) for name in trained)
    assert inside == (kind == {}) and all(step.metrics["grad_norm"] > 0 for step in steps)
    assert max(step.metrics["sampling/sampling_logp_difference/max"] for step in steps) < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@all_families
def test_sft_learns_its_labels(load_vlm, digits_task, no_think, family):
    losses = sft_losses(load_vlm(family=family), digits_task, no_think)
    assert losses[-1] < 0.3 * losses[0]


QUICK = ["tracking=none", "tracking.report=false", "trainer.evaluate_every=0", "setting.test_per_class=4"]
RUNS = {
    "grpo": ["method=nothinking", "trainer.updates=2"],
    "sft": ["method=sft", "model.lora.r=4", "model.freeze_vision=true", "trainer.updates=2"],
}


def of_model(folder, family):
    return ["model=tiny_qwen2_vl", "model.recipe=null", f"model.family={family}", f"model.path={folder}"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", pytest.param("sft", marks=pytest.mark.faults)])
@whole_runs
def test_a_run_is_exported_and_predicts(runner, untrained_folders, tmp_path, family, kind):
    """The exported folder, a plain model, answers as the run's own evaluation did."""
    run, out = tmp_path / "run", tmp_path / "out"
    assert runner(run, [*RUNS[kind], *of_model(untrained_folders[family], family), *QUICK]) == 0
    rows = expected(run)[:8]
    assert command.main([str(run), str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == family
    for folder in (run, out):
        classifier = Classifier.load(folder)
        answers = classifier({row["image"]: Digits().open(row["image"]) for row in rows})
        classifier.close()
        assert [answer.reply for answer in answers] == [row["completion"] for row in rows]


@not_extending
def test_alert_is_refused_before_weights_are_read(compose, untrained_folders, family):
    """By the check of a run; with another method the same model passes it."""
    folder = untrained_folders[family]
    asked = ["method=alert", "experiment=alert_no_judge", "model=tiny_gemma3", *of_model(folder, family)[1:]]
    config = validate(compose(*asked, "data=digits", "model.max_prompt_tokens=null"))
    with pytest.raises(
        UserError, match=f"^method=alert gives the model embeddings .* model.family={family} has no place"
    ):
        check_vlm(config, build(config))
    config = validate(compose("method=clsrl", *of_model(folder, family)))
    check_vlm(config, build(config))


@pytest.mark.faults
@extending
def test_alert_trains_embeddings_of_an_images_width(runner, untrained_folders, tmp_path, family):
    arguments = ["method=alert", "experiment=alert_no_judge", "model=tiny_gemma3", *of_model("", "")[1:2]]
    arguments += [f"model.family={family}", f"model.path={untrained_folders[family]}", "data=digits", *QUICK]
    arguments += ["trainer.updates=2", "trainer.prompts_per_forward=4", "rollout.max_completion_tokens=8"]
    assert runner(tmp_path / "run", [*arguments, f"cache_dir={tmp_path}"]) == 0
    config = import_module(f"common.models.tiny.{family}").meter().config
    bank = next((tmp_path / "run").rglob("embeddings/*.safetensors"))
    (entries,) = (value for value in load_file(bank).values() if value.ndim == 3)
    tokens = families.family(family).image_tokens(config, 32)
    assert entries.shape == (10, tokens, 96) and entries.isfinite().all()
