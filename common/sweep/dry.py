"""`dry=true`: the runs of a sweep, which of them are finished, and what the others will cost. Nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.counted import counted

ADAPTERS = 0.1  # gigabytes of LoRA's matrices and a bank, rounded up


def show(jobs: Sequence[tuple[str, dict[str, Any], bool]], cost: Mapping[str, Any]) -> None:
    """Print a line per run and the sum.

    Args:
        jobs: Name, configuration, whether it is finished.
        cost: See conf/hydra/sweeper/paper.yaml.
    """
    table = Table()
    for column in ("run", "state", "GPU-hours", "GB"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    hours: list[float | None] = []
    sizes: list[float | None] = []
    for name, values, finished in jobs:
        hour, size = gpu_hours(values, cost), gigabytes(values, cost)
        if not finished:
            hours.append(hour)
            sizes.append(size)
        cells = (name, "finished" if finished else "to run", _text(hour), _text(size))
        table.add_row(*map(Text, cells))
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
    known, disk = sum(filter(None, hours)), sum(filter(None, sizes))
    unknown = sum(hour is None for hour in hours)
    console.print(
        f"{len(hours)} of {counted(len(jobs), 'run')} to do: about {known:.1f} GPU-hours of an A100 and {disk:.0f} GB"
        + (f"; {unknown} of unknown cost" if unknown else "")
    )


def gpu_hours(values: Mapping[str, Any], cost: Mapping[str, Any]) -> float | None:
    """Of training and the two evaluations, from the times that the papers print; None: they say nothing of it.

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
    if values["setting"]["name"] == "base_to_new":
        images = ceil(images / 2)
    trainer, setting = values["trainer"], values["setting"]
    seen = images * trainer.get("epochs", 0)
    if trainer.get("updates"):
        seen = trainer["updates"] * trainer["prompts_per_update"]
    seconds = seen * cost["train"].get(method, 0.0)
    targets = setting["targets"]
    chosen = targets if setting.get("test_on") is None else setting["test_on"]
    others = [targets[name] for name in chosen if name != values["data"]["name"]]
    most = setting.get("test_per_class")
    tested = sum(
        one.get("test", 0) if most is None else min(one.get("test", 0), most * one.get("classes", 0))
        for one in (counts, *(other["published"] for other in others))
    )
    times = 2 if seconds else 1  # before and after
    return (seconds + times * tested * cost["test"][method]) / 3600


def gigabytes(values: Mapping[str, Any], cost: Mapping[str, Any]) -> float | None:
    """Of a run folder when it is finished: the weights, and those of the checkpoints that are kept; None: unknown."""
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
