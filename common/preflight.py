"""Check data, prompts, model files and devices within seconds, before a run of hours. No torch.

All errors are `UserError`: one line that names the key, file or class at fault and the fix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from common.config.schema import Config
from common.counted import counted
from common.data import loading, task
from common.data.loading import examine, report
from common.learner import Check
from common.plugins import locate
from common.runtime.distributed import started_by_launcher, world
from common.runtime.progress import say
from common.types import UserError
from common.vlm.prompting import TaskPrompts


def check(config: Config) -> task.TaskData:
    """Run all checks of one configuration: devices and images here, the rest by the learner's own check.

    Returns:
        The run's data, so that this process need not read it again.
    """
    check_devices(config)
    return check_data(config)[0]


def refusal(look: Callable[[Config], object], config: Config) -> str | None:
    """Return the error of a check (`check_data` or `check_devices`) as text; None: there is none.

    No weights are loaded; tokenizer files are downloaded from the hub.
    """
    try:
        look(config)
    except UserError as error:
        return str(error)
    return None


def check_data(config: Config) -> tuple[task.TaskData, TaskPrompts | None]:
    """Run all checks except that of the devices.

    Returns:
        The run's data and its prompts, as far as they are known without weights; None for a learner without prompts.
    """
    data = task.build(config)
    check_choice(config, data.task.evaluation)
    check_images(config, data)
    look: Check = locate(config.learner.check, "learner.check")
    prompts = look(config, data)
    for line in stronger(config):
        say(line)
    return data, prompts


def stronger(config: Config) -> list[str]:
    """Return how photos that a laptop's encoder would look at are seen better, where a hub or a GPU allows it.

    None of it is measured here: these encoders are ahead of ImageNet's on published benchmarks.
    """
    if config.visual is None or config.visual.name != "lite0" or (config.clip is not None and config.clip.load):
        return []
    lines = []
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("1", "true", "yes", "on"):
        lines.append(
            "with the hub, stronger features are one word away: visual=dinov3_b16, or, to read the classes' names, too,"
            " visual=none clip=siglip2_b16 (some 0.4 GB, once; slower than Lite0 without a GPU)"
        )
    if visible_gpus():
        lines.append(
            "with this GPU, a language model that gives reasons: python run.py data=folder"
            f" shots=20 test_share=0.2 data.folder={config.data.folder} method=clsrl model=qwen2_vl_2b gpus=1"
            " experiment=lora validation=held_out"
        )
    return lines


def check_choice(config: Config, evaluation: Collection[str]) -> None:
    """Check that decisions by evaluations use images without reported results, and that the best checkpoint is kept."""
    if config.trainer.name == "none":
        return
    if (patience := config.trainer.patience) and "val" not in evaluation:
        raise UserError(
            f"trainer.patience={patience} stops by validation images, and data={config.data.name} has none in this"
            " setting; set validation=held_out, where there is one, or trainer.patience=0"
        )
    if config.evaluate != "best":
        return
    if "val" not in evaluation:
        raise UserError(
            f"evaluate=best chooses on validation images, and data={config.data.name} has none in this setting; use"
            " evaluate=last"
        )
    if config.checkpoint.max_checkpoints < 2:
        raise UserError("evaluate=best needs checkpoint.max_checkpoints=2 or more: the best one and the last")


def check_images(config: Config, data: task.TaskData) -> None:
    """Check that every image exists and is not empty; ranks try to decode them before they load the model.

    If one is missing, all are decoded here, so that the error names everything that is wrong with the others, too.
    """
    if config.data.skip_bad:
        return
    if len(loading.of_each(data.task.images.size, data.images)) < len(data.images):
        found = examine(loading.make_loader(config, data.task), data.images)
        raise report(found.bad, len(data.images))


def check_devices(config: Config) -> None:
    """Check the number of GPUs and ranks, which would otherwise fail minutes later inside a rank."""
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
    """Return the number of NVIDIA GPUs that this process may use, without loading CUDA."""
    present = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(present)
    return min(len(present), len([index for index in chosen.split(",") if index.strip() not in ("", "-1")]))
