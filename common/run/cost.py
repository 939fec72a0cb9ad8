"""What an update costs: bytes of a GPU and floating-point operations, found on paper (common/forward/paper.py).

The real architecture goes forward and backward at its real size without its weights, so a laptop says in seconds what a
training on eight GPUs will allocate. What DeepSpeed, the sampler and CUDA hold beside it is added by formula.

Shapes: N prompts of one forward, G completions each, P and R tokens of prompt and completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.config.schema import GRPOConfig, TrainerConfig
from common.forward.logprobs import PolicyScorer, head_rows
from common.forward.packing import Group, Packed, pack_shared
from common.forward.paper import META, OnPaper
from common.models.vlm import VLM
from common.training.engine import zero_stage

BUCKET = 500_000_000  # elements of DeepSpeed's default reduce_bucket_size, allocated while gradients are reduced
CONTEXT = 0.6 * 2**30  # bytes of a CUDA context with its kernels; NCCL's buffers take about as much where ranks talk
DRAWING = 24  # bytes per logit while a token is drawn: probabilities in fp64, what is left of them, and their sums


@dataclass(frozen=True)
class Forwards:
    """One forward of an update, and its backward.

    forward, backward: floating-point operations; a backward recomputes what was not kept. scored, trained: bytes at
    most beside weights and gradients, without a gradient and with one.
    """

    forward: int
    backward: int
    scored: int
    trained: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in every phase of an update, by what holds them."""

    phases: dict[str, dict[str, float]]

    @property
    def fullest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def total(self) -> float:
        """Bytes of the phase that needs most."""
        return sum(self.phases[self.fullest].values())


def packed_on_paper(vlm: VLM, groups: Sequence[Group]) -> Packed:
    """A shared row whose pictures have shapes alone; ids, positions and masks are real."""
    packed = pack_shared(groups, vlm.family, torch.device("cpu"))
    shaped = {
        name: value.to(META) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in packed.inputs.items()
    }
    return replace(packed, inputs=shaped)


def forwards(vlm: VLM, groups: Sequence[Group], chunk: int | None = None) -> Forwards:
    """Forward and backward of some groups that share a row.

    Args:
        vlm: Loaded on the `meta` device.
        groups: With real ids.
        chunk: Rows per vocabulary projection; None: as `head_rows` has it.
    """
    scorer = PolicyScorer(vlm.model, vlm.banned, 1.0, chunk or head_rows(vlm.model)).train()
    packed = packed_on_paper(vlm, groups)
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    # gradients are counted apart, as they are divided among ranks
    hooks = [p.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None)) for p in trained]
    with OnPaper() as paper:
        for parameter in scorer.parameters():
            paper.holds(parameter)
        weights = paper.live
        with torch.no_grad():
            scorer(packed, entropy=False)
        scored, forward = paper.peak - weights, paper.flops
        if trained:
            logps, _ = scorer(packed)
            logps.sum().backward()
            del logps
        backward = paper.flops - 2 * forward if trained else 0
        peak = paper.peak - weights if trained else 0
    for hook in hooks:
        hook.remove()
    return Forwards(forward, backward, scored, peak)


def cache_bytes(vlm: VLM, rows: int, tokens: int) -> int:
    """Keys and values of so many rows of so many tokens while they are sampled; sliding layers keep their window."""
    text = vlm.model.config.get_text_config()
    heads = text.num_key_value_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or tokens
    kept = sum(min(tokens, window) if kind == "sliding_attention" else tokens for kind in kinds)
    return 2 * rows * heads * size * kept * _element(vlm)


def update_memory(
    vlm: VLM,
    one: Forwards,
    config: TrainerConfig,
    deepspeed: dict[str, Any],
    ranks: int,
    prompt: int,
    completion: int,
    sampled_prompts: int,
    weights: int | None = None,
) -> Memory:
    """What a rank holds while it samples, while it goes backward and while it steps.

    Args:
        vlm: Loaded on the `meta` device.
        one: The largest forward.
        config: Of the trainer.
        deepspeed: ZeRO stage and offload are read.
        ranks: Number of processes.
        prompt: Longest prompt in tokens.
        completion: Longest completion in tokens.
        sampled_prompts: Prompts that a rank samples together; 0: none is sampled.
        weights: Bytes of the weights, if they are kept in another format than they compute in (8 bits).
    """
    zero, stage = deepspeed.get("zero_optimization", {}), zero_stage(deepspeed)
    parameters = list(vlm.model.parameters())
    own = sum(p.nbytes for p in parameters) if weights is None else weights
    learning = [p for p in parameters if p.requires_grad]
    gradients = sum(p.nbytes for p in learning)
    count = sum(p.numel() for p in learning)
    # an fp32 copy of 16-bit weights always, and of fp32 ones where ZeRO flattens them; and AdamW's two moments
    half = learning and learning[0].element_size() == 2
    states = count * (12 if half or stage in (1, 2) else 8)
    offloaded = "offload_optimizer" in zero
    split = ranks if stage >= 1 else 1
    adapters = hasattr(vlm.model, "disable_adapter")
    reference = own if isinstance(config, GRPOConfig) and config.beta > 0 and not adapters else 0
    always = {
        "weights": own / (ranks if stage == 3 else 1),
        "reference": reference,
        "optimizer states": 0 if offloaded else states / split,
        "CUDA": CONTEXT * (2 if ranks > 1 else 1),
    }
    bucket = zero.get("reduce_bucket_size", BUCKET) if stage in (1, 2) else 0
    backward = always | {
        "gradients": gradients / (ranks if stage >= 2 else 1),
        "activations": one.trained,
        "reduction bucket": bucket * (learning[0].element_size() if learning else 0),
    }
    # beside the gradients of a rank's share: the same flat, in fp32, and one temporary of AdamW
    temporary = 0 if offloaded else (12 * count - gradients) / split
    step = always | {"gradients": gradients / (ranks if stage >= 2 else 1), "optimizer step": temporary}
    phases = {"backward": backward, "optimizer step": step}
    if sampled_prompts:
        rows = sampled_prompts * (config.group_size if isinstance(config, GRPOConfig) else 1)
        cache = cache_bytes(vlm, rows, prompt + completion)
        layers = vlm.model.config.get_text_config().num_hidden_layers
        vocabulary = vlm.model.get_output_embeddings().weight.shape[0]
        phases["sampling"] = always | {
            "weights": own,
            "cache": cache * (1 + 1 / layers),  # a layer's is copied whenever a token is added
            "prompts": one.scored,
            "drawing": rows * vocabulary * DRAWING,
        }
    return Memory(phases)


def _element(vlm: VLM) -> int:
    return next(p for p in vlm.model.parameters() if p.is_floating_point()).element_size()
