"""Build the task of a run from its configuration: images, labels, picks, manifest. No torch, no method, no prompt."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.config.schema import Config, DataConfig
from common.counted import agree, counted
from common.data import manifest
from common.data.contents import Contents
from common.data.images import combine
from common.data.listing import documentation, litter_summary
from common.data.sampling import Picks, Sampling, draw, halves
from common.data.source import Dataset, load_dataset
from common.plugins import locate
from common.runtime.progress import doing
from common.types import Images, Item, Split, Task, UserError

# Settings: `setting.build` names one of these functions.
#
# Each takes the dataset, other datasets to test on and what to draw, and returns the splits. `val` is evaluated during
# training; every other split is a test split.


@dataclass(frozen=True)
class Splits:
    """The splits of a task; `short` and `refilled` as in `Picks`."""

    train: Split
    evaluation: dict[str, Split]
    short: dict[str, int]
    refilled: dict[str, int] = field(default_factory=dict)


def few_shot(data: Dataset, targets: Mapping[str, Dataset], how: Sampling) -> Splits:
    """Train on some images of every class, test on all classes."""
    picks = draw(data.source, how)
    evaluation = _nonempty(val=data.split(picks.val), test=data.split(picks.test))
    return Splits(data.split(picks.train), evaluation, picks.short, picks.refilled)


def base_to_new(data: Dataset, targets: Mapping[str, Dataset], how: Sampling) -> Splits:
    """Train on the first half of the classes; test on these, and on the other half separately.

    Classes are left out after the draw, so the images are those of `few_shot` with the same seed (CoOp).
    """
    picks = draw(data.source, how)
    base, new = halves(data.source.names)
    if not new:
        raise UserError(f"setting=base_to_new needs two classes or more; data={data.config.name} has one")
    evaluation = _nonempty(
        val=data.split(picks.val, base), base=data.split(picks.test, base), new=data.split(picks.test, new)
    )
    names = {data.source.names[label] for label in base}
    short, refilled = ({k: v for k, v in each.items() if k in names} for each in (picks.short, picks.refilled))
    return Splits(data.split(picks.train, base), evaluation, short, refilled)


def cross_dataset(data: Dataset, targets: Mapping[str, Dataset], how: Sampling) -> Splits:
    """Train on one dataset, test on it and on others, each with its own classes and question."""
    splits = few_shot(data, {}, how)
    others = {
        name: target.split(_tested(target, how).test) for name, target in targets.items() if name != data.config.name
    }
    return Splits(splits.train, splits.evaluation | others, splits.short, splits.refilled)


def shift(data: Dataset, targets: Mapping[str, Dataset], how: Sampling) -> Splits:
    """Train on one dataset, test on it and on other images of its classes (CoOp's domain generalisation).

    Raises:
        UserError: A target has a class that is not trained.
    """
    trained = set(data.source.names)
    for name, target in targets.items():
        if strange := sorted(set(target.source.names) - trained):
            raise UserError(
                f"setting=shift: {counted(len(strange), 'class')} of {name} {agree(len(strange), 'is', 'are')} none"
                f" of data={data.config.name},"
                f" first: '{strange[0]}'; choose other targets with setting.test_on, or setting=cross_dataset"
            )
    return cross_dataset(data, targets, how)


def _tested(target: Dataset, how: Sampling) -> Picks:
    """Draw the test images of a target, the same as in few-shot runs on it with the same seed."""
    return draw(target.source, how)


def _nonempty(**splits: Split) -> dict[str, Split]:
    return {name: split for name, split in splits.items() if split.items}


def fewer(split: Split, per_class: int) -> Split:
    """Keep some images of each class, in the split's order: those with the smallest hashes of their keys.

    So they do not depend on the seed, except where images were taken for training.
    """
    by_class: dict[int, list[Item]] = defaultdict(list)
    for item in split.items:
        by_class[item.label].append(item)
    kept = {
        (item.image, item.label)
        for items in by_class.values()
        for item in sorted(items, key=lambda item: hashlib.sha256(item.image.encode()).digest())[:per_class]
    }
    return replace(split, items=tuple(item for item in split.items if (item.image, item.label) in kept))


# The task and its manifest.
#
# They are built once per process: the checks before a run pass them on. Every rank reads the data itself, and the
# manifest's hash confirms that all agree.


@dataclass(frozen=True)
class TaskData:
    """The task of a run, and the content of its manifest.json."""

    task: Task
    manifest: dict[str, Any]

    @property
    def images(self) -> list[str]:
        """All images of the task, each once."""
        splits = [self.task.train, *self.task.evaluation.values()]
        return list(dict.fromkeys(item.image for split in splits for item in split.items))


def build(config: Config, without: Collection[str] = ()) -> TaskData:
    """Read the data and pick the shots.

    Args:
        config: The run's configuration.
        without: Images to leave out after the draw because they cannot be decoded.

    Raises:
        UserError: The data is missing or contradicts itself, or there is nothing to train or test on.
    """
    # read the datasets and draw the images
    datasets = read_datasets(config)
    targets = {name: dataset for name, dataset in datasets.items() if name != config.data.name}
    assemble = locate(config.setting.build, "setting.build")
    seen = _seen(config, datasets[config.data.name])
    splits: Splits = assemble(datasets[config.data.name], targets, sampling(config, seen, frozenset(without)))
    if (count := config.setting.test_per_class) is not None:
        tested = {name: each if name == "val" else fewer(each, count) for name, each in splits.evaluation.items()}
        splits = replace(splits, evaluation=tested)
    # join the splits into a task, and describe it
    task = _task(config, datasets, splits)
    _check_enough(config, task)
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
    if count is not None:
        header["test_per_class"] = count
    if splits.refilled:
        header["refilled"] = splits.refilled
    observed = _observed(datasets, len(seen), _untested(config, task))
    return TaskData(task, manifest.build(task, header, observed))


def _untested(config: Config, task: Task) -> list[str]:
    """Return the classes whose only image is trained on, where a share of every class was to be tested."""
    if config.test_share is None or "test" not in task.evaluation:
        return []
    tested = {item.name for item in task.evaluation["test"].items}
    return [name for name in task.train.choices if name not in tested]


def _observed(datasets: dict[str, Dataset], seen: int, untested: Sequence[str]) -> dict[str, Any]:
    """Return for the manifest what the readers passed over and their notes."""
    reasons = [reason for one in datasets.values() for reason in Counter(one.source.passed_over).elements()]
    notes = [f"data={name}: {note}" for name, one in datasets.items() for note in one.source.notes]
    if seen:
        many, are = counted(seen, "image"), agree(seen, "is", "are")
        notes.append(f"{many} that the model was trained on {are} not tested")
    if untested:
        one = agree(len(untested), "has one image, which is", "have one image each, which is")
        notes.append(f"{counted(len(untested), 'class')} {one} trained on and not tested: {', '.join(untested)}")
    return {"passed_over": litter_summary(reasons)} | ({"notes": notes} if notes else {})


def _seen(config: Config, data: Dataset) -> frozenset[str]:
    """Return images of a pool that the weights in `model.path` were trained on in another run."""
    if config.model.path is None or data.source.test:
        return frozenset()
    folder = Path(config.model.path).expanduser()
    return manifest.trained_images(folder, config.data.name, data.source.fingerprint)


def read_datasets(config: Config) -> dict[str, Dataset]:
    """Read the run's dataset, then the others that the setting tests on; these lie under the same root."""
    chosen = config.setting.targets if config.setting.test_on is None else config.setting.test_on
    if unknown := [name for name in chosen if name not in config.setting.targets]:
        raise _no_target(config, unknown[0])
    contents = Contents(Path(config.cache_dir).resolve())
    with doing(f"reading {config.data.name}"):
        own = load_dataset(config.data, contents=contents, min_per_class=config.min_per_class)
        datasets = {config.data.name: own}
    if config.test_share is not None and own.source.test:
        raise UserError(
            f"test_share={config.test_share}, but data={config.data.name} has a test split of its own; set"
            " test_share=null"
        )
    # targets are only tested, so their readers may skip the training images
    for name in chosen:
        if name != config.data.name:
            target = _like(config.setting.targets[name], config.data)
            try:
                with doing(f"reading {name}"):
                    datasets[name] = load_dataset(target, only_test=True, contents=contents)
            except UserError as error:
                raise UserError(
                    f"{error} (setting={config.setting.name} tests on it; choose with setting.test_on)"
                ) from error
    return datasets


def _no_target(config: Config, name: str) -> UserError:
    if not config.setting.targets:
        return _tests_alone(config, name)
    return UserError(
        f"setting.test_on names {name}, but setting={config.setting.name} can test on"
        f" {', '.join(config.setting.targets)}; add one: +data@setting.targets.<name>=<name>"
    )


def _tests_alone(config: Config, name: str) -> UserError:
    return UserError(
        f"setting.test_on: setting={config.setting.name} tests on data={config.data.name} alone, not on {name}; use"
        " setting=cross_dataset"
    )


def sampling(config: Config, seen: frozenset[str] = frozenset(), unusable: frozenset[str] = frozenset()) -> Sampling:
    """Return what to draw.

    Args:
        config: Configuration of the run.
        seen: Images that the model was trained on before.
        unusable: Images that cannot be decoded.
    """
    return Sampling(
        shots=None if config.shots == "all" else config.shots,
        seed=config.seed,
        sampler=config.sampler,
        validation=config.validation,
        test_rows=config.protocol.test_rows,
        trains=config.learner.needs_shots or config.trainer.name != "none",
        held_out=seen,
        unusable=unusable,
        refill=config.data.own_photos,
        test_share=config.test_share,
    )


def _like(target: DataConfig, data: DataConfig) -> DataConfig:
    """Return a target with the run's root, source and background, unless its own configuration sets them."""
    usual = {"root": os.environ.get("DATA"), "source": "local", "allow_fallback_split": False, "background": "white"}
    shared = {key: getattr(data, key) for key, value in usual.items() if getattr(target, key) in (None, value)}
    return replace(target, **shared)


def _task(config: Config, datasets: dict[str, Dataset], splits: Splits) -> Task:
    if untested := [name for name in list(datasets)[1:] if name not in splits.evaluation]:
        raise _tests_alone(config, untested[0])
    sources = {name: dataset.source for name, dataset in datasets.items()}
    first, origins = next(iter(sources.values())), {name: source.origin for name, source in sources.items()}
    if len(sources) == 1:
        return Task(splits.train, splits.evaluation, first.images, first.fingerprint, origins)
    # images of several datasets: splits of the first one, then one split per target
    own = [splits.train, *(split for name, split in splits.evaluation.items() if name not in sources)]
    parts: list[tuple[list[str], Images]] = [([item.image for split in own for item in split.items], first.images)]
    for name, source in list(sources.items())[1:]:
        parts.append(([item.image for item in splits.evaluation[name].items], source.images))
    fingerprint = manifest.digest({name: source.fingerprint for name, source in sources.items()})
    return Task(splits.train, splits.evaluation, combine(parts), fingerprint, origins)


def _check_enough(config: Config, task: Task) -> None:
    """Check that there are images to train on (if needed) and to test on, and that no image is in both."""
    if config.trainer.name != "none" and not task.train.items:
        raise UserError(
            f"data={config.data.name} has no training images; {documentation(config.data.name)} says where they"
            " come from, or only evaluate with method=zeroshot"
        )
    empty = [name for name, split in task.evaluation.items() if not split.items]
    if empty or not set(task.evaluation) - {"val"}:
        raise UserError(
            f"data={config.data.name} has no images to test on{f' in {empty[0]}' if empty else ''};"
            f" {documentation(config.data.name)} says where they come from"
        )
    trained = {item.image for item in task.train.items}
    for name, split in task.evaluation.items():
        if shared := trained.intersection(item.image for item in split.items):
            raise UserError(
                f"data={config.data.name}: {counted(len(shared), 'training image')} {agree(len(shared), 'is', 'are')}"
                f" also in {name}, first: {min(shared)}; let"
                " each image belong to one part"
            )


def own_labels(task: Task, split: str) -> list[int]:
    """Return the trained label of every class of a split, by name; of two classes of one name each keeps its own."""
    names, trained = task.evaluation[split].names, task.train.names
    if names == trained:
        return list(range(len(names)))
    first = {name: label for label, name in reversed(list(enumerate(trained)))}
    return [first[name] for name in names]


def dataset_of(task: Task, split: str) -> str:
    """Return the dataset that a split tests on."""
    return split if split in list(task.origins)[1:] else next(iter(task.origins), split)
