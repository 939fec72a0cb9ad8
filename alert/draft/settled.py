"""What a run's configuration settles about its few-shot learner, and what it cannot have. No torch is needed to refuse,
but for the learner's own arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config.schema import Config
from common.counted import agree
from common.plugins import check_call, locate
from common.types import Task, UserError

if TYPE_CHECKING:
    from alert.draft.fit.data import FewShot


def make(config: Config, name: str) -> FewShot:
    """The learner of an entry of `few_shot`, not fitted.

    Raises:
        UserError: There is no such entry, or an argument is wrong.
    """
    if name not in config.few_shot:
        raise UserError(f"few_shot has no learner '{name}'; it has {', '.join(config.few_shot)}")
    entry: Any = config.few_shot[name]
    arguments = {key: value for key, value in entry.items() if key != "_target_"} | {"seed": config.seed}
    key = f"few_shot.{name}._target_"
    check_call(entry["_target_"], key, arguments)
    learner: FewShot = locate(entry["_target_"], key)(**arguments)
    return learner


def check(config: Config, name: str, task: Task) -> None:
    """Everything that can be refused before an encoder is loaded.

    Raises:
        UserError: Names the key and the fix.
    """
    from alert.draft.features import encoder, generated, prompts

    learner = make(config, name)
    if config.clip.load is None:
        if learner.needs & {"text", "maps"}:
            raise UserError(
                f"{name} compares pictures with class names, and clip={config.clip.name} has no text tower: choose a"
                " clip, or a learner that only looks: linear_probe, nearest_mean, tip_adapter, tip_adapter_f, cafo"
            )
        if config.visual.load is None:
            raise UserError(
                f"{name} needs an encoder: clip={config.clip.name} and visual={config.visual.name} are none"
            )
    for key, chosen in (("clip", config.clip), ("visual", config.visual)):
        encoder.check(key, chosen)
    if config.clip.load is not None:
        splits = [task.train, *task.evaluation.values()]
        names = list(dict.fromkeys(name for split in splits for name in split.names))
        if config.clip.prompts is None:
            prompts.of_templates(names, config.clip.templates)
        else:
            prompts.of_file(Path(config.clip.prompts).expanduser(), names)
    learner.check_val("val" in task.evaluation or config.selection == "paper")
    if learner.generated is not None and learner.generated_per_class:
        key = f"few_shot.{name}.generated"
        generated.pick(key, learner.generated, learner.generated_per_class, task.train.names, config.seed)
    check_classes(name, learner, task)


def check_classes(name: str, learner: FewShot, task: Task) -> None:
    """Every class has a shot, and no split has classes that a learner of fixed classes was not fitted on.

    Raises:
        UserError: Names the first.
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
        for split, asked in task.evaluation.items():
            if strange := sorted(set(asked.names) - set(task.train.names)):
                raise UserError(
                    f"{name} knows only the classes that it was fitted on, but '{split}' has {len(strange)} others,"
                    f" first: '{strange[0]}'; use setting=few_shot or shift, or a learner that reads names:"
                    " clip_zero_shot, coop, clip_adapter, vt_clip, calip, calip_fs"
                )


def own_labels(task: Task, split: str) -> list[int]:
    """The trained class of every class of a split, by name; of two classes of one name each keeps its own."""
    names, trained = task.evaluation[split].names, task.train.names
    if names == trained:
        return list(range(len(names)))
    first = {name: label for label, name in reversed(list(enumerate(trained)))}
    return [first[name] for name in names]


def dataset_of(task: Task, split: str) -> str:
    """The dataset that a split tests on."""
    return split if split in list(task.origins)[1:] else next(iter(task.origins), split)
