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


def candidates_of(
    config: Config, questions: Questions, name: str, device: torch.device, folder: Path
) -> dict[str, Candidates]:
    """The candidates of every split. All ranks call it together.

    Args:
        config: Of the run.
        questions: Of the run; the candidates are of its images.
        name: Of the learner, an entry of `few_shot`.
        device: Of encoders and features.
        folder: `draft` in the run folder.
    """
    splits = list(questions.task.evaluation)
    if not all(gather(all(_path(folder, split).with_suffix(".json").is_file() for split in splits))):
        _fit(config, questions, name, device, folder)
    found = {}
    for split in splits:
        asked = questions.task.evaluation[split]
        images = [item.image for item in asked.items]
        dataset = settled.dataset_of(questions.task, split)
        found[split] = candidate_file.read(_path(folder, split), images, asked.names, dataset, split)
    return found


def _path(folder: Path, split: str) -> Path:
    return folder / candidate_file.FOLDER / split


def _fit(config: Config, questions: Questions, name: str, device: torch.device, folder: Path) -> None:
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    barrier()
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    quiet = replace(config, trainer=TrainerConfig(name="none"), evaluate="last", method={"name": name})
    learner = FewShotLearner(quiet, questions, name, device, folder, checkpoints)
    recorder = Recorder(RunFolder(folder), NullTracker(), 1, Stopwatch(), checkpoints.state)
    learner.fit(recorder)
    for split in questions.task.evaluation:
        learner.predict(split)
    recorder.close(failed=False)
    learner.close()
