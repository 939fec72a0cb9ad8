"""What a training costs: counted shapes against plain sums, torch's own counter, and memory that was really taken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.config.composition import validate
from common.config.schema import GRPOConfig
from common.cost import estimate, update
from common.cost.update import GIB, META, Batch, Pass, ShapeCounter
from common.forward import attention
from common.forward.logprobs import PolicyScorer
from common.models import vlm
from tests import peaks
from tests.conftest import NEWER, REPOSITORY, prompts_of

MIB = 2**20
WIDE = {"qwen2_vl": "depth", "gemma3": "num_hidden_layers"}


def meta(*shape, grad=False):
    return torch.empty(shape, device=META, requires_grad=grad)


def test_a_chain_by_hand():
    """Three matrices of 1 KiB, 2 KiB and 4 KiB; views cost nothing and what is freed counts no more."""
    left, right = meta(8, 32), meta(32, 16)
    with ShapeCounter() as counter:
        counter.add(left)
        product = left @ right  # 8 x 16
        assert counter.flops == 2 * 8 * 32 * 16
        assert counter.live == 1024 + 512, "right is not known, product is new"
        view = product.view(16, 8).T
        assert counter.live == 1536
        wide = torch.cat([product] * 8)
        assert counter.live == counter.peak == 1536 + 4096
        del wide
        assert (counter.live, counter.peak) == (1536, 5632)
        del product, view
        assert counter.live == 1024


def test_what_a_backward_keeps():
    """x² keeps x, exp keeps its result: two activations and the gradient on its way."""
    weight = meta(1024, grad=True)  # 4 KiB
    with ShapeCounter() as counter:
        counter.add(weight)
        loss = (weight * weight).exp().sum()
        assert counter.live == 4096 + 4096 + 4, "exp's result; the product itself is gone"
        loss.backward()
    assert counter.peak <= 4 * 4096 + 8


@pytest.mark.parametrize("mask", [False, True])
def test_attention_keeps_no_scores(mask):
    """512 x 512 scores of four heads would be 4 MiB. Two products forward, five backward."""
    query, key = meta(1, 4, 512, 64, grad=True), meta(1, 4, 512, 64, grad=True)
    seen = torch.ones(1, 1, 512, 512, dtype=torch.bool) if mask else None
    with ShapeCounter() as counter:
        out = F.scaled_dot_product_attention(query, key, key, attn_mask=seen, is_causal=not mask)
        product = 2 * 4 * 512 * 512 * 64
        assert counter.flops == 2 * product
        out.sum().backward()
    assert counter.flops == 7 * product
    assert counter.peak < 4 * MIB
    assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention", "and PyTorch is as before"


@pytest.mark.sampled
@pytest.mark.parametrize("family", ["qwen2_vl", *NEWER, "gemma3"])
@pytest.mark.parametrize("lora", [0, 8])
@pytest.mark.slow
def test_operations_are_those_of_the_real_model(untrained_folders, family, lora):
    """torch's own counter over the same model with weights; neither knows what a mask hides."""
    case = {"family": family, "lora": lora, "checkpointing": False, "dtype": "float32"}
    config = peaks.config_of(case)
    on_meta, real = (
        vlm.on_meta(untrained_folders[family], config),
        vlm.load(untrained_folders[family], config, torch.device("cpu")),
    )
    for policy in (on_meta, real):
        attention.install(policy.model, "copy")
    found = update.measure(on_meta, peaks.row(on_meta), 64)
    scorer = PolicyScorer(real, 1.0, 64).train()
    # plain sums, since the counter does not know the CPU's kernel; kernels compute the scores again in the backward
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logps, _ = scorer(peaks.row(real))
        forward = counter.get_total_flops()
        counts = counter.get_flop_counts()
        # the scores of a frozen tower are needed once
        frozen = [name for name in counts if lora and name.endswith(f".{real.family.vision[0]}")]
        scores = counts["Global"][torch.ops.aten.bmm] / 2
        scores -= sum(counts[name].get(torch.ops.aten.bmm, 0) for name in frozen) / 2
        assert len(frozen) == (lora > 0)
        logps.sum().backward()
    assert found.forward == pytest.approx(forward, rel=0.01)
    assert found.backward == pytest.approx(counter.get_total_flops() - forward + scores, rel=0.01)


@pytest.fixture
def small(untrained_folders):
    """The tiny Qwen2-VL on meta, a group's prompt, and 0.5 M weights."""
    case = {"family": "qwen2_vl", "lora": 0, "checkpointing": False, "dtype": "float32"}
    return vlm.on_meta(untrained_folders["qwen2_vl"], peaks.config_of(case))


def prompt_of(policy):
    return estimate._encoded(policy, peaks.Prompt("0", "the", ""), peaks.SIZE)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("dtype", "stage", "ranks", "states", "gradients", "step"),
    [
        ("float32", 0, 1, 8, 4, 4),
        ("float32", 1, 1, 12, 4, 8),
        ("float32", 2, 4, 3, 1, 2),
        ("bfloat16", 0, 4, 12, 2, 10),
        ("bfloat16", 1, 4, 3, 2, 1),
        ("bfloat16", 2, 4, 3, 0.5, 2.5),
        ("bfloat16", 3, 4, 3, 0.5, 2.5),
    ],
)
def test_bytes_per_weight(small, dtype, stage, ranks, states, gradients, step):
    """Two moments, an fp32 copy, and 12 bytes while AdamW steps, divided as ZeRO divides them."""
    small.model.to(getattr(torch, dtype))
    weights = sum(p.numel() for p in small.model.parameters())
    batch, trainer = Batch(prompt_of(small), 1, 2, 8), GRPOConfig(**GRPO, beta=0.1)
    deepspeed = {"zero_optimization": {"stage": stage}}
    found = update.memory(small, Pass(0, 0, 0, 1000), batch, batch, trainer, deepspeed, ranks)
    size = 4 if dtype == "float32" else 2
    back, stepping = found["backward"], found["optimizer step"]
    assert back["weights"] == weights * size / (ranks if stage == 3 else 1)
    assert back["reference"] == weights * size and back["activations"] == 1000
    assert back["optimizer states"] == weights * states
    assert back["gradients"] == stepping["gradients"] == weights * gradients
    assert stepping["optimizer step"] == weights * step
    assert back["reduction bucket"] == (weights * size if stage else 0), "no more than there is to reduce"
    assert found["sampling"]["weights"] == weights * size, "whole while sampling"
    assert found["sampling"]["caches and logits"] >= update.cache_bytes(small, 2, len(batch.prompt.ids) + 8)


GRPO = {
    "name": "grpo",
    "learning_rate": 1e-6,
    "epochs": 1.0,
    "group_size": 2,
    "epsilon": 0.2,
}


def test_a_window_bounds_the_cache(untrained_folders):
    case = {"family": "gemma3", "lora": 0, "checkpointing": False, "dtype": "float32"}
    policy = vlm.on_meta(untrained_folders["gemma3"], peaks.config_of(case))
    text = policy.model.config.get_text_config()
    sliding = sum(kind == "sliding_attention" for kind in text.layer_types)
    full, window = len(text.layer_types) - sliding, text.sliding_window
    each = 2 * 3 * text.num_key_value_heads * text.head_dim * 4
    assert update.cache_bytes(policy, 3, 10 * window) == each * (full * 10 * window + sliding * window)


def test_layers_that_share_keys_keep_none(untrained_folders):
    """Of Gemma 4's four layers: a sliding one with 32 numbers a key, a full one with 64, and two that use theirs."""
    case = {"family": "gemma4", "lora": 0, "checkpointing": False, "dtype": "float32"}
    policy = vlm.on_meta(untrained_folders["gemma4"], peaks.config_of(case))
    assert update.cache_bytes(policy, 3, 640) == 2 * 3 * 4 * (32 * 64 + 64 * 640)


def test_hours_by_hand():
    """1e15 operations an update and 100 tokens at 1 GB each, 3,600 updates, an A100."""
    cost = estimate.Cost(
        (10, 20), 100, {100: {"training": 1e15}}, {"backward": {"weights": 30.0 * GIB}}, 3600, 8, {100: 1e9}
    )
    low, high = cost.hours("A100 80 GB", 100)
    assert low == pytest.approx(1e15 / (312e12 * 0.45) + 100 * 0.003)
    assert high == pytest.approx(1e15 / (312e12 * 0.15) + 100 * 0.03)
    slow = replace(cost, traffic={100: 2.04e11})
    assert slow.hours("A100 80 GB", 100)[0] == pytest.approx(1e15 / (312e12 * 0.45) + 100 * 0.1 / 0.7)
    low, high = replace(cost, reuse=4).hours("A100 80 GB", 100)
    assert low == pytest.approx(1e15 / (312e12 * 0.45) + 25 * 0.003), "four updates share what one has sampled"
    assert high == pytest.approx(1e15 / (312e12 * 0.15) + 25 * 0.03)
    assert estimate.smallest_card(cost.bytes) == "A100 40 GB" and cost.fullest == "backward"
    silent = replace(cost, traffic={100: 0.0})
    assert silent.hours("H100", 100)[0] == pytest.approx(1e15 / (989e12 * 0.45))


@pytest.mark.slow
def test_a_run_that_has_not_begun(compose, untrained_folders):
    """What `dry=true` says of a model in a folder; one that is built here is tiny, and one without training free."""
    path = f"model.path={untrained_folders['qwen2_vl']}"
    config = validate(compose(path, "data=digits", "shots=1", "gpus=2"))
    prompts, memory, short, long = estimate.foreseen(config, asked := prompts_of(config))
    limit = config.rollout.max_completion_tokens
    assert re.fullmatch(rf"prompts: \d+ to \d+ tokens, completions up to {limit}", prompts)
    assert "GiB per GPU, most in" in memory and "smallest card: RTX 4090" in memory
    for line, length in ((short, r"\d"), (long, limit)):
        pattern = rf"completions of {length} tokens: training \S+ \+ sampling \S+ TFLOP per update, "
        assert re.match(pattern, line) and line.endswith("h of training on 2 x A100 80 GB")
    few, many = (float(line.split("training ")[1].split()[0]) for line in (short, long))
    assert many > few
    assert estimate.foreseen(replace(config, trainer=replace(config.trainer, name="none")), asked) == []
    assert estimate.foreseen(replace(config, model=replace(config.model, path=None)), asked) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [("method=alert", "model=tiny_gemma3", "data=digits"), ("method=sft", "data=digits")]
)
def test_methods_cost_what_they_ask(compose, untrained_folders, changes):
    """ALERT's bank is trained beside the adapters; supervised training samples nothing."""
    config = validate(compose(*changes, "shots=2", "model.load_in_8bit=false"))
    family = config.model.family
    cost = estimate.of_run(config, prompts_of(config), untrained_folders[family], 1)
    if family == "gemma3":
        bank = 10 * 4 * 96 * 4  # classes, tokens of a picture, width, bytes
        assert cost.memory["backward"]["gradients"] > bank
        assert all(set(phases) == {"training", "sampling"} for phases in cost.operations.values())
        lent = replace(config, trainer=replace(config.trainer, embeddings="host"))
        hosted = estimate.of_run(lent, prompts_of(lent), untrained_folders[family], 1)
        kept = cost.memory["backward"]["gradients"] - hosted.memory["backward"]["gradients"]
        assert kept == bank, "the host keeps the bank, its gradient and its moments"
    else:
        (length,) = cost.operations
        assert set(cost.operations[length]) == {"training"} and cost.traffic == {length: 0.0}
        assert "sampling" not in cost.memory and length == cost.completion < 12


# ---- against memory that was really taken


def widened(folder, target, width):
    """The tiny model with another width and 30,000 words, random weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = json.loads((folder / "config.json").read_text())
    text, heads = config["text_config"], width // 64
    text |= {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 3, "vocab_size": 30_000}
    text |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4), "head_dim": 64}
    if config["model_type"] == "qwen2_vl":
        text["rope_parameters"]["mrope_section"] = [8, 12, 12]
        config["vision_config"]["hidden_size"] = width
    else:
        text["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
        text["query_pre_attn_scalar"] = 64
    target.mkdir()
    AutoProcessor.from_pretrained(folder).save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(target)).save_pretrained(target)
    (target / "generation_config.json").write_text((folder / "generation_config.json").read_text())
    return target


def measured(case):
    """What `tests.peaks` prints; freed memory goes back to the system at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.peaks", json.dumps(case)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def case_of(untrained_folders, tmp_path, family, width, lora, checkpointing, dtype="float32", stage=None, how="copy"):
    folder = widened(untrained_folders[family], tmp_path / "wide", width)
    case = {"folder": str(folder), "family": family, "lora": lora, "checkpointing": checkpointing}
    return {**case, "dtype": dtype, "stage": stage, "attention": how}


def counted(case):
    policy = vlm.on_meta(Path(case["folder"]), peaks.config_of(case))
    attention.install(policy.model, case["attention"])
    return policy, update.measure(policy, peaks.row(policy))


def check_pass(case):
    _, one = counted(case)
    scored, trained = measured(case)
    print(case["family"], case["lora"], case["checkpointing"], one.scored / MIB, scored, one.trained / MIB, trained)
    assert one.trained / MIB == pytest.approx(trained, rel=0.15)
    assert one.scored / MIB == pytest.approx(scored, rel=0.15)


@pytest.mark.faults
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [0, 16])
@pytest.mark.parametrize("width", [256, 512, 1024])
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_every_backward_takes_what_was_counted(untrained_folders, tmp_path, family, width, lora, checkpointing):
    check_pass(case_of(untrained_folders, tmp_path, family, width, lora, checkpointing))


@pytest.mark.faults
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_merged_attention_takes_what_was_counted(untrained_folders, tmp_path, family):
    check_pass(case_of(untrained_folders, tmp_path, family, 1024, 0, False, how="merge"))


@pytest.mark.faults
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_an_engine_takes_what_was_computed(untrained_folders, tmp_path, monkeypatch, family, stage, dtype):
    """One rank; a CPU has no CUDA context."""
    monkeypatch.setattr(update, "CONTEXT", 0.0)
    case = case_of(untrained_folders, tmp_path, family, 1024, 0, False, dtype, stage)
    policy, one = counted(case)
    batch = Batch(prompt_of(policy), 1, 1, 1)
    phases = update.memory(policy, one, None, batch, peaks.TRAINER, peaks.deepspeed(stage), 1)
    found = [sum(phases[phase].values()) / MIB for phase in ("backward", "optimizer step")]
    seen = measured(case)
    print(family, stage, dtype, found, seen)
    assert found == pytest.approx(seen, rel=0.15)
