"""A few-shot learner as ALERT's draft: fitted on the run's own shots before the language model is loaded.

Its folder is a small run folder: log, checkpoints, candidates. What an earlier attempt finished is read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from alert.draft import candidate_file, settled
from alert.draft.candidates import Candidates
from alert.draft.fit.learner import FewShotLearner
from common.config.schema import Config, TrainerConfig
from common.data.task import Questions
from common.run.checkpoint import Checkpoints
from common.run.recorder import Recorder
from common.run.run_folder import RunFolder
from common.run.tracking import NullTracker
from common.runtime.distributed import barrier, gather, rank
from common.runtime.stopwatch import Stopwatch
from common.types import Task


class Drafted:
    """A few-shot learner that names candidates."""

    def __init__(self, config: Config, questions: Questions, name: str, device: torch.device, folder: Path) -> None:
        """
        Args:
            config: Of the run.
            questions: Of the run; the candidates are of its images.
            name: Of the learner, an entry of `few_shot`.
            device: Of encoders and features.
            folder: `draft` in the run folder.
        """
        self.config, self.questions, self.name = config, questions, name
        self.device, self.folder = device, folder
        self.learner: FewShotLearner | None = None

    def candidates(self) -> dict[str, Candidates]:
        """Of the images of every split. All ranks call it together. The learner is let go, a larger model follows."""
        splits = list(self.questions.task.evaluation)
        if not all(gather(all(self._path(split).with_suffix(".json").is_file() for split in splits))):
            learner = self._fitted()
            for split in splits:
                learner.predict(split)
            learner.close()
        return {split: self._read(self.questions.task, split) for split in splits}

    def of(self, task: Task, split: str) -> Candidates:
        """Of images that came later. The learner comes back from its checkpoints once, and stays."""
        if self.learner is None:
            self.learner = self._fitted()
        self.learner.ask(replace(self.questions, task=task))
        self.learner.predict(split)
        return self._read(task, split)

    def _path(self, split: str) -> Path:
        return self.folder / candidate_file.FOLDER / split

    def _read(self, task: Task, split: str) -> Candidates:
        asked = task.evaluation[split]
        images = [item.image for item in asked.items]
        dataset = settled.dataset_of(task, split)
        return candidate_file.read(self._path(split), images, asked.names, dataset, split)

    def _fitted(self) -> FewShotLearner:
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        barrier()
        checkpoints = Checkpoints(self.folder / "checkpoints", 1)
        quiet = replace(self.config, trainer=TrainerConfig(name="none"), evaluate="last", method={"name": self.name})
        learner = FewShotLearner(quiet, self.questions, self.name, self.device, self.folder, checkpoints)
        recorder = Recorder(RunFolder(self.folder), NullTracker(), 1, Stopwatch(), checkpoints.state)
        learner.fit(recorder)
        recorder.close(failed=False)
        return learner
