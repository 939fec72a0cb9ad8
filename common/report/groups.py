"""Runs that differ by their seed alone belong together: what a group is called, and its numbers over the seeds.

Shapes: S seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from common.counted import counted
from common.evaluation.summary import Summary
from common.report.folders import Run

OWN_PHOTOS = "common.data.folder.read"
USUAL = {"setting": "few_shot", "protocol": "clean"}  # not said of a group
LONG = 60  # characters of a value that tells groups apart


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, by seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        """Those with a result."""
        return [run for run in self.runs if run.result is not None]

    @property
    def seeds(self) -> list[int]:
        """Of all runs."""
        return [run.values["seed"] for run in self.runs]

    def over_seeds(self, split: str, value: Callable[[Summary], float | None], phase: str = "final") -> list[float]:
        """A number of every finished run on a split, in the order of the seeds; without those that have none."""
        found = []
        for run in self.finished:
            summary = getattr(run.result, phase).get(split)
            number = None if summary is None else value(summary)
            if number is not None:
                found.append(number)
        return found


def group(runs: Iterable[Run]) -> list[Group]:
    """Runs with a configuration, by everything but the seed, in the order in which they come.

    A seed that was run twice says nothing of other seeds: its second run begins a group of its own.
    """
    together: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        if run.values:
            key, turn = configuration(run), 0
            while any(run.values["seed"] == other.values["seed"] for other in together.get((key, turn), ())):
                turn += 1
            together.setdefault((key, turn), []).append(run)
    groups = [tuple(sorted(each, key=lambda run: int(run.values["seed"]))) for each in together.values()]
    repeated = [(key, 1) in together for key, _ in together]
    return [Group(name, each) for name, each in zip(labels(groups, repeated), groups, strict=True)]


def configuration(run: Run) -> str:
    """What a run has in common with those of other seeds, as a text."""
    return json.dumps(without_seed(run.values), sort_keys=True, default=str)


def without_seed(values: Any) -> Any:
    """The same without what is called `seed`, anywhere.

    >>> without_seed({"seed": 1, "method": {"seed": 1, "k": 2}})
    {'method': {'k': 2}}
    """
    if not isinstance(values, Mapping):
        return values
    return {key: without_seed(value) for key, value in values.items() if key != "seed"}


def preset(run: Run) -> str:
    """What stands in front of a run's name: its label and its presets (`run_prefix` in common/config/run_name.py); all
    of a name that the user chose.
    """
    own = f"{run.values['method']['name']}-{run.values['data']['name']}-"
    before, found, _ = run.path.name.partition(own)
    return before.rstrip("-") if found else run.path.absolute().name


def photos(values: Mapping[str, Any]) -> str:
    """The dataset of a configuration; of one's own photos also which, as `folder (garden)`.

    >>> photos({"data": {"name": "dtd", "folder": "dtd", "reader": {"_target_": "x"}}})
    'dtd'
    >>> own = {"_target_": "common.data.folder.read", "csv": None}
    >>> photos({"data": {"name": "folder", "folder": "/home/garden", "reader": own}})
    'folder (garden)'
    >>> photos({"data": {"name": "folder", "folder": "/home/garden", "reader": {**own, "csv": "may.csv"}}})
    'folder (garden/may.csv)'
    """
    data = values["data"]
    if data.get("reader", {}).get("_target_") != OWN_PHOTOS:
        return str(data["name"])
    where = "/".join(filter(None, (PurePath(data["folder"]).name, data["reader"].get("csv"))))
    return str(data["name"]) if where in ("", data["name"]) else f"{data['name']} ({where})"


def labels(groups: Sequence[Sequence[Run]], repeated: Sequence[bool]) -> list[str]:
    """A name for each group: method, dataset and so on, and the values that tell apart those of one name.

    Args:
        groups: Their runs.
        repeated: Whether another group has the same configuration; then folders tell them apart.
    """
    configurations = [runs[0].values for runs in groups]
    datasets = _datasets(configurations)
    names = [_name(runs, data) for runs, data in zip(groups, datasets, strict=True)]
    own = [dict(leaves(without_seed(values))) for values in configurations]
    alike: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        alike.setdefault(name, []).append(number)
    for name, numbers in alike.items():
        keys = sorted({key for number in numbers for key in own[number]})
        telling = [key for key in keys if len({str(own[number].get(key)) for number in numbers}) > 1]
        for number in numbers:
            parts = [f"{key}={str(own[number][key])[:LONG]}" for key in telling if key in own[number]]
            if repeated[number] and len(numbers) > 1:
                parts.append(f"in {', '.join(str(run.path) for run in groups[number])}")
            names[number] = " ".join([name, *parts])
    return names


def _datasets(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `photos` says; with the whole path where two sets of photos would be called the same."""
    names = [photos(values) for values in configurations]
    places = [str(values["data"].get("folder")) for values in configurations]
    found: dict[str, set[str]] = {}
    for name, place in zip(names, places, strict=True):
        found.setdefault(name, set()).add(place)
    return [
        name if len(found[name]) == 1 else f"{name.partition(' (')[0]} ({place})"
        for name, place in zip(names, places, strict=True)
    ]


def _name(runs: Sequence[Run], data: str) -> str:
    values = runs[0].values
    own = {key: values[key]["name"] for key in ("method", "data", "setting", "protocol", "model")}
    own["data"] = data
    parts = [name for key, name in own.items() if USUAL.get(key) != name]
    before = ", ".join(dict.fromkeys(filter(None, map(preset, runs))))
    parts[0] += f" ({before[:LONG]})" if before else ""
    return " · ".join([*parts, counted(values["shots"], "shot")])


def leaves(values: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Every value of nested dicts by its dotted key."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, values


def mean_std(numbers: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation over seeds (S - 1 in the denominator); None of one.

    >>> mean_std([1.0, 3.0]), mean_std([2.0])
    ((2.0, 1.4142135623730951), (2.0, None))
    """
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def interval(numbers: Sequence[float], images: Sequence[tuple[float, float]] = ()) -> tuple[float, float] | None:
    """The 95 % interval of the mean over seeds: Student's and that of the images, whichever reaches further.

    Seeds that agree to the last image leave the images a sample; seeds mostly share theirs, so the mean is no surer of
    them than one seed. None: of one seed without images.

    Args:
        numbers: One per seed. Length: S.
        images: What each seed's images leave open, in the same unit; empty: the numbers are not of images. Length: S.

    >>> interval([0.5, 0.5, 0.5], [(0.25, 0.75)] * 3), interval([0.5], [(0.25, 0.75)]), interval([3.0])
    ((0.25, 0.75), (0.25, 0.75), None)
    """
    bounds = [t_interval(numbers)] if len(numbers) > 1 else []
    if images:
        bounds.append((statistics.fmean(low for low, _ in images), statistics.fmean(high for _, high in images)))
    return (min(low for low, _ in bounds), max(high for _, high in bounds)) if bounds else None


def t_interval(numbers: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean over seeds, by Student's t with S - 1 degrees of freedom."""
    from scipy.stats import t  # a second to import

    mean, std = mean_std(numbers)
    assert std is not None, "one seed has no interval over seeds"
    half = float(t.ppf(0.975, len(numbers) - 1)) * std / math.sqrt(len(numbers))
    return mean - half, mean + half
