"""Ranks: who am I, and exchanging small Python objects. With one process every function is the identity."""

from __future__ import annotations

import os
import re
import socket
from typing import Any, TypeVar

T = TypeVar("T")
ALONE = "FEWSHOT_ALONE"  # set beside RANK when this process is its own launcher
LONGEST_WAIT = 1800  # seconds that a rank waits for the others before it gives the run up


def rank() -> int:
    """Number of this process, 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started_by_launcher() -> bool:
    """Whether torchrun, SLURM or common/launch.py started this process as one rank of several."""
    return "RANK" in os.environ and ALONE not in os.environ


def adopt_slurm() -> None:
    """Under `srun` with several tasks, take rank and address from SLURM's variables, as torchrun would set them.

    A batch script itself also has SLURM_PROCID; only the tasks of a job step have SLURM_STEP_NUM_TASKS above 1.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in os.environ or tasks == 1:
        return
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
    }
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_NODELIST"]
    os.environ.setdefault("MASTER_ADDR", first_host(nodes))
    # one job step per node and job: their ids keep steps of the same node apart
    number = int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(20000 + number % 20000))


def first_host(nodes: str) -> str:
    """The first name of SLURM's compressed node list.

    >>> [first_host(nodes) for nodes in ("gpu7", "gpu[003-005,9],cpu1", "a-1,a-2", "rack[1-2]n[08-09]")]
    ['gpu7', 'gpu003', 'a-1', 'rack1n08']
    """
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def form_group_alone() -> None:
    """Set what a launcher would: a group of one, on a free port. DeepSpeed looks for MPI otherwise."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {**alone, ALONE: "1"}


def forget_group_alone() -> None:
    """Undo `form_group_alone` in the environment, so that processes started from here are ranks of their own group."""
    if ALONE in os.environ:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", ALONE):
            os.environ.pop(name, None)


def gather(item: T) -> list[T]:
    """Every rank's item, in rank order, on every rank. All ranks must call it."""
    if world() == 1:
        return [item]
    import torch.distributed as dist

    items: list[Any] = [None] * world()
    dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    """Wait until every rank is here."""
    gather(None)


def share_of(items: list[T]) -> list[T]:
    """This rank's part of a list: every `world`-th item, beginning at its rank."""
    return items[rank() :: world()]


def interleave(parts: list[list[T]]) -> list[T]:
    """Undo `share_of` on the gathered parts.

    >>> interleave([["a", "c", "e"], ["b", "d"]])
    ['a', 'b', 'c', 'd', 'e']
    """
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(len(part) for part in parts))]
