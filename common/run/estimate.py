"""How long a training will take and how much memory it needs, each with its formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.config.schema import GRPOConfig
from common.forward.packing import Group
from common.models.vlm import VLM


@dataclass(frozen=True)
class Finding:
    """One check: what was seen, whether it is good (`ok`), worth a look (`warning`) or a reason to stop (`failed`)."""

    check: str
    verdict: str
    seen: str
    fix: str = ""


def estimate_time(sampling: float, scoring: float, config: GRPOConfig, updates: int, ranks: int) -> Finding:
    """Seconds of the whole training from those of one prompt.

    Args:
        sampling: Seconds to sample one group.
        scoring: Seconds of forward and backward of one group.
        config: Batch sizes.
        updates: Planned updates.
        ranks: Number of processes.
    """
    each = config.prompts_per_update / ranks
    reference = 1 + (config.beta > 0) / 3  # a forward costs a third of forward and backward
    total = updates * each * (sampling / config.num_iterations + scoring * reference)
    seen = (
        f"about {_duration(total)} without evaluation = {updates} updates x {each:g} prompts per rank x"
        f" ({sampling:.3g} s sampling / {config.num_iterations}"
        f" + {scoring:.3g} s forward and backward x {reference:.2f})"
    )
    return Finding("time", "ok", seen)


def estimate_memory(
    vlm: VLM, groups: Sequence[Group], config: GRPOConfig, ranks: int, deepspeed: dict[str, Any]
) -> Finding:
    """Bytes per rank: weights, gradients, AdamW, reference and activations; on a GPU also the measured peak.

    Weights count whole under ZeRO-3 too: they are gathered while sampling. Activations are the usual rule of thumb of
    34 bytes per token, layer and width at 16 bits (arXiv 2205.05198), 2 with gradient checkpointing.
    """
    zero = deepspeed.get("zero_optimization", {})
    stage, offloaded = zero.get("stage", 0), "offload_optimizer" in zero
    parameters = list(vlm.model.parameters())
    size = next(p for p in parameters if p.is_floating_point()).element_size()
    weights, learning = sum(p.nbytes for p in parameters), [p for p in parameters if p.requires_grad]
    trained = sum(p.nbytes for p in learning)
    # two moments, and an fp32 copy of the weights: of 16 bits always, under ZeRO 1 and 2 of fp32 too
    adamw = sum(p.numel() * (12 if p.element_size() == 2 or stage in (1, 2) else 8) for p in learning)
    adapters = hasattr(vlm.model, "disable_adapter")
    text = vlm.model.config.get_text_config()
    tokens = max(len(g.prompt.ids) + sum(map(len, g.completions)) for g in groups) * config.prompts_per_forward
    if config.tokens_per_forward is not None:
        tokens = min(tokens, config.tokens_per_forward)
    per_token = 2 if getattr(vlm.model, "is_gradient_checkpointing", False) else 34
    parts = {
        "weights": weights,
        "gradients": trained / (ranks if stage >= 2 else 1),
        "AdamW": 0 if offloaded else adamw / (ranks if stage >= 1 else 1),
        "reference": weights if config.beta > 0 and not adapters else 0,
        "activations": tokens * text.num_hidden_layers * text.hidden_size * per_token * size / 2,
    }
    total = sum(parts.values())
    seen = f"about {_bytes(total)} per rank = " + " + ".join(f"{n} {_bytes(b)}" for n, b in parts.items() if b)
    if vlm.device.type != "cuda":
        return Finding("memory", "ok", seen)
    available = torch.cuda.get_device_properties(vlm.device).total_memory
    peak = torch.cuda.max_memory_allocated(vlm.device)
    seen += f"; the GPU has {_bytes(available)}, the examination took {_bytes(peak)}"
    fix = "use deepspeed=zero3 or an offload, model.gradient_checkpointing=true, adapters, or fewer tokens_per_forward"
    return Finding("memory", "failed" if total > available else "ok", seen, fix)


def _duration(seconds: float) -> str:
    """
    >>> [_duration(s) for s in (42, 600, 90_000)]
    ['42 s', '10 min', '25.0 h']
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
