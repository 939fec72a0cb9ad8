"""Whole updates at the papers' size on one GPU: the real architectures of Qwen2-VL-2B and Gemma 3 4B, random weights.

    python -m benchmarks.gpu                                     # both models; one GPU with 80 GB or more
    python -m benchmarks.gpu --model tiny --device cpu           # only shows that the script works

No checkpoint is needed: the architectures are written out below as on the hub. The work is that of one of eight GPUs at
CLS-RL's ImageNet shape: two prompts of 700 tokens with an image of 384 x 384, four completions each, KL to a frozen
copy, full fine-tuning with gradient checkpointing. Random weights never end a completion, so lengths are exact: 6
tokens for the direct answer, 150 for thinking. Communication between GPUs is not part of it.

Reports seconds per update by phase, tokens per second, model FLOPs utilisation (useful FLOPs of sampling, policy and
reference over the GPU's peak at bf16; recomputation by checkpointing not counted), and the minutes that 2,500 updates
would take, beside the paper's 94 (direct) and 1,587 (thinking) on eight A100 (CLS-RL, section 5.2, table 3).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

QWEN2_VL_2B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "pad_token_id": 151643,
    },
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": True,
}
GEMMA3_4B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "vocab_size": 262208,
        "sliding_window": 1024,
        "layer_types": ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(34)],
        "max_position_embeddings": 131072,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 256,
    "image_token_index": 262144,
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
}
TINY: dict[str, Any] = {
    **QWEN2_VL_2B,
    "text_config": {
        **QWEN2_VL_2B["text_config"],
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    },
    "vision_config": {**QWEN2_VL_2B["vision_config"], "depth": 1, "embed_dim": 64, "hidden_size": 96, "num_heads": 2},
}
MODELS = {"qwen2_vl_2b": ("qwen2_vl", QWEN2_VL_2B), "gemma3_4b": ("gemma3", GEMMA3_4B), "tiny": ("qwen2_vl", TINY)}
PROMPT, COMPLETIONS, GROUP, PROMPTS = 700, {"direct": 6, "think": 150}, 4, 2
PAPER_MINUTES, UPDATES = {"direct": 94, "think": 1587}, 2500
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, vendors' sheets
WARM_UP, REPEATS = 2, 5


@dataclass(frozen=True)
class Work:
    """Useful FLOPs of one update: 2 per weight and token forward, 4 backward, attention beside them."""

    language: int
    vision: int
    width: int
    layers: int
    vocabulary: int
    patches: int

    def flops(self, completion: int) -> float:
        """Sampling, policy with gradient and reference of all groups, in the shared layout."""
        tokens = PROMPT + GROUP * completion
        attended = PROMPT**2 / 2 + GROUP * (PROMPT * completion + completion**2 / 2)
        forward = 2 * self.language * tokens + 4 * self.layers * self.width * attended
        forward += 2 * self.vision * self.patches + 2 * self.width * self.vocabulary * GROUP * completion
        return PROMPTS * forward * (1 + 3 + 1)


def build(name: str, device: torch.device) -> Any:
    """The model with random weights in bf16 on the device."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        GenerationConfig,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
    )

    from common.forward import attention

    family, values = MODELS[name]
    classes: dict[str, tuple[Any, Any]] = {
        "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
        "gemma3": (Gemma3Config, Gemma3ForConditionalGeneration),
    }
    make_config, make_model = classes[family]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = make_model(make_config(**values))
    torch.set_default_dtype(torch.float32)
    model.config.get_text_config()._attn_implementation = attention.NAME
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def prompt_of(name: str, model: Any, number: int) -> Any:
    """A prompt of PROMPT tokens with one image, random ids."""
    from common.models import families
    from common.models.encoder import Encoded

    family, config = families.family(MODELS[name][0]), model.config
    generator = torch.Generator().manual_seed(number)
    if family.blocks(torch.tensor([0]), config) is None:
        grid: torch.Tensor | None = torch.tensor([[1, 28, 28]])  # 392 x 392 after rounding to whole cells
        pixels = torch.randn(28 * 28, 3 * 2 * 14 * 14, generator=generator)
        count, around = 196, (config.vision_start_token_id, config.vision_end_token_id)
    else:
        grid, pixels = None, torch.randn(1, 3, 896, 896, generator=generator)
        count, around = config.mm_tokens_per_image, (config.boi_token_index, config.eoi_token_index)
    words = torch.randint(1000, 50000, (PROMPT - count - 2,), generator=generator)
    image = torch.tensor([around[0], *[config.image_token_id] * count, around[1]])
    ids = torch.cat([words[:16], image, words[16:]])
    blocks = family.blocks(ids, config)
    return Encoded(ids, family.positions(ids, grid, config), pixels.bfloat16(), grid, blocks)


class Made:
    """An encoder whose prompts are `prompt_of` their number."""

    store = None  # no features are kept

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model

    def __call__(self, prompts: Sequence[Any]) -> list[Any]:
        """See `Encoder`."""
        return [prompt_of(self.name, self.model, int(prompt.image)) for prompt in prompts]

    def unexpanded(self, prompt: Any) -> Any:
        """What engines of their own are asked with."""
        raise NotImplementedError("this benchmark samples with the policy, which gets the encoded form")

    pictures = unexpanded


def measure(name: str, device: torch.device) -> dict[str, dict[str, float]]:
    """Both answer lengths of one model."""
    from common.config.schema import GRPOConfig
    from common.models import families
    from common.models.vlm import VLM
    from common.rewards import Reward
    from common.rollout.base import Decoding
    from common.rollout.hf import HFRollout
    from common.training.grpo.trainer import GRPOTrainer
    from common.training.schedule import Epochs
    from common.types import Prompt

    model, family = build(name, device), families.family(MODELS[name][0])
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids.tolist())))
    placeholders = family.placeholder_tokens(model.config)
    # no id ends a completion, so all have the length that is asked for
    policy = VLM(model, SimpleNamespace(tokenizer=tokenizer), family, (), 0, placeholders, 0)
    text = model.config.get_text_config()
    inside = {n: p.numel() for n, p in model.named_parameters()}
    vision = sum(count for n, count in inside.items() if set(n.split(".")) & set(family.vision))
    language = sum(count for n, count in inside.items() if "language_model.layers" in n)
    pixels = prompt_of(name, model, 0).pixel_values
    patches = pixels.shape[0] if pixels.ndim == 2 else (pixels.shape[-1] // 14) ** 2
    work = Work(language, vision, text.hidden_size, text.num_hidden_layers, text.vocab_size, patches)
    rewards = {"even": Reward(1.0, lambda samples: [float(i % 2) for i in range(len(samples))])}
    trainer = GRPOTrainer(
        vlm=policy,
        encoder=Made(name, model),  # type: ignore[arg-type]
        rollout=HFRollout(policy),
        prompts=Epochs(lambda epoch: [Prompt(str(number), "", "") for number in range(64)]),
        rewards=rewards,
        decoding=Decoding(1.0, 50, 1.0, 1),
        config=GRPOConfig(
            "grpo",
            learning_rate=1e-6,
            epochs=1.0,
            group_size=GROUP,
            beta=0.04,
            epsilon=0.2,
            prompts_per_update=PROMPTS,
            prompts_per_forward=PROMPTS,
        ),
        deepspeed={"zero_optimization": {"stage": 2}},
        updates=1000,
        seed=1,
    )
    peak = next((value for key, value in PEAK.items() if key in _device_name(device)), float("nan"))
    numbers, update = {}, 0
    for kind, length in COMPLETIONS.items():
        trainer.samples.decoding = Decoding(1.0, 50, 1.0, length)
        steps = []
        for _ in range(WARM_UP + REPEATS):
            steps.append(trainer.step(update))
            update += 1
        phases = {p: statistics.median(s.seconds[p] for s in steps[WARM_UP:]) for p in ("rollout", "reward", "update")}
        seconds = sum(phases.values())
        numbers[kind] = {
            "seconds_per_update": seconds,
            "rollout_seconds": phases["rollout"],
            "update_seconds": phases["update"],
            "tokens_per_second": PROMPTS * (PROMPT + GROUP * length) / seconds,
            "mfu": work.flops(length) / seconds / peak,
            "minutes_for_2500_updates": seconds * UPDATES / 60,
            "paper_minutes_8_A100": PAPER_MINUTES[kind],
            "token_ratio": steps[-1].metrics["shared_prefix/token_ratio"],
            "sampler_gap": steps[0].metrics["sampling/sampling_logp_difference/mean"],
        }
        if device.type == "cuda":
            numbers[kind]["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    trainer.close()
    return numbers


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main() -> None:
    """Measure, print a table and, as the last line, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), action="append")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "error: no GPU found; --model tiny --device cpu shows that the script works\n")
    from common.runtime.group import init_process_group

    device = init_process_group(gpus=0) if arguments.device == "cpu" else _one_gpu()
    cases: dict[str, dict[str, float]] = {}
    for name in arguments.model or ["qwen2_vl_2b", "gemma3_4b"]:
        cases |= {f"{name}_{kind}": values for kind, values in measure(name, device).items()}
    columns = list(next(iter(cases.values())))
    table = Table("case", *columns, title=f"one update on {_device_name(device)}")
    for name, values in cases.items():
        table.add_row(name, *(f"{values[column]:.4g}" for column in columns))
    Console(width=200).print(table)
    print(json.dumps({"device": _device_name(device), "cases": cases}))


def _one_gpu() -> torch.device:
    """A process group of one on the first GPU."""
    import os

    from common.runtime.group import init_process_group

    os.environ.setdefault("LOCAL_RANK", "0")
    return init_process_group(gpus=1)


if __name__ == "__main__":
    main()
