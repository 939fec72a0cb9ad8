"""From configuration to the task of a run: images, questions, manifest. No torch.

Built twice on purpose: by the parent before anything expensive, and by every rank; the manifest's hash says they agree.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from common.config import method_arguments
from common.data import manifest
from common.data.images import combine
from common.data.sampling import Sampling
from common.data.settings import Splits
from common.data.source import Dataset, load_dataset
from common.plugins import locate
from common.schema import Config
from common.schema_task import Data
from common.types import Images, Method, Prompt, Split, Task, UserError


@dataclass(frozen=True)
class Questions:
    """The task with every question of the run. `manifest` is what manifest.json holds."""

    task: Task
    method: Method
    train: list[Prompt]
    evaluation: dict[str, list[Prompt]]
    manifest: dict[str, Any]

    @property
    def images(self) -> list[str]:
        """Every image of the task, each once."""
        prompts = [self.train, *self.evaluation.values()]
        return list(dict.fromkeys(prompt.image for part in prompts for prompt in part))


def build(config: Config, without: Collection[str] = ()) -> Questions:
    """Read the data, pick the shots, ask the questions.

    Args:
        config: Of the run.
        without: Images to leave out after the draw, since they cannot be decoded.

    Raises:
        UserError: The data is missing or contradicts itself, or there is nothing to train or test on.
    """
    datasets = read_datasets(config)
    targets = {name: dataset for name, dataset in datasets.items() if name != config.data.name}
    assemble = locate(config.setting.build, "setting.build")
    splits: Splits = assemble(datasets[config.data.name], targets, sampling(config))
    task = _without(_task(datasets, splits), frozenset(without))
    _check_enough(config, task)
    method: Method = locate(config.method["_target_"], "method._target_")(**method_arguments(config))
    train = method.train_prompts(task)
    evaluation = {split: method.evaluation_prompts(task, split) for split in task.evaluation}
    header = {
        "data": config.data.name,
        "setting": config.setting.name,
        "origins": task.origins,
        "fingerprint": task.fingerprint,
        "sampler": config.sampler,
        "validation": config.validation,
        "test_rows": config.protocol.test_rows,
        "shots": config.shots,
        "seed": config.seed,
        "short_classes": splits.short,
        "left_out": sorted(without),
    }
    if sources := method.sources(task):
        header["sources"] = sources
    return Questions(task, method, train, evaluation, manifest.build(task, train, evaluation, header))


def ask_again(questions: Questions) -> Questions:
    """The questions of a method that has seen the pictures meanwhile. What the manifest froze stays as it is."""
    method, task = questions.method, questions.task
    evaluation = {split: method.evaluation_prompts(task, split) for split in task.evaluation}
    return replace(questions, train=method.train_prompts(task), evaluation=evaluation)


def read_datasets(config: Config) -> dict[str, Dataset]:
    """The run's dataset, then the others that the setting tests on; these lie under the same root."""
    chosen = config.setting.targets if config.setting.test_on is None else config.setting.test_on
    if unknown := [name for name in chosen if name not in config.setting.targets]:
        raise UserError(
            f"setting.test_on names {unknown[0]}, but setting={config.setting.name} can test on"
            f" {', '.join(config.setting.targets) or 'no other dataset'}; add one: +data@setting.targets.<name>=<name>"
        )
    datasets = {config.data.name: load_dataset(config.data)}
    for name in chosen:
        if name != config.data.name:
            try:
                datasets[name] = load_dataset(_like(config.setting.targets[name], config.data), only_test=True)
            except UserError as error:
                raise UserError(
                    f"{error} (setting={config.setting.name} tests on it; choose with setting.test_on)"
                ) from error
    return datasets


def sampling(config: Config) -> Sampling:
    """What to draw."""
    shots = None if config.shots == "all" else config.shots
    return Sampling(shots, config.seed, config.sampler, config.validation, config.protocol.test_rows)


def _like(target: Data, data: Data) -> Data:
    """A target is found where and as the run's own dataset is, unless its configuration says otherwise."""
    usual = {"root": os.environ.get("DATA"), "source": "local", "allow_fallback_split": False}
    shared = {key: getattr(data, key) for key, value in usual.items() if getattr(target, key) in (None, value)}
    return replace(target, **shared)


def _task(datasets: dict[str, Dataset], splits: Splits) -> Task:
    sources = {name: dataset.source for name, dataset in datasets.items()}
    first, origins = next(iter(sources.values())), {name: source.origin for name, source in sources.items()}
    if len(sources) == 1:
        return Task(splits.train, splits.evaluation, first.images, first.fingerprint, origins)
    own = [splits.train, *(split for name, split in splits.evaluation.items() if name not in sources)]
    parts: list[tuple[list[str], Images]] = [([item.image for split in own for item in split.items], first.images)]
    for name, source in list(sources.items())[1:]:
        parts.append(([item.image for item in splits.evaluation[name].items], source.images))
    fingerprint = manifest.digest({name: source.fingerprint for name, source in sources.items()})
    return Task(splits.train, splits.evaluation, combine(parts), fingerprint, origins)


def _without(task: Task, images: frozenset[str]) -> Task:
    if not images:
        return task

    def rest(split: Split) -> Split:
        return replace(split, items=tuple(item for item in split.items if item.image not in images))

    return replace(task, train=rest(task.train), evaluation={k: rest(split) for k, split in task.evaluation.items()})


def _check_enough(config: Config, task: Task) -> None:
    """Something to train on, if it is to be trained, something to test on, and nothing that is both."""
    if config.trainer.name != "none" and not task.train.items:
        raise UserError(
            f"data={config.data.name} has no training images; docs/datasets.md#{config.data.name} says where they"
            " come from, or only evaluate with method=zeroshot"
        )
    empty = [name for name, split in task.evaluation.items() if not split.items]
    if empty or not set(task.evaluation) - {"val"}:
        raise UserError(f"data={config.data.name} has no images to test on" + f" in {empty[0]}" * bool(empty))
    trained = {item.image for item in task.train.items}
    for name, split in task.evaluation.items():
        if shared := trained.intersection(item.image for item in split.items):
            raise UserError(f"{len(shared)} training images are also in {name}, first: {min(shared)}")
