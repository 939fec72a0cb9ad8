"""Runs that differ by their seed alone belong together: what a group is called, and its numbers over the seeds.

Shapes: S seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.counted import counted
from common.evaluation.summary import Summary
from common.report.folders import Run

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
    """Runs with a configuration, by everything but the seed, in the order in which they come."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        if run.values:
            together.setdefault(json.dumps(without_seed(run.values), sort_keys=True, default=str), []).append(run)
    groups = [tuple(sorted(each, key=lambda run: int(run.values["seed"]))) for each in together.values()]
    names = labels([each[0].values for each in groups], [preset(each[0]) for each in groups])
    return [Group(name, each) for name, each in zip(names, groups, strict=True)]


def without_seed(values: Any) -> Any:
    """The same without what is called `seed`, anywhere.

    >>> without_seed({"seed": 1, "method": {"seed": 1, "k": 2}})
    {'method': {'k': 2}}
    """
    if not isinstance(values, Mapping):
        return values
    return {key: without_seed(value) for key, value in values.items() if key != "seed"}


def preset(run: Run) -> str:
    """What stands in front of a run's name: its label and its presets (`run_prefix` in common/config/run_name.py)."""
    own = f"{run.values['method']['name']}-{run.values['data']['name']}-"
    before, found, _ = run.path.name.partition(own)
    return before.rstrip("-") if found else ""


def labels(configurations: Sequence[Mapping[str, Any]], presets: Sequence[str]) -> list[str]:
    """A name for each configuration: method, dataset and so on, and the values that tell apart those of one name."""
    names = [_name(values, before) for values, before in zip(configurations, presets, strict=True)]
    own = [dict(leaves(without_seed(values))) for values in configurations]
    alike: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        alike.setdefault(name, []).append(number)
    for name, numbers in alike.items():
        keys = sorted({key for number in numbers for key in own[number]})
        telling = [key for key in keys if len({str(own[number].get(key)) for number in numbers}) > 1]
        for number in numbers:
            parts = [f"{key}={str(own[number][key])[:LONG]}" for key in telling if key in own[number]]
            names[number] = " ".join([name, *parts])
    return names


def _name(values: Mapping[str, Any], before: str) -> str:
    own = {key: values[key]["name"] for key in ("method", "data", "setting", "protocol", "model")}
    parts = [name for key, name in own.items() if USUAL.get(key) != name]
    parts[0] += f" ({before})" if before else ""
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


def t_interval(numbers: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean over seeds, by Student's t with S - 1 degrees of freedom."""
    from scipy.stats import t  # a second to import

    mean, std = mean_std(numbers)
    assert std is not None, "one seed has no interval over seeds"
    half = float(t.ppf(0.975, len(numbers) - 1)) * std / math.sqrt(len(numbers))
    return mean - half, mean + half
