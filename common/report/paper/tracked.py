"""A page in W&B, beside the runs of its sweep: its tables, picture and report, under the sweep's own name."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from common.report.compare import Table
from common.report.html.run_page import FILE
from common.report.paper.page import Page
from common.report.paper.tables import listing, matrices
from common.run.tracking import settled_mode


def publish(page: Page, folder: Path, tracking: Mapping[str, Any]) -> None:
    """Log the page as a run of job type `table`; the same run again if it has been logged before.

    Args:
        page: What `folder` shows.
        folder: The sweep's, with its files written.
        tracking: The configuration's group of that name.
    """
    if tracking["mode"] == "disabled":
        return
    place = folder / "wandb"
    os.environ["WANDB_DATA_DIR"] = str(place / "data")
    (place / "data").mkdir(parents=True, exist_ok=True)
    import wandb

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
    logged: dict[str, Any] = {f"table/{panel or page.sweep.name}": _table(table) for panel, table in matrices(page)}
    logged["numbers"] = _table(listing(page))
    if (folder / "figure.png").is_file():
        logged["figure"] = wandb.Image(str(folder / "figure.png"))
    if (folder / FILE).is_file():
        logged["report"] = wandb.Html((folder / FILE).read_text(encoding="utf-8"), inject=False)
    run.log(logged)
    run.finish()


def _table(table: Table) -> Any:
    import wandb

    names = [name or " " for name in table.columns]  # W&B takes no empty name
    return wandb.Table(columns=list[str | int](names), data=[list(row) for row in table.rows])
