"""Adapt a run to SLURM: set rank and address of a task, and requeue the job when it is preempted."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess

from common.runtime.distributed import forget_group_alone, rank
from common.types import UserError


def adopt() -> None:
    """Set rank and address from SLURM's variables, as torchrun would, if `srun` started several tasks.

    A batch script itself has SLURM_PROCID, too; only the tasks of a job step have SLURM_STEP_NUM_TASKS above 1.

    Raises:
        UserError: The first node's name cannot be resolved here.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1:
        return
    forget_group_alone()  # of a process that started srun
    if "RANK" in os.environ:
        return
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
    }
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_NODELIST"]
    os.environ.setdefault("MASTER_ADDR", first_host(nodes))
    # a port by job and step, so that two steps on one node use different ports
    number = int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(20000 + number % 20000))
    host = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UserError(
            f"the job's first node {host}, where its {tasks} tasks meet, has no address on {socket.gethostname()}"
            f" ({error.strerror}); put it into /etc/hosts or DNS, or set MASTER_ADDR=<its address> for srun"
        ) from error


def first_host(nodes: str) -> str:
    """Return the first name of SLURM's compressed node list.

    >>> [first_host(nodes) for nodes in ("gpu7", "gpu[003-005,9],cpu1", "a-1,a-2", "rack[1-2]n[08-09]")]
    ['gpu7', 'gpu003', 'a-1', 'rack1n08']
    """
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def requeue_if_preempted() -> bool:
    """Requeue this job if SLURM is preempting it, and tell whether it was: otherwise a job that ends within the grace
    period counts as failed. A job that its user cancels is not preempted; one with `--no-requeue` is not requeued.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or rank() != 0 or shutil.which("scontrol") is None:
        return False
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True).stdout
    if not re.search(r"\bPreemptTime=\d", shown) or not re.search(r"\bRequeue=1\b", shown):
        return False
    return subprocess.run(["scontrol", "requeue", job], capture_output=True).returncode == 0
