"""Rank of this process, and exchange of small Python objects. With one process every function is the identity."""

from __future__ import annotations

import os
import socket
from typing import Any, TypeVar

T = TypeVar("T")
ALONE = "FEWSHOT_ALONE"  # set beside RANK when a process is its own launcher, to its port
LONGEST_WAIT = 1800  # seconds that a rank waits for the others before the run fails


def rank() -> int:
    """Return the number of this process, 0 if it is the only one."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started_by_launcher() -> bool:
    """Tell whether torchrun, SLURM or common/launch.py started this process as one rank of several."""
    return "RANK" in os.environ and not formed_alone()


def formed_alone() -> bool:
    """Tell whether the launcher's variables are those of `form_group_alone`, in this process or one that started it.

    A launcher that such a process starts, torchrun for example, overwrites them and leaves ALONE, with another port.
    """
    return ALONE in os.environ and os.environ[ALONE] == os.environ.get("MASTER_PORT")


def form_group_alone() -> None:
    """Set a launcher's variables for a group of one process, on a free port; without them DeepSpeed looks for MPI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {**alone, ALONE: str(port)}


def forget_group_alone() -> None:
    """Undo `form_group_alone`, so that processes started from here form a group of their own."""
    if formed_alone():
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", ALONE):
            os.environ.pop(name, None)


def gather(item: T) -> list[T]:
    """Return every rank's item, in rank order, on every rank. All ranks must call it."""
    if world() == 1:
        return [item]
    import torch.distributed as dist

    items: list[Any] = [None] * world()
    dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    """Wait until every rank has called this."""
    gather(None)


def share_of(items: list[T]) -> list[T]:
    """Return this rank's part of a list: every `world`-th item, beginning at its rank."""
    return items[rank() :: world()]


def interleave(parts: list[list[T]]) -> list[T]:
    """Undo `share_of` on the gathered parts.

    >>> interleave([["a", "c", "e"], ["b", "d"]])
    ['a', 'b', 'c', 'd', 'e']
    """
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(len(part) for part in parts))]
