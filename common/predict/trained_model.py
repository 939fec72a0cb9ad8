"""Read what inference needs from a finished run: weights, configuration and task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.config import composition, trust
from common.config.schema import Config, TrackingConfig, TrainerConfig
from common.counted import counted
from common.data import loading, manifest
from common.data import task as tasks
from common.data.contents import cache_folder
from common.data.names import objections
from common.data.task import TaskData
from common.learner import learner_class
from common.models.files import ADAPTERS
from common.predict.photos import Photos
from common.types import Split, Task, UserError
from common.vlm import check

SPLIT = "test"  # name of the split that holds the new pictures
RECORDS = "run"  # folder in an export with configuration, manifest and result of its run


@dataclass(frozen=True)
class TrainedModel:
    """A trained run. folder: as given. records: holds config.yaml, manifest.json, metrics.json. model: holds weights.

    trust_code: the configuration may name code of any package.
    data: where the dataset lies now, if it was moved.
    """

    folder: Path
    records: Path
    model: Path
    trust_code: bool = False
    data: Path | None = None

    @classmethod
    def of(cls, folder: Path, trust_code: bool = False, data: Path | None = None) -> TrainedModel:
        """Return the run in a folder, or the model that was exported from one."""
        if (folder / RECORDS / "config.yaml").is_file():
            return cls(folder, folder / RECORDS, folder, trust_code, data)
        return cls(folder, folder, folder / "model", trust_code, data)

    @property
    def has_weights(self) -> bool:
        """Whether the folder has a language model, or adapters of one."""
        return (self.model / "config.json").is_file() or (self.model / ADAPTERS[0]).is_file()

    @property
    def embeddings(self) -> Path:
        """Folder of a method's embeddings, if it has trained some."""
        return self.model / "embeddings"


def config_of(run: TrainedModel, began: bool = False) -> Config:
    """Return the configuration for inference: the run's own, with its trained weights and without training.

    Args:
        run: The finished run.
        began: Use the weights that training started from instead.

    Raises:
        UserError: This version cannot read it, or it names foreign code (common/config/trust.py).
    """
    file = run.records / "config.yaml"
    values = trust.read(file)
    values.pop("signature", None)
    values |= {"rewards": {}, "evaluate": "last", "doctor": False, "trainer": {"name": "none"}}
    other = f"{file} is of another version ({{}}); train it again with this one"
    # values for this machine and for inference
    try:
        values["gpus"] = 1 if values["gpus"] and torch.cuda.is_available() else 0  # this process alone
        values["tracking"] = {**values["tracking"], "mode": "disabled", "tracker": TrackingConfig.tracker}
        values["data"] = {**values["data"], "cache_gb": 0.0}  # new pictures are not cached
        values["model"] = {**values["model"], "max_prompt_tokens": None}  # a subset of names would need the true one
        if values["rollout"]["options"].get("prompt_tokens"):
            values["rollout"]["options"]["prompt_tokens"] = None
        if run.records != run.folder or not Path(values["cache_dir"]).is_dir():  # the run is from another machine
            values["cache_dir"] = str(cache_folder())
        if run.data is not None:
            values["data"] |= _moved(values["data"], run.data)
        if not began and run.has_weights:
            values["model"] = {**values["model"], "path": str(run.model)}
    except (KeyError, TypeError) as error:
        raise UserError(other.format(f"lacks or misuses {error}")) from error
    trust.check(values, file, run.trust_code)
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(values))
        config = composition.validate(cfg)  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise UserError(other.format(" ".join(str(error).split()))) from error
    return replace(config, trainer=TrainerConfig(name="none"))


def _moved(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values of a dataset that lies elsewhere now.

    Raises:
        UserError: The folder does not exist.
    """
    folder = folder.expanduser().absolute()
    if not folder.exists():
        raise UserError(f"data={folder} does not exist; give the folder in which the run's images lie now")
    if data["source"] == "hub":
        return {"hub": {**data["hub"], "id": str(folder)}}
    return {"root": str(folder.parent), "folder": str(folder)}


def without_list(config: Config) -> Config:
    """Return the configuration for prompts without a list of names.

    Raises:
        UserError: The method always lists some.
    """
    if "list_share" not in config.method:
        raise UserError(f"method={config.method['name']} cannot ask without names; methods of CLS-RL can")
    return replace(config, method={**config.method, "list_share": 0.0})


def check_names(names: Sequence[str]) -> None:
    """Check given class names: each can be an answer, and there is at least one.

    Raises:
        UserError: Names the first that cannot.
    """
    if not names:
        raise UserError("names: there is none; give class names, separated by commas")
    for objection in objections(names):
        raise UserError(f"names: {objection}")


def data_of(run: TrainedModel, config: Config, names: Sequence[str] | None = None) -> TaskData:
    """Return the task of a run with one empty test split; read from its manifest, unless its learner needs the images.

    Args:
        run: The finished run.
        config: Configuration of the run.
        names: Other class names; None: the run's own.

    Raises:
        UserError: The learner does not support other names, or one of them cannot be an answer.
    """
    if names is not None and config.learner.needs_shots:
        raise UserError(
            f"names: the categories of method={config.method['name']} are those that it was trained on:"
            " other names need a method that only reads them, such as clsrl"
        )
    # learners that are fitted again need the run's images
    if not learner_class(config).answers_alone(config, run.model):
        data = _read_again(run, config)
        splits = data.task.evaluation
        first = next(split for name, split in splits.items() if name != "val")
        kept = {name: split for name, split in splits.items() if name == "val"}
        if config.selection == "paper":  # select on the run's own test images again, not on the new pictures
            kept |= {"chosen by": first}
        return replace(data, task=replace(data.task, evaluation={**kept, SPLIT: replace(first, items=())}))
    if names is not None:
        check_names(names)
    frozen = _manifest(run)
    first = next(split for name, split in frozen["splits"].items() if name not in ("train", "val"))
    chosen = tuple(names) if names is not None else tuple(first["names"])
    split = Split((), chosen, config.data.question, config.data.open_question)
    train = replace(split, names=tuple(frozen["splits"]["train"]["names"])) if config.learner.needs_shots else split
    task = Task(train, {SPLIT: split}, Photos(), frozen["fingerprint"], frozen["origins"])
    if names is not None:
        check.check_words(config, check.check_weights(config), task)
    return TaskData(task, frozen)


def _read_again(run: TrainedModel, config: Config) -> TaskData:
    """Read the task of a run again, with its images.

    Raises:
        UserError: The images are not where they were, or those that the method is fitted on have changed.
    """
    frozen = _manifest(run)
    try:
        data = tasks.build(config, manifest.left_out(run.records / "manifest.json"))
    except UserError as error:
        if run.data is not None:
            raise
        raise UserError(
            f"{error}. method={config.method['name']} looks at the run's training images again: if they lie elsewhere"
            " now, say where with --data <folder> (in Python data=...)"
        ) from error
    first = next(name for name in data.task.evaluation if name != "val")
    # only the splits that the learner is fitted on or selected by matter
    for split in ("train", "val", *([first] if config.selection == "paper" else [])):
        before, now = (each["splits"].get(split, {"rows": [], "names": []}) for each in (frozen, data.manifest))
        old, new = ([tuple(row[:2]) for row in each["rows"]] for each in (before, now))
        if (before["names"], old) != (now["names"], new):
            others = [image for image, label in new if (image, label) not in set(old)]
            what = (
                f"has {others[0]}"
                if others
                else f"lacks some of its {counted(len(old), 'image')}, or has other classes"
            )
            raise UserError(
                f"these are not the images that {run.records / 'manifest.json'} names: {split} {what}; give the folder"
                " of the run's own with --data <folder> (in Python data=...)"
            )
    _check_pictures(run, data)
    return data


def _check_pictures(run: TrainedModel, data: TaskData) -> None:
    """Check that images that a method is fitted on again have not changed since the run.

    Raises:
        UserError: The content of a training or validation image has changed.
    """
    frozen = _manifest(run)
    task = data.task
    splits = [task.train, *(split for name, split in task.evaluation.items() if name == "val")]
    stamps = loading.of_each(task.images.stamp, [item.image for split in splits for item in split.items])
    now = manifest.with_contents(data.manifest, stamps)
    if others := [image for image in manifest.changed(frozen, now) if image in stamps]:
        raise UserError(
            f"of the pictures that {run.folder} was trained on, {len(others)} changed since, first: {others[0]}; put"
            " the old ones back, or train it again"
        )


def _manifest(run: TrainedModel) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.records / "manifest.json").read_text(encoding="utf-8"))
    return found
