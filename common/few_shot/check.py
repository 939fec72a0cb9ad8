"""Check a run's configuration of its few-shot learner, and build the learner.

Configuration errors are found without torch and before any encoder is loaded; only the learner's own arguments need
torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config.schema import Config, EncoderConfig
from common.counted import agree
from common.data.task import TaskData
from common.plugins import check_call, locate
from common.types import Task, UserError

if TYPE_CHECKING:
    from common.few_shot.heads.base import FewShotHead


def name_of(config: Config) -> str:
    """Return the name of the chosen learner.

    Raises:
        UserError: None is chosen.
    """
    if not config.few_shot or not {"name", "_target_"} <= config.few_shot.keys():
        raise UserError("no few-shot learner is chosen; add one, such as few_shot=cafo")
    return str(config.few_shot["name"])


def make(config: Config) -> FewShotHead:
    """Build the learner that `few_shot` describes, not fitted.

    Raises:
        UserError: There is none, or an argument is wrong.
    """
    name_of(config)
    entry: Any = config.few_shot
    arguments = {key: value for key, value in entry.items() if key not in ("name", "_target_")} | {"seed": config.seed}
    key = "few_shot._target_"
    check_call(entry["_target_"], key, arguments)
    learner: FewShotHead = locate(entry["_target_"], key)(**arguments)
    return learner


def check(config: Config, data: TaskData) -> None:
    """Check a run of a few-shot learner; implements `Check` of common/learner.py."""
    if (name := name_of(config)) != (own := config.method["learner"]):
        raise UserError(f"few_shot={name}: method={config.method['name']} fits {own}; choose method={name}")
    check_fit(config, data.task)


def check_fit(config: Config, task: Task) -> None:
    """Check everything that can be checked before an encoder is loaded.

    Raises:
        UserError: Names the key and the fix.
    """
    from common.few_shot.encoders import encoder, generated, texts

    name, learner, clip, visual = name_of(config), make(config), config.clip, config.visual
    # Encoders: a learner that compares with class names needs CLIP, every other one at least some encoder.
    if clip is None or clip.load is None:
        if learner.needs & {"text", "maps"}:
            raise UserError(
                f"{name} compares pictures with class names, and clip={named(clip)} has no text tower: choose a"
                " clip, or a learner that only looks: linear_probe, nearest_mean, tip_adapter, tip_adapter_f, cafo"
            )
        if visual is None or visual.load is None:
            raise UserError(f"{name} needs an encoder: clip={named(clip)} and visual={named(visual)} are none")
    # Weights files exist.
    for encoder_key, chosen in (("clip", clip), ("visual", visual)):
        if chosen is not None:
            encoder.check(encoder_key, chosen)
    # Texts: the prompts of all class names of all splits can be made.
    if clip is not None and clip.load is not None:
        splits = [task.train, *task.evaluation.values()]
        names = list(dict.fromkeys(name for split in splits for name in split.names))
        if clip.prompts is None:
            texts.of_templates(names, clip.templates)
        else:
            texts.of_file(Path(clip.prompts).expanduser(), names)
    # Confidences: a learner without a fit has nothing to cross-validate.
    if config.calibration == "folds" and not learner.steps:
        raise UserError(f"calibration=folds: {name} fits nothing that other photos could be kept from; leave it out")
    # Images: validation images where the fit needs them, and generated images if any are configured.
    learner.check_val("val" in task.evaluation or config.selection == "paper")
    if learner.generated is not None and learner.generated_per_class:
        generated.pick(
            "few_shot.generated", learner.generated, learner.generated_per_class, task.train.names, config.seed
        )
    check_classes(name, learner, task)


def named(encoder: EncoderConfig | None) -> str:
    """Return the name of a group's choice, as it is typed on the command line."""
    return "null" if encoder is None else encoder.name


def check_classes(name: str, learner: FewShotHead, task: Task) -> None:
    """Check that every class has a shot, and that a learner of fixed classes is tested on no other classes.

    Raises:
        UserError: Names the first class that is at fault.
    """
    if not learner.steps:
        return
    present = {item.label for item in task.train.items}
    if missing := [each for label, each in enumerate(task.train.names) if label not in present]:
        raise UserError(
            f"{name} needs a picture of every class, but {len(missing)} {agree(len(missing), 'has', 'have')} none,"
            f" first: '{missing[0]}'; use more"
            " shots"
        )
    if learner.fixed_classes:
        for split, tested in task.evaluation.items():
            if strange := sorted(set(tested.names) - set(task.train.names)):
                raise UserError(
                    f"{name} knows only the classes that it was fitted on, but '{split}' has {len(strange)} others,"
                    f" first: '{strange[0]}'; use setting=few_shot or shift, or a learner that reads names:"
                    " clip_zero_shot, coop, clip_adapter, vt_clip, calip, calip_fs"
                )
