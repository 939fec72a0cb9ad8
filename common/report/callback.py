"""What Hydra calls around a multirun, so that it ends with its runs side by side."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from common.runtime.distributed import rank
from common.runtime.progress import say, turn_to


class Comparison(Callback):
    """Prints the table of `python -m common.report compare` for the runs of a sweep that this process has run.

    When the process ends, since Hydra calls nobody at the end of a sweep with a failed point. The jobs of a cluster's
    array run elsewhere: there the command does it.
    """

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.failed: list[str] = []

    def on_multirun_start(self, config: DictConfig, **options: Any) -> None:
        """Have the table printed."""
        if rank() == 0 and "points" not in config.hydra.sweeper:  # the papers' sweeper has a page of its own
            atexit.register(self.show)
            say("multirun: composing every run before the first one begins")
        turn_to("multirun")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **options: Any) -> None:
        """Remember where the job has written, and whether it failed."""
        self.folders.append(Path(config.hydra.runtime.output_dir))
        if job_return.status == JobStatus.FAILED:
            self.failed.append(self.folders[-1].name)

    def show(self) -> None:
        """Print; a sweep of previews has nothing to compare."""
        # here: Hydra makes this object for every command, also for those that only show the configuration
        from common.report import compare, folders, groups
        from common.report.console import show

        runs = folders.find(folder for folder in self.folders if folder.is_dir())
        together = groups.group(runs)
        if len(self.folders) > 1 and any(group.finished for group in together):
            table = compare.build(together, [run for run in runs if not run.values])
            table.notes.extend(f"{name}: failed" for name in self.failed)
            show(table)
