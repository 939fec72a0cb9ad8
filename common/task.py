"""From configuration to the task of a run: images, questions, manifest. No torch.

Built twice on purpose: by the parent before anything expensive, and by every rank; the manifest's hash says they agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.config import method_arguments
from common.data import manifest
from common.data.sampling import few_shot
from common.plugins import locate
from common.schema import Config
from common.types import Method, Prompt, Task


@dataclass(frozen=True)
class Questions:
    """The task with every question of the run. `manifest` is what manifest.json holds."""

    task: Task
    method: Method
    train: list[Prompt]
    evaluation: dict[str, list[Prompt]]
    manifest: dict[str, Any]


def build(config: Config) -> Questions:
    """Read the data, pick the shots, ask the questions."""
    source = locate(config.data.reader, "data.reader")(config.data.root)
    task = few_shot(source, config.shots, config.seed)
    method: Method = locate(config.method["_target_"], "method._target_")(**method_arguments(config))
    train = method.train_prompts(task)
    evaluation = {split: method.evaluation_prompts(task, split) for split in task.evaluation}
    header = {
        "data": config.data.name,
        "setting": config.setting.name,
        "fingerprint": task.fingerprint,
        "sampler": "coop",
        "shots": config.shots,
        "seed": config.seed,
    }
    return Questions(task, method, train, evaluation, manifest.build(task, train, evaluation, header))
