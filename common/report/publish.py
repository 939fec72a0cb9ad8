"""Write a page (the table or figure of a paper) to disk, to the terminal and to W&B."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from common.report import compare
from common.report.compare import Table, render
from common.report.html import sweep_page
from common.report.html.run_page import FILE
from common.report.paper import page as pages
from common.report.paper import pictures, results
from common.report.paper.page import Page
from common.report.paper.tables import listing, matrices, notes
from common.run.tracking import settled_mode
from common.types import UserError

# Disk and terminal.


def write_page(folder: Path, shown: bool = False) -> Page:
    """Build the page and write table.md, table.tex, table.csv and the figure into the sweep's folder.

    Args:
        folder: Folder of the sweep.
        shown: Also print the page.
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
        show_page(page, folder)
    return page


def show_page(page: Page, folder: Path) -> None:
    """Print the tables in the paper's layout and the notes below them."""
    for panel, table in matrices(page):
        compare.show_table(table, panel)
    for line in notes(page):
        print(line)
    written = sorted(path.name for path in folder.iterdir() if path.name != results.FILE)
    print(f"{folder}: {', '.join(written)}")


def find_sweep(path: Path) -> Path:
    """Return a sweep's folder, given its path or its name under outputs/.

    Raises:
        UserError: There is no such sweep.
    """
    for folder in (path, Path("outputs") / path):
        if (folder / results.FILE).is_file():
            return folder
    raise UserError(
        f"{path} is no sweep's folder: there is no {results.FILE}; sweeps write outputs/<sweep>/ (docs/papers.md)"
    )


# W&B: tables, figure and report of a page, as a run beside those of its sweep.


def publish_to_wandb(page: Page, folder: Path, tracking: Mapping[str, Any]) -> None:
    """Log the page as a run of job type `table`; the same run again if it was logged before.

    Args:
        page: The page of `folder`.
        folder: Folder of the sweep, with its files written.
        tracking: Configuration group `tracking`.
    """
    if tracking["mode"] == "disabled":
        return
    place = folder / "wandb"
    os.environ["WANDB_DATA_DIR"] = str(place / "data")
    (place / "data").mkdir(parents=True, exist_ok=True)
    import wandb

    # keep the id, so that a page that is written again updates its W&B run
    noted = place / "run_id"
    known = noted.read_text(encoding="utf-8") if noted.is_file() else uuid.uuid4().hex[:8]
    noted.write_text(known, encoding="utf-8")
    run = wandb.init(
        project=tracking["project"],
        id=known,
        resume="allow",
        group=page.sweep.name,
        job_type="table",
        tags=[page.sweep.name, *tracking["tags"]],
        name=folder.name,
        dir=str(folder.resolve()),
        mode=cast(Any, settled_mode(tracking["mode"])),
        reinit="finish_previous",
        settings=wandb.Settings(console="off", disable_git=True, silent=True),
    )
    # tables, then figure and report if they were written
    logged: dict[str, Any] = {
        f"table/{panel or page.sweep.name}": _wandb_table(table) for panel, table in matrices(page)
    }
    logged["numbers"] = _wandb_table(listing(page))
    if (folder / "figure.png").is_file():
        logged["figure"] = wandb.Image(str(folder / "figure.png"))
    if (folder / FILE).is_file():
        logged["report"] = wandb.Html((folder / FILE).read_text(encoding="utf-8"), inject=False)
    run.log(logged)
    run.finish()


def _wandb_table(table: Table) -> Any:
    import wandb

    names = [name or " " for name in table.columns]  # W&B rejects empty names
    return wandb.Table(columns=list[str | int](names), data=[list(row) for row in table.rows])
