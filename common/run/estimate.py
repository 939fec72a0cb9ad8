"""How long a training will take and how much memory it needs, each with its formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.config.schema import GRPOConfig
from common.cost.estimate import Cost, lines


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


def check_memory(cost: Cost, device: torch.device) -> Finding:
    """Bytes of one GPU as computed (common/cost/); on a GPU also what it has, and what the examination took."""
    seen = "; ".join(lines(cost)[:2])
    if device.type != "cuda":
        return Finding("memory", "ok", seen)
    available = torch.cuda.get_device_properties(device).total_memory
    seen += (
        f"; this GPU has {_bytes(available)}, the examination took {_bytes(torch.cuda.max_memory_allocated(device))}"
    )
    fix = "use deepspeed=zero3 or an offload, model.gradient_checkpointing=true, adapters, or fewer tokens_per_forward"
    return Finding("memory", "failed" if cost.bytes > available else "ok", seen, fix)


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
