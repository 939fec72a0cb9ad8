"""A page on disk and on the terminal."""

from __future__ import annotations

from pathlib import Path

from common.report import console
from common.report.compare import render
from common.report.html import sweep_page
from common.report.paper import page as pages
from common.report.paper import pictures, points
from common.report.paper.page import Page
from common.report.paper.tables import listing, matrices, notes
from common.types import UserError


def write(folder: Path, shown: bool = False) -> Page:
    """Build the page and write table.md, table.tex, table.csv and the picture into the sweep's folder.

    Args:
        folder: The sweep's.
        shown: Whether it is also printed.
    """
    page = pages.build(folder)
    pages.check(page.sweep.page)
    tables, numbers, below = list(matrices(page)), listing(page), notes(page)
    text = [f"# {page.sweep.name}", ""]
    for panel, table in tables:
        text += [*([f"## {panel}", ""] if panel else []), render(table, "markdown")]
    text += [f"- {line}" for line in below]
    text += ["", "## Every number", "", render(numbers, "markdown")]
    (folder / "table.md").write_text("\n".join(text), encoding="utf-8")
    latex = "\n".join(f"% {panel}\n{render(table, 'latex')}" for panel, table in tables)
    (folder / "table.tex").write_text("".join(f"% {line}\n" for line in below) + latex, encoding="utf-8")
    (folder / "table.csv").write_text(render(numbers, "csv"), encoding="utf-8")
    pictures.draw(page, folder)
    sweep_page.of_sweep(folder, page)
    if shown:
        show(page, folder)
    return page


def show(page: Page, folder: Path) -> None:
    """Print the tables in the paper's shape and what stands below them."""
    for panel, table in matrices(page):
        console.show(table, panel)
    for line in notes(page):
        print(line)
    written = sorted(path.name for path in folder.iterdir() if path.name != points.FILE)
    print(f"{folder}: {', '.join(written)}")


def find(path: Path) -> Path:
    """A sweep's folder by its path, or by its name under outputs/.

    Raises:
        UserError: There is none.
    """
    for folder in (path, Path("outputs") / path):
        if (folder / points.FILE).is_file():
            return folder
    raise UserError(
        f"{path} is no sweep's folder: there is no {points.FILE}; sweeps write outputs/<sweep>/ (docs/papers.md)"
    )
