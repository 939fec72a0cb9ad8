"""What a rehearsal reports: lines, each with its verdict, its figures, its seconds and its peak of memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    verdict: `ok`; `off`: it works, but not as it should, `seen` says by how much; `failed`: a run would stop or teach
    something wrong. fix: the key of the configuration to change. seconds and peak (GiB) are of the step it belongs to.
    """

    check: str
    verdict: str
    seen: str
    fix: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak: float = 0.0


def within(check: str, what: str, value: float, allowed: float, fix: str, wrong: str = "failed") -> Line:
    """`ok` where a difference is at most what is allowed; one that is no number is not."""
    seen = f"{what} {value:.1e} (allowed: {allowed:.0e})"
    return Line(check, "ok" if value <= allowed else wrong, seen, fix, {"value": value, "allowed": allowed})


def timed(check: Callable[[], Iterable[Line]], name: str, device: torch.device) -> list[Line]:
    """The lines of a check, each with its seconds and its peak. What it raises is one failed line: the others go on.

    The peak is what PyTorch held of the GPU, or the resident memory of this process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    began = time.perf_counter()
    try:
        lines = list(check())
    except Exception as error:
        lines = [Line(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])]
    seconds = time.perf_counter() - began
    return [replace(line, seconds=seconds, peak=peak(device)) for line in lines]


def peak(device: torch.device) -> float:
    """GiB at the highest since it was reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    assert found is not None
    return int(found[1]) / 2**20
