"""Build the tables of a page: in the paper's layout, and one line per number."""

from __future__ import annotations

from collections.abc import Iterator

from common.report.compare import Table
from common.report.paper.page import Page, TableCell

SHORT = {
    "a reconstruction": "reconstruction",
    "CaFo without generated pictures": "no generated pictures",
    "selected on the test images": "test-selected",
    "lies above recall@": "published above our bound",
    "by the test images": "published is test-selected",
    "over candidates of CaFo": "candidates of less than CaFo",
    "sampled by vLLM": "vLLM",
}


def matrices(page: Page) -> Iterator[tuple[str, Table]]:
    """Yield the tables in the paper's layout, one per panel: `ours ± std (published)`."""
    corner = ", ".join(page.sweep.page["rows"])
    for panel in page.axis("panels"):
        columns, rows = page.axis("columns"), []
        for row in page.axis("rows"):
            cells = [_cell(page, page.at(rows=row, columns=column, panels=panel)) for column in columns]
            if any(cells):
                rows.append((row, *cells))
        yield panel, Table((corner, *columns), rows, [])


def _cell(page: Page, entry: TableCell | None) -> str:
    if entry is None:
        return ""
    if entry.ours is None:
        return "missing" if entry.published is None else f"({entry.published:g})"
    text = f"{entry.ours:.2f}" + ("" if entry.std is None else f" ± {entry.std:.2f}")
    text += "".join(sorted({page.marks[mark] for mark in entry.marks}))
    return text + ("" if entry.published is None else f" ({entry.published:g})")


def listing(page: Page) -> Table:
    """Return a table with one line per number, machine-readable and with the verdicts."""
    names = list(dict.fromkeys(key for entry in page.entries for key in entry.keys))
    columns = (
        *names,
        *("ours", "std", "low", "high", "seeds", "images", "published", "difference", "verdict", "marks"),
    )
    rows = []
    for entry in page.entries:
        low, high = entry.interval or (None, None)
        figures = [entry.ours, entry.std, low, high]
        rows.append(
            (
                *(entry.keys.get(name, "") for name in names),
                *map(_number, figures),
                # seeds without a result in brackets
                " ".join(map(str, entry.seeds)) + "".join(f" ({seed})" for seed in entry.missing),
                "" if entry.images is None else str(entry.images),
                "" if entry.published is None else f"{entry.published:g}",
                _number(entry.difference, sign=True),
                entry.verdict,
                "; ".join(map(short, entry.marks)),
            )
        )
    return Table(columns, rows, [])


def short(mark: str) -> str:
    """Return the short form of a remark for a table."""
    return next((word for part, word in SHORT.items() if part in mark), mark)


def _number(value: float | None, sign: bool = False) -> str:
    return "" if value is None else f"{value:{'+' if sign else ''}.4f}".rstrip("0").rstrip(".")


def notes(page: Page) -> list[str]:
    """Return the lines below the tables."""
    lines = ["ours: mean ± standard deviation over seeds; in brackets the published number, alone if only quoted"]
    lines += [f"{symbol}: {text}" for text, symbol in page.marks.items()]
    if page.sweep.given:
        changed = ", ".join(f"{key}={value}" for key, value in page.sweep.given.items())
        lines.append(f"not the paper's runs: {changed}")
    if page.sweep.chosen:
        lines.append("of the paper's runs: " + ", ".join(f"{key}={value}" for key, value in page.sweep.chosen.items()))
    verdicts = [entry.verdict.partition(":")[0] for entry in page.entries]
    lines.append("; ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts)))
    lines += [f"{run.path.name}: {run.state}, {run.why}" for run in page.unfinished]
    return [*lines, f"published: {page.source}"] if page.source else lines
