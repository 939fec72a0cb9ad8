"""Show for `dry=true` which runs are finished or would be refused, and what the others will cost.

Nothing is run, and no weights are loaded.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common import preflight
from common.config.schema import Config
from common.counted import counted
from common.runtime.progress import bar
from common.types import UserError

MOST_REASONS = 10  # reasons that are printed
ADAPTERS = 0.1  # gigabytes of LoRA's matrices and a bank, rounded up


@dataclass(frozen=True)
class Run:
    """A run of a sweep. values, config: its configuration. alike: equal for runs that differ only in the images they
    draw. needs: names of runs that must be finished first.
    """

    name: str
    values: dict[str, Any]
    config: Config
    finished: bool
    alike: Hashable
    needs: Sequence[str] = ()


def refusals(runs: Sequence[Run], here: bool) -> tuple[dict[str, str], dict[str, int]]:
    """Return why runs would be refused, by their names, and problems with the devices, with the number of such runs.

    Of runs that are alike, only the one with the most shots is checked. A run that needs another is checked once that
    is finished, since it reads the other's files.

    Args:
        runs: Runs, those first that others need.
        here: Whether they are to run on this machine.
    """
    found: dict[str, str] = {}
    devices: Counter[str] = Counter()
    open_, done = [run for run in runs if not run.finished], {run.name for run in runs if run.finished}
    groups: dict[Hashable, list[Run]] = defaultdict(list)
    for run in open_:
        if done.issuperset(run.needs):
            groups[run.alike].append(run)
    with bar("checking", len(groups)) as shown:
        for group in groups.values():
            config = max(group, key=lambda run: _shots(run.config)).config
            if reason := preflight.refusal(preflight.check_data, config):
                found |= dict.fromkeys((run.name for run in group), reason)
            shown.advance()
    # a refused run also stops those that need it
    for run in open_:
        if refused := [name for name in run.needs if name in found]:
            found.setdefault(run.name, f"it needs {refused[0]}")
        if here and (wrong := preflight.refusal(preflight.check_devices, run.config)):
            devices[wrong] += 1
    return found, devices


def _shots(config: Config) -> float:
    return inf if config.shots == "all" else config.shots


def show_one(config: Config, folder: Path, finished: bool) -> None:
    """Print whether one run is finished or would be refused, otherwise what it would cost."""
    print(f"{folder}: {'finished' if finished else 'to run'}")
    if finished:
        return
    try:
        task_prompts = preflight.check_data(config)[1]
    except UserError as error:
        print(f"it would be refused: {error}")
    else:
        if (
            task_prompts is not None and config.model.path is not None
        ):  # else there is no estimate, and torch is not needed
            from common.cost import estimate

            for line in estimate.foreseen(config, task_prompts):
                print(line)
    if reason := preflight.refusal(preflight.check_devices, config):
        print(f"it would be refused: {reason}")


def show(runs: Sequence[Run], cost: Mapping[str, Any], here: bool = True) -> None:
    """Print a line per run, the sum, and why runs would be refused.

    Args:
        runs: Runs, those first that others need.
        cost: Cost table, see conf/hydra/sweeper/paper.yaml.
        here: Whether they are to run on this machine, so that its GPUs are checked.
    """
    refused, devices = refusals(runs, here)
    table = Table()
    for column in ("run", "state", "GPU-hours", "GB"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    hours: list[float | None] = []
    sizes: list[float | None] = []
    for run in runs:
        hour, size = gpu_hours(run.values, cost), gigabytes(run.values, cost)
        if not run.finished:
            hours.append(hour)
            sizes.append(size)
        state = "finished" if run.finished else "refused" if run.name in refused else "to run"
        table.add_row(*map(Text, (run.name, state, _text(hour), _text(size))))
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
    # sums without runs of unknown cost, whose number is printed beside
    known, disk = sum(filter(None, hours)), sum(filter(None, sizes))
    unknown = sum(hour is None for hour in hours)
    console.print(
        f"{len(hours)} of {counted(len(runs), 'run')} to do: about {known:.1f} GPU-hours of an A100 and {disk:.0f} GB"
        + (f"; {unknown} of unknown cost" if unknown else "")
    )
    # most runs are refused for one reason, such as a missing dataset: print each reason once
    reasons = Counter(refused.values())
    for reason, count in reasons.most_common(MOST_REASONS):
        first = next(name for name, why in refused.items() if why == reason)
        console.print(Text(f"{count} would be refused, first {first}: {reason}"), soft_wrap=True)
    if (more := len(reasons) - MOST_REASONS) > 0:
        console.print(f"… and {counted(more, 'more reason')}")
    for wrong, count in devices.items():
        console.print(Text(f"on this machine {count} would be refused: {wrong}"), soft_wrap=True)


def gpu_hours(values: Mapping[str, Any], cost: Mapping[str, Any]) -> float | None:
    """Return the hours of training and the two evaluations, from times printed in the papers; None if they print none.

    >>> cost = {"train": {"clsrl": 18.0}, "test": {"clsrl": 0.3}, "gigabytes": {"vlm": 4.4}}
    >>> data, trainer = {"published": {"classes": 100, "test": 6000}}, {"epochs": 10}
    >>> setting = {"name": "few_shot", "targets": {}}
    >>> run = {"method": {"name": "clsrl"}, "model": {"name": "vlm"}, "data": data, "trainer": trainer}
    >>> run["setting"] = setting
    >>> gpu_hours({**run, "shots": 4}, cost)  # 400 images x 10 epochs x 18 s, 2 x 6,000 images x 0.3 s
    21.0
    >>> run["setting"] = {**setting, "test_per_class": 6}  # 2 x 600 images
    >>> gpu_hours({**run, "shots": 4}, cost)
    20.1
    """
    method, model = values["method"]["name"], values["model"]["name"]
    counts = values["data"]["published"]
    if model not in cost["gigabytes"] or method not in cost["test"] or not {"classes", "test"} <= counts.keys():
        return None
    shots = values["shots"]
    images = counts.get("train", 0) if shots == "all" else counts["classes"] * shots
    # training: images seen times seconds per image
    if values["setting"]["name"] == "base_to_new":
        images = ceil(images / 2)
    trainer, setting = values["trainer"], values["setting"]
    seen = images * trainer.get("epochs", 0)
    if trainer.get("updates"):
        seen = trainer["updates"] * trainer["prompts_per_update"]
    seconds = seen * cost["train"].get(method, 0.0)
    # evaluation: test images of all datasets
    targets = setting["targets"]
    chosen = targets if setting.get("test_on") is None else setting["test_on"]
    others = [targets[name] for name in chosen if name != values["data"]["name"]]
    most = setting.get("test_per_class")
    tested = sum(
        one.get("test", 0) if most is None else min(one.get("test", 0), most * one.get("classes", 0))
        for one in (counts, *(other["published"] for other in others))
    )
    times = 2 if seconds else 1  # before and after training
    return (seconds + times * tested * cost["test"][method]) / 3600


def gigabytes(values: Mapping[str, Any], cost: Mapping[str, Any]) -> float | None:
    """Return the size of a finished run folder: its weights and those of the kept checkpoints; None: unknown."""
    model = values["model"]
    if model["name"] not in cost["gigabytes"]:
        return None
    if values["trainer"]["name"] == "none":
        return 0.0
    lora = model["lora"]
    each = ADAPTERS if lora["r"] else cost["gigabytes"][model["name"]]
    return each * (1 + values["checkpoint"]["max_checkpoints"])


def _text(number: float | None) -> str:
    return "?" if number is None else f"{number:.1f}"
