"""Lines of a rehearsal's report: verdict, figures, seconds and peak memory of each check."""

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
    """Result of one check.

    verdict: `ok`; `off`: it works, but not as it should (`seen` has the details); `failed`: a run would stop or train
    something wrong. fix: key of the configuration to change. seconds and peak (GiB): those of the whole step.
    """

    check: str
    verdict: str
    seen: str
    fix: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak: float = 0.0


def within(check: str, what: str, value: float, allowed: float, fix: str, wrong: str = "failed") -> Line:
    """Return a line that is `ok` if a difference is at most the allowed one; NaN is not."""
    seen = f"{what} {value:.1e} (allowed: {allowed:.0e})"
    return Line(check, "ok" if value <= allowed else wrong, seen, fix, {"value": value, "allowed": allowed})


def timed(check: Callable[[], Iterable[Line]], name: str, device: torch.device) -> list[Line]:
    """Return the lines of a check with its seconds and peak memory. An error becomes a failed line.

    The peak is the GPU memory of PyTorch, or the resident memory of this process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # "5" resets VmHWM, which `peak` reads
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    began = time.perf_counter()
    try:
        lines = list(check())
    except Exception as error:
        lines = [Line(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])]
    seconds = time.perf_counter() - began
    return [replace(line, seconds=seconds, peak=peak(device)) for line in lines]


def peak(device: torch.device) -> float:
    """Return the peak memory since it was reset, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    assert found is not None
    return int(found[1]) / 2**20
