"""Build a table or figure of a paper from a sweep's runs: ours, published, difference, verdict.

A page, in a sweep's YAML:

    page:
      kind: table                  # which picture: or shots, bars, gain, training, examples (pictures.py)
      rows: [method]               # keys of the sweep's points; `split` and `measure` are those of their results
      columns: [data]
      panels: [method]             # one table, or part of the picture, for each
      published: clsrl_table2      # sweeps/paper/clsrl_table2.csv
      marks: panels                # a picture of dots has a marker for each panel, not for each row
      average: data                # a column with the average over this key
      harmonic: true               # and H of base and new classes
      minus: {method: zeroshot}    # show differences from these
      measures: [accuracy]         # else accuracy alone (common/report/paper/cells.py)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from common.config.schema import one_of
from common.report.folders import Run
from common.report.paper import cells as numbers
from common.report.paper import results
from common.report.paper.cells import AVERAGE, HARMONIC, Cell, Keys
from common.report.statistics import interval, mean_std
from common.types import UserError

SYMBOLS = "†‡§¶"
WIDEST, WIDEST_TIME = 10.0, 0.5  # widest informative intervals: percentage points; for times a share of our number
SEPARATOR = " · "
# Names in metrics.jsonl, the first one found, and the label of the axis. test_accuracy: eval/<split>/accuracy.
CURVES: dict[str, tuple[tuple[str, ...], str]] = {
    "reward": (("reward",), "reward"),
    "accuracy_reward": (("rewards/accuracy/mean", "rewards/equality/mean"), "accuracy reward"),  # No-Thinking: equality
    "format_reward": (("rewards/format/mean",), "format reward"),
    "length": (("completions/mean_length",), "tokens of a completion"),
    "test_accuracy": ((), "accuracy (%)"),
}
LAST = (HARMONIC, AVERAGE)  # values at the end of an axis, in this order
KINDS = ("table", "shots", "bars", "gain", "training", "examples")  # examples: replies, only in report.html


@dataclass(frozen=True)
class TableCell:
    """One cell with its verdict. ours: over seeds; None: no run has it. interval: 95 %. percent: False for times. mean:
    False if ours is the lowest or highest.
    """

    keys: dict[str, str]
    ours: float | None
    std: float | None
    interval: tuple[float, float] | None
    seeds: tuple[int, ...]
    images: int | None
    published: float | None
    marks: tuple[str, ...]
    reasons: tuple[str, ...]
    missing: tuple[int, ...]
    percent: bool = True
    mean: bool = True

    @property
    def difference(self) -> float | None:
        """Ours minus published."""
        return None if self.ours is None or self.published is None else self.ours - self.published

    @property
    def verdict(self) -> str:
        """Whether the published number lies in our interval; if not, whether ours is below or above it.

        If runs are missing the verdict says so, and a match in a very wide interval is not called `inside`.


        >>> from dataclasses import replace
        >>> entry = TableCell({}, 80.0, 1.0, (78.0, 82.0), (1, 2, 3), 100, 84.0, (), (), ())
        >>> entry.verdict, replace(entry, published=81.0).verdict, replace(entry, published=None).verdict
        ('below', 'inside', 'ours')
        >>> replace(entry, reasons=("model=tiny",)).verdict, replace(entry, ours=None).verdict
        ('not comparable: model=tiny', 'quoted')
        >>> replace(entry, missing=(4, 5)).verdict, replace(entry, interval=(-67.0, 187.0)).verdict
        ('incomplete: no result of seed 4, 5', 'too wide to say')
        """
        if self.ours is None:
            return "missing" if self.published is None else "quoted"
        if self.published is None:
            return "ours"
        if self.reasons:
            return f"not comparable: {'; '.join(self.reasons)}"
        if self.missing:
            return f"incomplete: no result of seed {', '.join(map(str, self.missing))}"
        if self.interval is None:
            return f"no interval: {'one seed' if self.mean else 'an extreme of the seeds is no mean'}"
        low, high = self.interval
        if low <= self.published <= high:
            widest = WIDEST if self.percent else WIDEST_TIME * self.ours
            return "inside" if high - low <= widest else "too wide to say"
        return "below" if high < self.published else "above"


@dataclass(frozen=True)
class Page:
    """All cells of a page, in the order of their runs."""

    sweep: results.Sweep
    entries: list[TableCell]
    source: str
    runs: list[Run] = field(default_factory=list)

    @property
    def unfinished(self) -> list[Run]:
        """Runs without a result."""
        return [run for run in self.runs if run.result is None]

    def axis(self, part: str) -> list[str]:
        """Return the values of rows, columns or panels, averages last."""
        found = dict.fromkeys(self.place(entry.keys, part) for entry in self.entries)
        return sorted(found, key=lambda text: [text.split(SEPARATOR)[-1] == last for last in LAST])

    def place(self, keys: Mapping[str, str], part: str) -> str:
        """Return the position of something with these keys on an axis."""
        return SEPARATOR.join(keys[key] for key in self.sweep.page.get(part, ()) if key in keys)

    def at(self, *, rows: str, columns: str, panels: str) -> TableCell | None:
        """Return the cell at a position."""
        wanted = {"rows": rows, "columns": columns, "panels": panels}
        fits = (e for e in self.entries if all(self.place(e.keys, part) == text for part, text in wanted.items()))
        return next(fits, None)

    @property
    def marks(self) -> dict[str, str]:
        """A symbol for every remark of the cells."""
        texts = dict.fromkeys(mark for entry in self.entries for mark in entry.marks)
        return {text: SYMBOLS[n % len(SYMBOLS)] * (1 + n // len(SYMBOLS)) for n, text in enumerate(texts)}


def check(page: Mapping[str, Any]) -> None:
    """Check before its runs start that a page can be laid out.

    Raises:
        UserError: Names the key at fault.
    """
    if not page.get("rows"):
        raise UserError("hydra.sweeper.page.rows is missing: name the keys of its rows, such as [method]")
    for part in ("rows", "columns", "panels", "measures", "curves"):
        if not isinstance(page.get(part, []), list):
            raise UserError(f"hydra.sweeper.page.{part}={page[part]} must be a list")
    one_of("hydra.sweeper.page.kind", page.get("kind", "table"), KINDS)
    for measure in page.get("measures", ()):
        one_of("hydra.sweeper.page.measures", measure, (*numbers.MEASURES,))
    for curve in page.get("curves", ()):
        one_of("hydra.sweeper.page.curves", curve, (*CURVES,))
    if page.get("kind") == "training" and not page.get("curves"):
        raise UserError(f"hydra.sweeper.page.kind=training needs curves: some of {', '.join(CURVES)}")
    if page.get("published"):
        results.load_published(page["published"])


def build(folder: Path) -> Page:
    """Read a sweep's folder and its runs.

    Raises:
        UserError: The folder is not a sweep's.
    """
    sweep = results.load_sweep(folder)
    known = (
        results.load_published(sweep.page["published"]) if sweep.page.get("published") else results.Published("", {})
    )
    found, runs = numbers.collect(sweep)
    changed = [f"{key}={value}" for key, value in sweep.given.items()]
    theirs = _of_the_same_average(known.numbers, found, sweep.page.get("average"))
    partly = changed or sweep.chosen  # then published numbers without a run of ours are left out
    order = [*found, *([] if partly else (keys for keys in theirs if keys not in found))]
    entries = [_entry(keys, found.get(keys, Cell()), theirs.get(keys), changed) for keys in order]
    return Page(sweep, entries, known.source, runs)


def _of_the_same_average(theirs: Mapping[Keys, float], ours: Collection[Keys], key: str | None) -> Mapping[Keys, float]:
    """Return the published numbers, without averages if they are over other values of `key` than ours."""
    if key is None or {dict(keys).get(key) for keys in theirs} <= {dict(keys).get(key) for keys in ours}:
        return theirs
    return {keys: number for keys, number in theirs.items() if dict(keys).get(key) != AVERAGE}


def _entry(keys: Keys, cell: Cell, known: float | None, changed: Sequence[str]) -> TableCell:
    seeds = sorted(cell.values)
    values = [cell.values[seed] for seed in seeds]
    ours = cell.combine(values) if values else None
    std = bounds = None
    # an extreme over seeds is not a mean, so it has neither deviation nor interval
    if values and cell.combine is fmean:
        std = mean_std(values)[1]
        of_images = [cell.intervals[seed] for seed in seeds if seed in cell.intervals]
        # measured on images, hence an accuracy; what is computed from several may be a difference
        bounds = interval(values, of_images, most=100.0 if of_images and cell.images is not None else None)
    return TableCell(
        keys=dict(keys),
        ours=ours,
        std=std,
        interval=bounds,
        seeds=tuple(seeds),
        images=cell.images,
        published=known,
        marks=tuple(cell.marks),
        reasons=(*changed, *cell.reasons),
        missing=tuple(seed for seed in cell.missing if seed not in cell.values),
        percent=cell.percent,
        mean=cell.combine is fmean,
    )
