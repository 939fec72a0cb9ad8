"""Watch the jobs of an array in SLURM's queue, while `hydra/launcher=slurm` waits for them.

submitit uses `sacct`, which needs accounting: without it every query logs a warning, and a job that ended without a
result is waited for forever. `squeue` is always available, and gives the reason why a job is pending.
"""

from __future__ import annotations

import logging
import re
import subprocess
import time

from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from common.runtime.progress import say
from common.types import UserError

log = logging.getLogger(__name__)
EVERY = 60  # seconds between two queries, fewer at first
NEVER = re.compile(  # reasons that do not go away unless the request or the cluster's settings change
    r"PartitionTimeLimit|PartitionNodeLimit|BadConstraints|\w+NotAllowed|Invalid\w+|(Assoc|QOS)\w+PerJob(Limit)?"
)
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
KEYS = {"PartitionTimeLimit": "timeout_min", "PartitionNodeLimit": "nodes"}  # keys of hydra.launcher to change


class Queue(SlurmInfoWatcher):
    """Replaces submitit's watcher of job states."""

    def __init__(self) -> None:
        super().__init__(delay_s=EVERY)
        self.told: set[str] = set()

    def update(self) -> None:
        """Query squeue about all jobs that have not ended.

        Raises:
            UserError: SLURM will never start one of them; the array is cancelled.
        """
        self._last_status_check = time.time()
        waiting = self._registered - self._finished
        arrays = {job.split("_")[0] for job in waiting}
        try:
            rows = [row for array in sorted(arrays) for row in ask(array)]
        except ConnectionError as error:  # the controller is unavailable for a moment: jobs continue
            log.warning("squeue: %s", error)
            return
        for job, state, reason in rows:
            known = state if state in (*ENDED, "PENDING") else "RUNNING"  # submitit treats unknown states as ended
            self._info_dict[job] = {"JobID": job, "State": known}
            if state == "PENDING":
                self.consider(job, reason, arrays)
        for job in waiting - {row[0] for row in rows}:
            self._info_dict[job] = {"JobID": job, "State": "ENDED"}
        self._finished |= {job for job in waiting if self.is_done(job, mode="cache")}

    def consider(self, job: str, reason: str, arrays: set[str]) -> None:
        """Print a new reason to wait, once; cancel and fail if the reason will not go away."""
        if NEVER.fullmatch(reason):
            subprocess.run(["scancel", *arrays], capture_output=True)
            key = f"hydra.launcher.{KEYS[reason]}" if reason in KEYS else "the values of hydra.launcher"
            raise UserError(f"SLURM will never start job {job} ({reason}); the array is cancelled, change {key}")
        if reason not in self.told:
            self.told.add(reason)
            say(f"job {job} waits: {reason}")


def ask(array: str) -> list[tuple[str, str, str]]:
    """Return job, state and reason of every job of an array that SLURM still lists; none if the array has ended."""
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={array}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise ConnectionError(done.stderr.strip())
    found = (line.strip().split("|") for line in done.stdout.splitlines() if line.strip())
    return [(job, state, reason) for job, state, reason in found]


def watch() -> None:
    """Install this watcher in submitit."""
    SlurmJob.watcher = Queue()
