"""Checks that take a second and save hours: data, prompts, checkpoint files, devices. No torch.

Everything here raises `UserError`: one line that names the key, file or class at fault and the fix.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from common import task
from common.data.loading import report
from common.distributed import started_by_launcher, world
from common.models import files
from common.schema import Config
from common.types import BadImage, UserError


def check(config: Config) -> None:
    """Run all checks of one configuration."""
    check_devices(config)
    check_8bit(config)
    meter = check_checkpoint(config)
    questions = task.build(config)
    check_images(config, questions)
    for prompts in (questions.train, *questions.evaluation.values()):
        if not prompts:
            continue
        lengths = meter.tokens(prompts, config.model.image_size)
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > config.model.max_prompt_tokens:
            raise files.too_long(lengths[longest], config.model.max_prompt_tokens, prompts[longest])


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
            raise UserError(f"gpus={config.gpus}, but the launcher started {world()} processes; use gpus={world()}")
        if config.trainer.name != "none" and config.trainer.prompts_per_update % world():
            raise UserError(
                f"trainer.prompts_per_update={config.trainer.prompts_per_update} must be divisible by the"
                f" {world()} processes that the launcher started"
            )
        return
    if config.gpus > 0 and (found := visible_gpus()) < config.gpus:
        raise UserError(f"gpus={config.gpus}, but this machine has {found}; use gpus={found}" + " (CPU)" * (not found))


def check_8bit(config: Config) -> None:
    """8-bit weights are bitsandbytes' and for GPUs alone."""
    if not config.model.load_in_8bit:
        return
    if config.gpus == 0:
        raise UserError("model.load_in_8bit=true needs a GPU: set gpus=1 or more, or model.load_in_8bit=false")
    if find_spec("bitsandbytes") is None:
        raise UserError("model.load_in_8bit=true needs bitsandbytes: uv pip install bitsandbytes")
    if config.deepspeed.get("zero_optimization", {}).get("stage", 0) == 3:
        raise UserError("model.load_in_8bit=true: ZeRO-3 cannot shard 8-bit weights; choose deepspeed=zero2")


def visible_gpus() -> int:
    """NVIDIA GPUs that this process may use, without loading CUDA."""
    present = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(present)
    return min(len(present), len([index for index in chosen.split(",") if index.strip() not in ("", "-1")]))


def check_checkpoint(config: Config) -> files.PromptMeter:
    """Check the files of the model and return its prompt meter; weights on the hub are not fetched yet."""
    model = config.model
    if model.recipe is not None:
        return files.meter_for_recipe(model.recipe)
    assert model.path is not None
    return files.meter_for_folder(files.find(model.path, model.revision, weights=False), model.family)
