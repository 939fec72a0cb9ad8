"""Hydra callback that ends a multirun with a table of its runs."""

from __future__ import annotations

import atexit
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from common.runtime.distributed import rank
from common.runtime.progress import say, turn_to


class Comparison(Callback):
    """Prints the table of `python -m common.report compare` for the runs of a multirun, however they were launched.

    It is printed when the launching process exits, since Hydra calls no callback at the end of a sweep with a
    failed job. Jobs may run in other processes or on other machines, with a copy of this object, so each job writes
    a file beside the runs.
    """

    def __init__(self) -> None:
        self.notes: Path | None = None

    def on_multirun_start(self, config: DictConfig, **options: Any) -> None:
        """Register the printing of the table."""
        if rank() == 0 and "points" not in config.hydra.sweeper:  # the papers' sweeper has a page of its own
            self.notes = Path(config.hydra.sweep.dir).absolute() / f".multirun-{uuid.uuid4().hex[:8]}"
            atexit.register(self.show)
            say("multirun: composing every run before the first one begins")
        turn_to("multirun")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **options: Any) -> None:
        """Record the folder of the job, and whether it failed."""
        if self.notes is None or rank() != 0:
            return
        self.notes.mkdir(parents=True, exist_ok=True)
        note = {
            "folder": str(config.hydra.runtime.output_dir),
            "failed": job_return.status == JobStatus.FAILED,
        }
        (self.notes / f"{int(config.hydra.job.num):06}.json").write_text(json.dumps(note), encoding="utf-8")

    def show(self) -> None:
        """Print the table, unless no run has finished, as in a sweep of previews."""
        # imported here: Hydra creates this object for every command, also for those that only show the configuration
        from common.report import compare, folders
        from common.report.compare import show_table

        if self.notes is None or not self.notes.is_dir():
            return
        notes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.notes.iterdir())]
        shutil.rmtree(self.notes, ignore_errors=True)
        runs = folders.find_runs(Path(note["folder"]) for note in notes if Path(note["folder"]).is_dir())
        together = folders.group(runs)
        if len(notes) > 1 and any(group.finished for group in together):
            table = compare.build(together, [run for run in runs if not run.values])
            table.notes.extend(f"{Path(note['folder']).name}: failed" for note in notes if note["failed"])
            show_table(table)
