"""Checks that take a second and save hours: data, prompts, model files, devices. No torch.

Everything here raises `UserError`: one line that names the key, file or class at fault and the fix.
"""

from __future__ import annotations

import os
from pathlib import Path

from common.config.schema import Config
from common.counted import counted
from common.data import task
from common.data.loading import report
from common.plugins import locate
from common.runtime.distributed import started_by_launcher, world
from common.types import BadImage, UserError


def check(config: Config) -> task.Questions:
    """Run all checks of one configuration: devices and pictures here, the rest by the learner's own check.

    Returns:
        What the run asks, so that nobody in this process has to read the data again.
    """
    check_devices(config)
    questions = task.build(config)
    check_choice(config, questions)
    check_images(config, questions)
    locate(config.learner.check, "learner.check")(config, questions)
    return questions


def check_choice(config: Config, questions: task.Questions) -> None:
    """The best evaluation is chosen on images that no result is reported on, and its checkpoint has to be kept."""
    if config.evaluate != "best" or config.trainer.name == "none":
        return
    if "val" not in questions.evaluation:
        raise UserError(
            f"evaluate=best chooses on validation images, and data={config.data.name} has none in this setting; use"
            " evaluate=last"
        )
    if config.checkpoint.max_checkpoints < 2:
        raise UserError("evaluate=best needs checkpoint.max_checkpoints=2 or more: the best one and the last")


def check_images(config: Config, questions: task.Questions) -> None:
    """Every picture is there and has content; the ranks try to decode it before they load the model."""
    bad = {}
    for image in questions.images:
        try:
            questions.task.images.stamp(image)
        except BadImage as error:
            bad[image] = str(error)
    if bad and not config.data.skip_bad:
        raise report(bad, len(questions.images))


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
