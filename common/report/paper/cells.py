"""Compute the numbers of a paper's table from the runs of its sweep, per seed, and why some are not comparable."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

from common.config.composition import few_shot_of
from common.counted import counted
from common.evaluation.metrics import Summary
from common.report import folders
from common.report.folders import Run
from common.report.paper.results import Sweep
from common.report.statistics import reach
from common.run.result import Result
from common.run.run_folder import RunFolder

# Comparability with the paper: reasons against a comparison, and remarks for readers.

PAPERS_GPUS, PAPERS_GPU = 8, "A100"  # CLS-RL, implementation details
CACHED = ("tip_adapter", "tip_adapter_f", "cafo")  # learners whose authors selected on the test images
HALVES = ("base", "new")


def marks(run: Run, result: Result, summary: Summary) -> list[str]:
    """Return remarks for readers: how a number was made, and where the paper's was made differently."""
    values, found = run.values, list(result.remarks)
    draft = summary.facts.get("draft", {})
    found += [draft["published_above_bound"]] if "published_above_bound" in draft else []
    if values.get("learner", {}).get("name") == "vlm" and values["rollout"]["name"] == "vllm":
        found.append("replies sampled by vLLM, whose arithmetic is not the trainer's")
    if values["method"].get("learner") in CACHED and values.get("selection") == "val":
        found.append("chosen by validation images; the published number by the test images")
    drafted = _draft(run)
    if values["method"].get("learner") is None and (lacking := _lacking(drafted)):
        found.append(f"over candidates of CaFo without {lacking}")
    return found


def _draft(run: Run) -> Mapping[str, Any]:
    """Return the configuration of the learner that a run's candidates come from; empty: not from a learner of ours."""
    draft = run.values["method"].get("draft")
    if draft != "file":
        return run.values if draft else {}
    other = Path(run.values["method"]["draft_file"])
    beside = run.path.parent / other.name  # runs of a sweep lie side by side, even after they were moved
    return folders.read_run(beside if beside.is_dir() else other).values


def _lacking(values: Mapping[str, Any]) -> str:
    """Return what CaFo's authors use and this configuration lacks; empty: nothing, or it is not CaFo."""
    if few_shot_of({**values}) != "cafo":
        return ""
    own = values["few_shot"]
    there = {
        "generated pictures": own.get("generated") and own.get("per_class"),
        "sentences": values["clip"].get("prompts"),
    }
    return " and ".join(name for name, given in there.items() if not given)


def reasons(run: Run, result: Result, split: str, summary: Summary) -> list[str]:
    """Return reasons why the images or their use differ from the paper's."""
    values = run.values
    found = [f"{counted(result.left_out, 'image')} left out"] if result.left_out else []
    targets = {one["name"]: one for one in values["setting"]["targets"].values()}
    halves = [result.final[half].n for half in HALVES if half in result.final]
    own = split == "test" or split in HALVES
    data = values["data"] if own else targets.get(split)
    tested = sum(halves) if split in HALVES else summary.n  # papers give no size of the halves
    published = (data or {}).get("published", {})
    test = published.get("test")
    with_val = test and test + published.get("val", 0)  # the authors' scripts also test the validation images
    if test and tested not in (test, with_val if result.protocol == "official" else test):
        found.append(f"{tested} of {test} test images")
    learner = values["method"].get("learner")
    if learner == "cafo" and (lacking := _lacking(values)):
        found.append(f"CaFo without {lacking}")
    if learner not in (None, "cafo") and (values.get("clip") or {}).get("prompts"):
        found.append("sentences of clip.prompts, which the published number has not")
    return found


def as_fast(run: Run, result: Result) -> list[str]:
    """Return reasons why times are not comparable with the paper's, which were measured on eight A100."""
    found = [] if run.gpus == PAPERS_GPUS else [f"timed on {counted(run.gpus or 'no', 'GPU')} instead of {PAPERS_GPUS}"]
    if run.gpus and PAPERS_GPU not in result.device:
        found.append(f"timed on {result.device or 'an unknown GPU'} instead of {PAPERS_GPU}")
    return found


# Cells: the numbers of the runs per seed, and differences and averages computed from them.
#
# In percent, percentage points or the unit of the measure; never a share from 0 to 1.
#
# Shapes: S seeds.

Keys = tuple[tuple[str, str], ...]  # sorted by key
AVERAGE, HARMONIC = "average", "H"
BY_RESULT = {"split", "measure"}  # keys that are only known once a run has a result
NO_TRAINING = ("data", "model", "evaluation before", "evaluation after", "saving")  # phases that training excludes


@dataclass
class Cell:
    """One number of a table.

    values: by seed.
    images: number of images of each.
    intervals: 95 %, over the images of a seed's number; times and extremes have none.
    percent: percent, else minutes or milliseconds.
    combine: function over seeds.
    marks: remarks for readers.
    reasons: why it is not comparable with the published number.
    missing: seeds without a result.
    """

    values: dict[int, float] = field(default_factory=dict)
    images: int | None = None
    intervals: dict[int, tuple[float, float]] = field(default_factory=dict)
    percent: bool = True
    combine: Callable[[Sequence[float]], float] = fmean
    marks: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)

    def note(self, other: Cell) -> None:
        """Add the remarks, reasons and missing seeds of a cell that this one is computed from."""
        self.marks = [*dict.fromkeys([*self.marks, *other.marks])]
        self.reasons = [*dict.fromkeys([*self.reasons, *other.reasons])]
        self.missing = [*dict.fromkeys([*self.missing, *other.missing])]

    def take(self, seed: int, number: Number) -> None:
        """Set a seed's number."""
        self.values[seed] = number.value
        if number.interval is not None:
            self.intervals[seed] = number.interval
        self.images, self.percent, self.combine = number.images, number.percent, number.combine
        self.note(Cell(marks=number.marks, reasons=number.reasons))


def collect(sweep: Sweep) -> tuple[dict[Keys, Cell], list[Run]]:
    """Return all cells by their keys, and the runs."""
    page, cells, unfinished, runs = sweep.page, dict[Keys, Cell](), set[str](), list[Run]()
    places: dict[tuple[Keys, int], str] = {}
    # numbers of the runs; several points of a sweep may share a run
    for folder in dict.fromkeys(shown.folder for shown in sweep.runs):
        run = _read(sweep.folder.parent / folder)
        runs.append(run)
        for shown in (each for each in sweep.runs if each.folder == folder):
            if run.result is None:
                unfinished.add(folder)
                continue
            for extra, number in numbers(run, run.result, page):
                keys = _sorted({**shown.keys, **extra})
                cell = cells.setdefault(keys, Cell())
                if (other := places.setdefault((keys, shown.seed), folder)) != folder:
                    cell.note(Cell(reasons=[f"seed {shown.seed} is there twice: {other} and {folder}"]))
                else:
                    cell.take(shown.seed, number)
    # seeds without a result, in all cells that they belong to
    for shown in (each for each in sweep.runs if each.folder in unfinished):
        of_it = [cell for keys, cell in cells.items() if shown.keys.items() <= dict(keys).items()]
        if not of_it and not BY_RESULT & {*_axes(page)}:
            of_it = [cells.setdefault(_sorted(shown.keys), Cell())]
        for cell in of_it:
            cell.note(Cell(missing=[shown.seed]))
    # differences, averages, harmonic means
    if minus := page.get("minus"):
        cells = subtract(cells, minus)
    if key := page.get("average"):
        planned = {shown.keys[key] for shown in sweep.runs if key in shown.keys}
        cells |= averages(cells, key, planned)
    if page.get("harmonic"):
        cells |= harmonic(cells)
    return cells, runs


def _axes(page: Mapping[str, Any]) -> list[str]:
    return [key for part in ("rows", "columns", "panels") for key in page.get(part, ())]


def _read(path: Path) -> Run:
    return folders.read_run(path) if path.is_dir() else Run(path, "not run", "or it failed before it began")


@dataclass(frozen=True)
class Number:
    """A number of one run, with fields as in `Cell`."""

    value: float
    images: int | None = None
    interval: tuple[float, float] | None = None
    percent: bool = True
    combine: Callable[[Sequence[float]], float] = fmean
    marks: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def numbers(run: Run, result: Result, page: Mapping[str, Any]) -> Iterator[tuple[dict[str, str], Number]]:
    """Yield the numbers of a run for a page, with the keys that only a result has: split and measure."""
    by_split = "split" in _axes(page)
    for split, summary in result.final.items():
        if split == "val" or (not by_split and split != "test"):
            continue
        name = result.data if split == "test" and run.values["setting"]["targets"] else split
        extra = {"split": name} if by_split else {}
        noted = marks(run, result, summary)
        apart = reasons(run, result, split, summary)
        for measure in page.get("measures") or ("",):
            for number in MEASURES[measure or "accuracy"](run, result, split, summary):
                keys = {**extra, "measure": measure} if measure else extra
                yield keys, replace(number, marks=noted, reasons=[*apart, *number.reasons])


def _accuracy(run: Run, result: Result, split: str, summary: Summary) -> Iterator[Number]:
    """Yield the accuracy in percent: strict match, or under `protocol=official` the authors' match if there is one."""
    share, interval = summary.accuracy, summary.ci95
    if result.protocol == "official" and summary.accuracy_official is not None:
        share, interval = summary.accuracy_official, summary.ci95_official or interval
    yield Number(100 * share, summary.n, (100 * interval[0], 100 * interval[1]))


def _train_minutes(run: Run, result: Result, split: str, summary: Summary) -> Iterator[Number]:
    seconds = result.train.get("seconds", {})
    if result.after and "total" in seconds:
        minutes = (seconds["total"] - sum(seconds.get(phase, 0.0) for phase in NO_TRAINING)) / 60
        yield Number(minutes, percent=False, reasons=as_fast(run, result))


def _inference_minutes(run: Run, result: Result, split: str, summary: Summary) -> Iterator[Number]:
    yield Number(summary.seconds / 60, summary.n, percent=False, reasons=as_fast(run, result))


def _milliseconds(run: Run, result: Result, split: str, summary: Summary) -> Iterator[Number]:
    yield Number(1000 * summary.seconds / summary.n, summary.n, percent=False, reasons=as_fast(run, result))


def _lowest(run: Run, result: Result, split: str, summary: Summary) -> Iterator[Number]:
    if found := later_evaluations(RunFolder(run.path).read_log("metrics.jsonl")):
        yield Number(min(found), combine=min)


def _highest(run: Run, result: Result, split: str, summary: Summary) -> Iterator[Number]:
    if found := later_evaluations(RunFolder(run.path).read_log("metrics.jsonl")):
        yield Number(max(found), combine=max)


Measure = Callable[[Run, Result, str, Summary], Iterator[Number]]
MEASURES: dict[str, Measure] = {
    "accuracy": _accuracy,
    "train_minutes": _train_minutes,
    "inference_minutes": _inference_minutes,
    "image_ms": _milliseconds,
    "lowest": _lowest,
    "highest": _highest,
}


def later_evaluations(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return accuracies in percent, on the monitored split, measured after half an epoch (ALERT Table 4).

    >>> log = [{"step": 1, "epoch": 0.4}, {"step": 1, "eval/val/accuracy": 0.2}, {"step": 2, "epoch": 0.8}]
    >>> later_evaluations([*log, {"step": 2, "eval/val/accuracy": 0.5}])
    [50.0]
    """
    epochs = {row["step"]: row["epoch"] for row in rows if "epoch" in row}
    found = []
    for row in rows:
        names = sorted(key for key in row if key.startswith("eval/") and key.endswith("/accuracy"))
        if names and epochs.get(row["step"], 0.0) > 0.5:
            found.append(100 * row["eval/val/accuracy" if "eval/val/accuracy" in names else names[0]])
    return found


def subtract(cells: Mapping[Keys, Cell], minus: Mapping[str, str | None]) -> dict[Keys, Cell]:
    """Subtract, seed by seed, the cells whose keys are those of `minus` (None: any value) from the others."""
    bases = {keys: cell for keys, cell in cells.items() if _matches(keys, minus)}
    found: dict[Keys, Cell] = {}
    for keys, cell in cells.items():
        if keys in bases:
            continue
        base = next((b for k, b in bases.items() if _without(k, minus) == _without(keys, minus)), Cell())
        seeds = [seed for seed in cell.values if seed in base.values]
        difference = _computed((cell, base), seeds, lambda both: both[0] - both[1], lambda _: (1.0, -1.0))
        difference.images = cell.images
        difference.note(cell)
        difference.note(base)
        found[keys] = difference
    return found


def averages(cells: Mapping[Keys, Cell], key: str, planned: Collection[str] = ()) -> dict[Keys, Cell]:
    """Average over the values of a key, for seeds that have all of them; `planned`: values that runs will add."""
    groups: dict[Keys, list[Cell]] = {}
    everywhere = {dict(keys)[key] for keys in cells} | {*planned}
    for keys, cell in cells.items():
        groups.setdefault(_sorted({**dict(keys), key: AVERAGE}), []).append(cell)
    found = {}
    for keys, group in groups.items():
        seeds = set.intersection(*(set(cell.values) for cell in group)) if len(group) == len(everywhere) else set()
        found[keys] = _computed(group, sorted(seeds), fmean, lambda numbers: [1 / len(numbers)] * len(numbers))
        for cell in group:
            found[keys].note(cell)
    return found


def harmonic(cells: Mapping[Keys, Cell]) -> dict[Keys, Cell]:
    """Return the harmonic means H of base and new classes; for averages, H of the averages, as is usual."""
    found = {}
    for keys, base in cells.items():
        named = dict(keys)
        if named.get("split") != "base":
            continue
        new = cells.get(_sorted({**named, "split": "new"}), Cell())
        both = [seed for seed in base.values if seed in new.values]
        cell = _computed((base, new), both, harmonic_mean, _harmonic_slopes)
        cell.note(base)
        cell.note(new)
        found[_sorted({**named, "split": HARMONIC})] = cell
    return found


def _harmonic_slopes(both: Sequence[float]) -> tuple[float, float]:
    base, new = both
    total = base + new
    return (2 * (new / total) ** 2, 2 * (base / total) ** 2) if total else (0.0, 0.0)


def _computed(
    cells: Sequence[Cell],
    seeds: Sequence[int],
    value: Callable[[Sequence[float]], float],
    slopes: Callable[[Sequence[float]], Sequence[float]],
) -> Cell:
    """Compute a number from others seed by seed, with an interval from theirs.

    The parts are treated as independent; for a difference on the same images the true interval is narrower.

    Args:
        cells: The other numbers.
        seeds: Seeds of the result.
        value: Function from their numbers to the result.
        slopes: Function from their numbers to the derivatives of the result.
    """
    found = Cell(percent=all(cell.percent for cell in cells))
    for seed in seeds:
        numbers = [cell.values[seed] for cell in cells]
        found.values[seed] = value(numbers)
        if all(seed in cell.intervals for cell in cells):
            parts = [(cell.values[seed], cell.intervals[seed]) for cell in cells]
            below, above = reach(parts, slopes(numbers))
            found.intervals[seed] = (found.values[seed] - below, found.values[seed] + above)
    return found


def _sorted(keys: Mapping[str, str]) -> Keys:
    return tuple(sorted(keys.items()))


def _matches(keys: Keys, minus: Mapping[str, str | None]) -> bool:
    named = dict(keys)
    return all(value is None or named.get(key) == value for key, value in minus.items())


def _without(keys: Keys, minus: Mapping[str, str | None]) -> Keys:
    return tuple(each for each in keys if each[0] not in minus)
