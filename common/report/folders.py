"""Read run folders, and group runs that differ only by their seed."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from common.config import trust
from common.config.composition import decides_result
from common.counted import counted
from common.data import manifest
from common.evaluation.metrics import Summary
from common.report.paper.results import FILE
from common.run.result import Result
from common.run.run_folder import LOCK, MANIFEST
from common.types import UserError

# Run folders: finished ones with their result, others with the reason why there is none.
ASKED = "asked"


@dataclass(frozen=True)
class Run:
    """A run folder. state: `finished`, `running`, `unfinished`, `damaged`, `asked` (only previewed by manifest=true) or
    `foreign`; why: explanation, if not finished.

    values: part of the configuration that the result depends on.
    gpus: number of GPUs, on which no result depends.
    """

    path: Path
    state: str
    why: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    result: Result | None = None
    gpus: int = 0


def read_run(path: Path) -> Run:
    """Read a run folder."""
    config = path / "config.yaml"
    if not config.is_file():
        if manifest.is_one(path / MANIFEST):
            return Run(path, ASKED, "manifest=true showed its questions; nothing was run")
        return Run(path, "foreign", "no run wrote it: there is no config.yaml")
    try:
        values = trust.read(config)
    except UserError as error:
        return Run(path, "damaged", str(error))
    if "signature" not in values:
        return Run(path, "foreign", "no run wrote its config.yaml")
    values.pop("signature")
    # read before `decides_result`, which drops it
    gpus = values.get("gpus", 0)
    values = decides_result(values)
    # without a result: a lock tells whether a process is still at work
    if not (path / "metrics.json").is_file():
        state = "running" if _is_locked(path / LOCK) else "unfinished"
        return Run(path, state, f"after {counted(_updates(path), 'update')}", values, gpus=gpus)
    try:
        return Run(path, "finished", "", values, Result.load(path), gpus)
    except UserError as error:
        return Run(path, "damaged", str(error), values, gpus=gpus)


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """Read the folders among the paths, each once; files and folders of sweeps are skipped.

    Raises:
        UserError: A path does not exist.
    """
    paths = list(paths)
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(f"{missing[0]} does not exist")
    once = {path.resolve(): path for path in reversed(paths)}  # reversed: the first spelling of a folder is kept
    return [read_run(path) for path in reversed(once.values()) if path.is_dir() and not (path / FILE).is_file()]


def _is_locked(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _updates(path: Path) -> int:
    """Return the last update in metrics.jsonl; an incomplete last line does not count."""
    last = 0
    if (path / "metrics.jsonl").is_file():
        for line in (path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                last = max(last, int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue
    return last


# Groups: runs that differ only by their seed, their label, and their numbers over the seeds.

OWN_PHOTOS = "common.data.folder.read"
USUAL = {"setting": "few_shot", "protocol": "clean"}  # left out of labels
LONG = 60  # characters of a value in a label


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one configuration, sorted by seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        """The runs with a result."""
        return [run for run in self.runs if run.result is not None]

    @property
    def seeds(self) -> list[int]:
        """The seeds of all runs."""
        return [run.values["seed"] for run in self.runs]

    def over_seeds(self, split: str, value: Callable[[Summary], float | None], phase: str = "final") -> list[float]:
        """Return a number of every finished run on a split, in the order of seeds; runs without it are left out."""
        found = []
        for run in self.finished:
            summary = getattr(run.result, phase).get(split)
            number = None if summary is None else value(summary)
            if number is not None:
                found.append(number)
        return found


def group(runs: Iterable[Run]) -> list[SeedGroup]:
    """SeedGroup runs by everything but the seed, in the given order; runs without a configuration are left out.

    A second run of the same seed is not another seed: it starts a group of its own.
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
    return [SeedGroup(name, each) for name, each in zip(labels(groups, repeated), groups, strict=True)]


def configuration(run: Run) -> str:
    """Return what a run has in common with those of other seeds, as text."""
    return json.dumps(without_seed(run.values), sort_keys=True, default=str)


def without_seed(values: Any) -> Any:
    """Return the values without keys called `seed`, at any depth.

    >>> without_seed({"seed": 1, "method": {"seed": 1, "k": 2}})
    {'method': {'k': 2}}
    """
    if not isinstance(values, Mapping):
        return values
    return {key: without_seed(value) for key, value in values.items() if key != "seed"}


def preset(run: Run) -> str:
    """Return the part of a folder's name before method and data: label and presets (see `run_prefix`); the whole name
    if the user chose it.
    """
    own = f"{run.values['method']['name']}-{run.values['data']['name']}-"
    before, found, _ = run.path.name.partition(own)
    return before.rstrip("-") if found else run.path.absolute().name


def photos(values: Mapping[str, Any]) -> str:
    """Return the dataset of a configuration; for own photos with their folder, as `folder (garden)`.

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
    """Return a label for each group: method, dataset and so on, then values that distinguish groups of equal labels.

    Args:
        groups: Runs of each group.
        repeated: Whether another group has the same configuration; then folders distinguish them.
    """
    configurations = [runs[0].values for runs in groups]
    datasets = _datasets(configurations)
    names = [_dataset_name(runs, data) for runs, data in zip(groups, datasets, strict=True)]
    own = [dict(leaves(without_seed(values))) for values in configurations]
    alike: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        alike.setdefault(name, []).append(number)
    for name, numbers in alike.items():
        # values that differ between groups of this name
        keys = sorted({key for number in numbers for key in own[number]})
        telling = [key for key in keys if len({str(own[number].get(key)) for number in numbers}) > 1]
        for number in numbers:
            parts = [f"{key}={str(own[number][key])[:LONG]}" for key in telling if key in own[number]]
            if repeated[number] and len(numbers) > 1:
                parts.append(f"in {', '.join(str(run.path) for run in groups[number])}")
            names[number] = " ".join([name, *parts])
    return names


def _datasets(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names by `photos`, with the whole path where two sets of photos would have the same name."""
    names = [photos(values) for values in configurations]
    places = [str(values["data"].get("folder")) for values in configurations]
    found: dict[str, set[str]] = {}
    for name, place in zip(names, places, strict=True):
        found.setdefault(name, set()).add(place)
    return [
        name if len(found[name]) == 1 else f"{name.partition(' (')[0]} ({place})"
        for name, place in zip(names, places, strict=True)
    ]


def _dataset_name(runs: Sequence[Run], data: str) -> str:
    values = runs[0].values
    own = {key: values[key]["name"] for key in ("method", "data", "setting", "protocol", "model")}
    own["data"] = data
    parts = [name for key, name in own.items() if USUAL.get(key) != name]
    before = ", ".join(dict.fromkeys(filter(None, map(preset, runs))))
    parts[0] += f" ({before[:LONG]})" if before else ""
    return " · ".join([*parts, counted(values["shots"], "shot")])


def leaves(values: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Yield every value of nested dicts with its dotted key."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, values
