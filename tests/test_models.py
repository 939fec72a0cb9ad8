"""Checkpoints, positions, encoding: our fast paths against transformers' own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.config.composition import validate
from common.config.schema import LoraConfig
from common.data import task
from common.data.loading import Loader
from common.forward import attention
from common.models import families, files, meter
from common.models.encoder import PromptEncoder
from common.models.families import Gemma3, Qwen2VL
from common.models.tiny import gemma3 as tiny_gemma3
from common.models.tiny import pictures as pictures_module
from common.models.tiny import pretrain
from common.models.tiny import qwen2_vl as tiny
from common.models.vlm import after_reply
from common.run.checkpoint import Checkpoints
from common.run.result import describe
from common.training.sft import target
from common.types import UserError
from common.vlm import check, learner
from common.vlm.learner import VLMLearner


def stock_inputs(vlm, task, prompts):
    """What a transformers user would feed the model."""
    texts = [
        vlm.processor.apply_chat_template(meter.messages(p), tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    pictures = [task.images.open(p.image).resize((32, 32), 1) for p in prompts]
    return vlm.processor(text=texts, images=pictures, padding=True, return_tensors="pt")


@pytest.mark.slow
def test_encoding_equals_the_processor(load_vlm, digits_task, think):
    vlm = load_vlm()
    prompts = think.train_prompts(digits_task)[:3]
    for encoded, prompt in zip(PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(prompts), prompts, strict=True):
        stock = stock_inputs(vlm, digits_task, [prompt])
        assert torch.equal(encoded.ids, stock["input_ids"][0])
        assert torch.equal(encoded.pixel_values, stock["pixel_values"])
        positions, _ = vlm.model.model.get_rope_index(
            **{k: stock[k] for k in ("input_ids", "image_grid_thw", "mm_token_type_ids")}
        )
        assert torch.equal(encoded.positions, positions[:, 0])


@pytest.mark.parametrize("grid", [[[1, 4, 4]], [[1, 8, 4], [1, 4, 12]]], ids=["one", "two images"])
def test_positions_equal_transformers(load_vlm, grid):
    vlm = load_vlm()
    token = vlm.processor.tokenizer.convert_tokens_to_ids
    ids = [100, 101]
    for _, high, wide in grid:
        ids += [
            token("<|vision_start|>"),
            *[token("<|image_pad|>")] * (high * wide // 4),
            token("<|vision_end|>"),
            102,
            103,
        ]
    ids, grid = torch.tensor(ids), torch.tensor(grid)
    kinds = (ids == token("<|image_pad|>")).int()
    expected, _ = vlm.model.model.get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grid)
    assert torch.equal(Qwen2VL.positions(ids, grid, vlm.model.config), expected[:, 0])


@pytest.mark.parametrize(("family", "recipe"), [("qwen2_vl", tiny), ("gemma3", tiny_gemma3)])
def test_prompt_meter_counts_what_the_encoder_makes(
    load_vlm, untrained_folders, digits_task, think, no_think, family, recipe
):
    vlm = load_vlm(family=family)
    prompts = [*think.train_prompts(digits_task)[:5], *no_think.evaluation_prompts(digits_task, "test")[:5]]
    prompts.append(replace(prompts[0], system="Be brief. "))
    lengths = [len(e.ids) for e in PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(prompts)]
    assert meter.of_folder(untrained_folders[family], family).tokens(prompts, 32) == lengths
    assert recipe.meter().tokens(prompts, 32) == lengths


def test_gemma_encoding_equals_the_processor(load_vlm, digits_task, think):
    vlm = load_vlm(family="gemma3")
    prompts = think.train_prompts(digits_task)[:3]
    for encoded, prompt in zip(PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(prompts), prompts, strict=True):
        content = [{"type": "image", "image": digits_task.images.open(prompt.image).resize((32, 32), 1)}]
        content.append({"type": "text", "text": prompt.text})
        stock = vlm.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert torch.equal(encoded.ids, stock["input_ids"][0]), "one beginning-of-sequence token, not two"
        assert torch.equal(encoded.pixel_values, stock["pixel_values"])
        assert torch.equal((encoded.blocks == 0).long(), stock["token_type_ids"][0])
        assert encoded.positions.tolist() == [list(range(len(encoded.ids)))]


@pytest.mark.parametrize(("family", "token"), [("qwen2_vl", "<|im_end|>"), ("gemma3", "<end_of_turn>")])
def test_a_reply_ends_as_the_chat_template_ends_it(load_vlm, family, token):
    vlm = load_vlm(family=family)
    assert vlm.end_of_turn == vlm.processor.tokenizer.convert_tokens_to_ids(token) and vlm.end_of_turn in vlm.eos


def test_a_frozen_tower_takes_no_adapters(load_vlm):
    lora = LoraConfig(r=4, targets=r".*(qkv|q_proj)")
    with pytest.raises(UserError, match="model.freeze_vision=true, but model.lora.targets=.*qkv"):
        load_vlm(freeze_vision=True, lora=lora)


def test_gemma_blocks_number_the_images():
    config = SimpleNamespace(image_token_id=9)
    assert Gemma3.blocks(torch.tensor([1, 9, 9, 2, 9, 9]), config).tolist() == [-1, 0, 0, -1, 1, 1]


def test_image_tokens_of_the_paper():
    # 384 -> 392 = 14 cells of 28 pixels: 196 tokens
    assert Qwen2VL.image_tokens({"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}, 384) == 196


def test_encoder_refuses_long_prompts_and_names_the_limit(load_vlm, digits_task, think):
    encoder = PromptEncoder(load_vlm(), Loader(digits_task.images, 32), max_tokens=50)
    with pytest.raises(UserError, match="tokens, but model.max_prompt_tokens=50; prompts are never cut"):
        encoder(think.train_prompts(digits_task)[:1])


def test_encoder_memory_is_bounded(load_vlm, digits_task, think):
    prompts = think.train_prompts(digits_task)
    encoder = PromptEncoder(load_vlm(), Loader(digits_task.images, 32), 512, cache_bytes=200_000)
    for start in range(0, 160, 16):
        encoder(prompts[start : start + 16])
        assert encoder.used <= 200_000
    assert 0 < len(encoder.memory) < 160
    again = encoder(prompts[:2])
    fresh = PromptEncoder(load_vlm(), Loader(digits_task.images, 32), 512)(prompts[:2])
    assert all(
        torch.equal(a.ids, b.ids) and torch.equal(a.pixel_values, b.pixel_values)
        for a, b in zip(again, fresh, strict=True)
    )


def test_pretraining_patches_equal_the_processor(load_vlm):
    from PIL import Image

    pixels = pictures_module.render_glyphs(
        pictures_module.glyph_bank("37"), torch.tensor([0, 1]), 32, torch.Generator().manual_seed(0)
    )
    pictures = [Image.fromarray((p[0] * 255).round().byte().numpy()).convert("RGB") for p in pixels]
    stock = load_vlm().processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    # PIL images hold bytes: half a grey level over CLIP's smallest deviation
    assert float((pretrain.patches(pixels) - stock).abs().max()) <= 0.5 / 255 / min(pretrain.CLIP_STD) + 1e-6


def test_lanczos_matrix_equals_pil():
    import numpy as np
    from PIL import Image

    low = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    expected = np.asarray(Image.fromarray(low).resize((32, 32), Image.Resampling.LANCZOS))
    matrix = pictures_module.lanczos_matrix(32)
    assert np.allclose((matrix @ torch.from_numpy(low) @ matrix.T).numpy(), expected, atol=1e-5)


def test_untrained_checkpoint_is_an_ordinary_folder(untrained_folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(untrained_folder)
    processor = AutoProcessor.from_pretrained(untrained_folder)
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2VLProcessor"
    text = model.config.get_text_config()
    assert text.hidden_size // text.num_attention_heads == 32, "vLLM's CPU attention serves no smaller head"


def broken(untrained_folder, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(untrained_folder, folder)
    return folder


def test_missing_and_damaged_files_are_named(untrained_folder, tmp_path):
    files.check_folder(untrained_folder)
    folder = broken(untrained_folder, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (
        whole[:-100],
        b"",
        b"not a checkpoint",
        b"\xff" * 64,
        b"\x07" + bytes(7) + b'{"a":1}',
        b"\x02" + bytes(7) + b"{}",
    ):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors.*(damaged|bytes)"):
            files.check_folder(folder)
    weights.unlink()
    with pytest.raises(UserError, match="has none of model.safetensors"):
        files.check_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        files.check_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        files.check_folder(folder)


def test_sharded_checkpoints_are_checked(untrained_folder, tmp_path):
    folder = broken(untrained_folder, tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing"):
        files.check_folder(folder)
    for content in ("{", "[]", "{}"):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match="model.safetensors.index.json is damaged"):
            files.check_folder(folder)


def test_wrong_tokenizer_and_wrong_architecture_are_named(untrained_folder, tmp_path):
    folder = broken(untrained_folder, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        meter.of_folder(folder, "qwen2_vl")
    (folder / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match="is of type llava, but model.family=qwen2_vl"):
        meter.of_folder(folder, "qwen2_vl")


def test_missing_weights_are_not_replaced_by_random_ones(untrained_folder, tmp_path, model_config):
    from safetensors.torch import load_file, save_file

    from common.models import vlm

    folder = broken(untrained_folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layers.1.mlp" in name)
    save_file(
        {name: value for name, value in weights.items() if name != gone}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks 1 weight of its architecture"):
        vlm.load(folder, model_config(), torch.device("cpu"))


def test_weights_that_do_not_fit_the_configuration_are_named(untrained_folder, tmp_path, model_config):
    from common.models import vlm

    folder = broken(untrained_folder, tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    (settings.get("text_config") or settings)["vocab_size"] = 10
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"1 weight of another shape than its config.json.*embed_tokens.*of \[10, "):
        vlm.load(folder, model_config(), torch.device("cpu"))


def test_weights_hash_follows_the_content(untrained_folder, tmp_path):
    folder = broken(untrained_folder, tmp_path)
    assert files.weights_hash(folder) == files.weights_hash(untrained_folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert files.weights_hash(folder) != files.weights_hash(untrained_folder)


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(("model", "family"), [("tiny_qwen2_vl", "qwen2_vl"), ("tiny_gemma3", "gemma3")])
@pytest.mark.parametrize("recipe", ["", "model.recipe=null"], ids=["beside a recipe", "alone"])
def test_a_given_checkpoint_goes_before_a_recipe(compose_named, untrained_folders, monkeypatch, model, family, recipe):
    def unexpected(*arguments):
        raise AssertionError("the recipe is not asked")

    monkeypatch.setattr(files, "build", unexpected)
    monkeypatch.setattr(meter, "of_a_recipe", unexpected)
    folder = untrained_folders[family]
    cfg = compose_named(f"model={model}", f"model.path={folder}", *filter(None, [recipe]))
    config = validate(cfg)
    assert files.weights_folder(config) == folder.resolve()
    assert check.check_weights(config).family is families.family(family)
    assert cfg.run_name == compose_named(f"model={model}", f"model.path={folder}").run_name, "the same run"


def test_one_rank_hashes_the_weights_for_all(monkeypatch, tmp_path):
    monkeypatch.setattr(learner, "rank", lambda: 1)
    monkeypatch.setattr(learner, "gather", lambda own: ["by rank 0", own])
    assert learner.shared_hash(tmp_path / "nothing to read here") == "by rank 0"


@pytest.mark.slow
def test_a_run_hashes_the_weights_once(monkeypatch, compose, untrained_folder, tmp_path, process_group):
    hashed = []
    monkeypatch.setattr(files, "weights_hash", lambda folder: hashed.append(folder) or "1234")
    values = [f"model.path={untrained_folder}", "model.recipe=null", f"cache_dir={tmp_path}", "label_scoring=false"]
    values += ["model.freeze_vision=true", "model.feature_cache_gb=0.1", "rewards=alert", "model.attention=merge"]
    cfg = compose(*values)
    config, data = validate(cfg), task.build(validate(cfg))
    made = VLMLearner(config, data, torch.device("cpu"), tmp_path, Checkpoints(tmp_path / "checkpoints", 2))
    result = describe(config, made.weights, data, made.decoding)
    assert hashed == [untrained_folder] and result.weights["sha256"] == "1234"
    text = made.policy.model.config.get_text_config()
    assert text._attn_implementation == attention.NAMES["merge"], "sampler and scorers keep what was asked for"


def test_a_shared_conversation_is_measured_once(untrained_folder, digits_task, think, monkeypatch):
    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer, self.batches = tokenizer, []

        def encode_batch(self, texts, **options):
            self.batches.append(len(texts))
            return self.tokenizer.encode_batch(texts, **options)

    monkeypatch.setattr(meter, "CHUNK", 3)
    first = think.train_prompts(digits_task)[0]
    kinds = [{"text": "a b"}, {"text": "a b", "system": "c"}, {"text": "a b", "image_last": True}, {"text": "a"}]
    prompts = [replace(first, **{**kinds[i % 4], "image": str(i), "label": str(i)}) for i in range(40)]
    measure = meter.of_folder(untrained_folder, "qwen2_vl")
    each = [measure.tokens([prompt], 32)[0] for prompt in prompts]
    measure.tokenizer = Counting(measure.tokenizer)
    assert measure.tokens(prompts, 32) == each and len(set(each)) > 1
    assert measure.tokenizer.batches == [3, 1]


def test_unknown_paths_and_unreachable_hub_ids_are_one_line():
    with pytest.raises(UserError, match="is not a folder"):
        files.find("/nonexistent/model", None)
    with pytest.raises(UserError, match="neither a local folder nor reachable on the hub"):
        files.find("nobody/nothing", None)


def test_lora_targets_that_match_nothing(load_vlm):
    with pytest.raises(UserError, match="model.lora.targets=nothing"):
        load_vlm(lora=LoraConfig(r=4, targets="nothing"))


def test_official_system_prompt_replaces_the_default(load_vlm, digits_task):
    from clsrl.prompting import ClassListPrompt

    method = ClassListPrompt(instruction="no_think", seed=1, train_system_prompt="think")
    vlm = load_vlm()
    text = vlm.processor.tokenizer.decode(
        PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(method.train_prompts(digits_task)[:1])[0].ids
    )
    assert text.startswith("<|im_start|>system\nOutput the thinking process in <think>")
    assert "You are a helpful assistant" not in text


def test_what_the_chat_template_writes_behind_a_reply(load_vlm):
    # of the two templates: ChatML's, and Gemma's
    ends = {"qwen2_vl": "<|im_end|>\n<|im_start|>assistant\n", "gemma3": "<end_of_turn>\n<start_of_turn>model\n"}
    for family, expected in ends.items():
        loaded = load_vlm(family=family)
        tokenizer = loaded.processor.tokenizer
        assert after_reply(loaded.processor, header=True) == expected
        everything, answer = (target(loaded, "<answer>six</answer>", loss) for loss in ("everything", "answer"))
        assert tokenizer.decode(everything) == "<answer>six</answer>" + expected
        assert tokenizer.decode(answer) == "<answer>six</answer>" + expected.partition("\n")[0]


def test_a_family_derives_from_the_base_class():
    """One that only looks like it would lack what vLLM and the shared row ask."""
    assert families.family("qwen2_vl") is Qwen2VL and families.family(f"{__name__}.Own") is Own
    for name in (f"{__name__}.Alike", f"{__name__}.after_reply"):
        with pytest.raises(UserError, match=f"model.family={name} does not derive from Family"):
            families.family(name)


class Own(Gemma3):
    """A family from outside the repository."""


class Alike:
    model_type = "gemma3"
