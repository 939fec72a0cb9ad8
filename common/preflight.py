"""Checks that take a second and save hours: data, prompts, model files, devices. No torch.

Everything here raises `UserError`: one line that names the key, file or class at fault and the fix.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from common.config.schema import Config
from common.counted import counted
from common.data import loading, task
from common.data.loading import examine, report
from common.learner import Check
from common.plugins import locate
from common.runtime.distributed import started_by_launcher, world
from common.types import Task, UserError
from common.vlm.prompting import TaskPrompts


def check(config: Config) -> task.TaskData:
    """Run all checks of one configuration: devices and pictures here, the rest by the learner's own check.

    Returns:
        The run's data, so that nobody in this process has to read it again.
    """
    check_devices(config)
    return check_data(config)[0]


def refusal(look: Callable[[Config], object], config: Config) -> str | None:
    """What one of these checks, `check_data` or `check_devices`, refuses of a run, in its words; None: nothing.

    No weights are loaded; what the hub has of a tokenizer is fetched.
    """
    try:
        look(config)
    except UserError as error:
        return str(error)
    return None


def check_data(config: Config) -> tuple[task.TaskData, TaskPrompts | None]:
    """All checks but that of the devices.

    Returns:
        The run's data, and what it will ask, as far as it is known without weights; None: its learner asks nothing.
    """
    data = task.build(config)
    check_choice(config, data.task)
    check_images(config, data)
    look: Check = locate(config.learner.check, "learner.check")
    return data, look(config, data)


def check_choice(config: Config, asked: Task) -> None:
    """What evaluations decide, they decide on images that no result is reported on; the best checkpoint is kept."""
    if config.trainer.name == "none":
        return
    if (patience := config.trainer.patience) and "val" not in asked.evaluation:
        raise UserError(
            f"trainer.patience={patience} stops by validation images, and data={config.data.name} has none in this"
            " setting; set validation=held_out, where there is one, or trainer.patience=0"
        )
    if config.evaluate != "best":
        return
    if "val" not in asked.evaluation:
        raise UserError(
            f"evaluate=best chooses on validation images, and data={config.data.name} has none in this setting; use"
            " evaluate=last"
        )
    if config.checkpoint.max_checkpoints < 2:
        raise UserError("evaluate=best needs checkpoint.max_checkpoints=2 or more: the best one and the last")


def check_images(config: Config, data: task.TaskData) -> None:
    """Every picture is there and has content; the ranks try to decode it before they load the model.

    If one is not, all are decoded here, so that the error names whatever else is wrong with the others.
    """
    if config.data.skip_bad:
        return
    if len(loading.of_each(data.task.images.size, data.images)) < len(data.images):
        found = examine(loading.make_loader(config, data.task), data.images)
        raise report(found.bad, len(data.images))


def check_devices(config: Config) -> None:
    """More GPUs than the machine has, or other ranks than expected, would only fail minutes later, inside a rank."""
    if started_by_launcher():
        if config.gpus > 0 and world() != config.gpus:
            raise UserError(
                f"gpus={config.gpus}, but the launcher started {counted(world(), 'process')}; use gpus={world()}"
            )
        if config.trainer.name != "none" and config.trainer.prompts_per_update % world():
            raise UserError(
                f"trainer.prompts_per_update={config.trainer.prompts_per_update} must be divisible by the"
                f" {counted(world(), 'process')} that the launcher started"
            )
        return
    if config.gpus > 0 and (count := visible_gpus()) < config.gpus:
        raise UserError(f"gpus={config.gpus}, but this machine has {count}; use gpus={count}" + " (CPU)" * (not count))


def visible_gpus() -> int:
    """NVIDIA GPUs that this process may use, without loading CUDA."""
    present = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(present)
    return min(len(present), len([index for index in chosen.split(",") if index.strip() not in ("", "-1")]))
