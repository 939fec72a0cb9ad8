"""A few-shot learner as ALERT's draft: fitted on the run's own shots before the language model is loaded.

Its folder is a small run folder: log, checkpoints, candidates. What an earlier attempt finished is read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from common.config.schema import Config, TrainerConfig
from common.data.task import TaskData, dataset_of
from common.few_shot import candidate_file
from common.few_shot.candidates import Candidates
from common.few_shot.check import name_of
from common.few_shot.learner import FewShotLearner
from common.run.checkpoint import Checkpoints
from common.run.recorder import Recorder
from common.run.run_folder import RunFolder
from common.run.tracking import NullTracker
from common.runtime.distributed import barrier, gather, rank
from common.runtime.stopwatch import Stopwatch
from common.types import Task


class FewShotDraft:
    """A few-shot learner that names candidates."""

    def __init__(self, config: Config, data: TaskData, device: torch.device, folder: Path) -> None:
        """
        Args:
            config: The run's configuration.
            data: The run's data; the candidates are of its images.
            device: Where encoders compute and features lie.
            folder: `draft` in the run folder.
        """
        self.config, self.data = config, data
        self.device, self.folder = device, folder
        self.learner: FewShotLearner | None = None

    def candidates(self) -> dict[str, Candidates]:
        """Candidates of the images of every split. All ranks call it together. The learner is let go: a larger
        model follows.
        """
        splits = list(self.data.task.evaluation)
        if not all(gather(all(self._path(split).with_suffix(".json").is_file() for split in splits))):
            learner = self._fitted()
            for split in splits:
                learner.predict(split)
            learner.close()
        return {split: self._read(self.data.task, split) for split in splits}

    def of(self, task: Task, split: str) -> Candidates:
        """Candidates of images that came later. The learner comes back from its checkpoints once, and stays."""
        if self.learner is None:
            self.learner = self._fitted()
        self.learner.set_task(task)
        self.learner.predict(split)
        return self._read(task, split)

    def _path(self, split: str) -> Path:
        return self.folder / candidate_file.FOLDER / split

    def _read(self, task: Task, split: str) -> Candidates:
        asked = task.evaluation[split]
        images = [item.image for item in asked.items]
        dataset = dataset_of(task, split)
        return candidate_file.read(self._path(split), images, asked.names, dataset, split)

    def _fitted(self) -> FewShotLearner:
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        barrier()
        checkpoints = Checkpoints(self.folder / "checkpoints", 1)
        method = {"name": name_of(self.config)}
        quiet = replace(self.config, trainer=TrainerConfig(name="none"), evaluate="last", method=method)
        learner = FewShotLearner(quiet, self.data, self.device, self.folder, checkpoints)
        recorder = Recorder(RunFolder(self.folder), NullTracker(), 1, Stopwatch(), checkpoints.state)
        learner.fit(recorder)
        recorder.close(failed=False)
        return learner
