"""Checks that take a second and save hours: data, prompts, model files, devices. No torch.

Everything here raises `UserError`: one line that names the key, file or class at fault and the fix.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from common.config.schema import Config
from common.counted import counted
from common.data import pictures, task
from common.data.loading import examine, report
from common.plugins import locate
from common.runtime.distributed import started_by_launcher, world
from common.types import UserError


def check(config: Config) -> task.Questions:
    """Run all checks of one configuration: devices and pictures here, the rest by the learner's own check.

    Returns:
        What the run asks, so that nobody in this process has to read the data again.
    """
    check_devices(config)
    return check_asked(config)


def refusal(look: Callable[[Config], object], config: Config) -> str | None:
    """What one of these checks, `check_asked` or `check_devices`, refuses of a run, in its words; None: nothing.

    No weights are loaded; what the hub has of a tokenizer is fetched.
    """
    try:
        look(config)
    except UserError as error:
        return str(error)
    return None


def check_asked(config: Config) -> task.Questions:
    """All checks but that of the devices. Returns what the run asks."""
    questions = task.build(config)
    check_choice(config, questions)
    check_images(config, questions)
    locate(config.learner.check, "learner.check")(config, questions)
    return questions


def check_choice(config: Config, questions: task.Questions) -> None:
    """What evaluations decide, they decide on images that no result is reported on; the best checkpoint is kept."""
    if config.trainer.name == "none":
        return
    if (patience := config.trainer.patience) and "val" not in questions.evaluation:
        raise UserError(
            f"trainer.patience={patience} stops by validation images, and data={config.data.name} has none in this"
            " setting; set validation=held_out, where there is one, or trainer.patience=0"
        )
    if config.evaluate != "best":
        return
    if "val" not in questions.evaluation:
        raise UserError(
            f"evaluate=best chooses on validation images, and data={config.data.name} has none in this setting; use"
            " evaluate=last"
        )
    if config.checkpoint.max_checkpoints < 2:
        raise UserError("evaluate=best needs checkpoint.max_checkpoints=2 or more: the best one and the last")


def check_images(config: Config, questions: task.Questions) -> None:
    """Every picture is there and has content; the ranks try to decode it before they load the model.

    If one is not, all are decoded here, so that the error names whatever else is wrong with the others.
    """
    if config.data.skip_bad:
        return
    if len(pictures.of_each(questions.task.images.size, questions.images)) < len(questions.images):
        found = examine(pictures.make_loader(config, questions), questions.images)
        raise report(found.bad, len(questions.images))


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
