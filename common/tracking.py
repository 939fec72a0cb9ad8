"""Weights & Biases, mirrored from the run folder by rank 0. Offline unless an API key is present.

After a resume the updates since the last checkpoint are logged once more under the same run and step; metrics.jsonl
holds each once. The run and the images of its tables lie inside the run folder, so that `wandb sync` works from another
machine.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from common.schema import Tracking

if TYPE_CHECKING:
    from PIL.Image import Image


class Tracker(Protocol):
    """Where metrics are mirrored to. id: name of the run there, by which a resumed run continues it."""

    id: str | None

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Scalars of one update."""

    def completions(self, rows: list[dict[str, Any]], step: int) -> None:
        """A few sampled completions with their images."""

    def close(self, summary: dict[str, float], failed: bool) -> None:
        """Write final values and end the run."""


class NullTracker:
    """Tracks nothing: other ranks, and tracking=none."""

    id: str | None = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        return

    def completions(self, rows: list[dict[str, Any]], step: int) -> None:
        return

    def close(self, summary: dict[str, float], failed: bool) -> None:
        return


class WandbTracker:
    """One W&B run. The step is our own `step` metric: W&B's counter drops rows after a resume."""

    def __init__(
        self,
        config: Tracking,
        folder: Path,
        job_type: str,
        tags: list[str],
        values: dict[str, Any],
        splits: Iterable[str],
        open_image: Callable[[str], Image],
        known: str | None = None,
    ) -> None:
        """
        Args:
            config: Project, group, tags and mode.
            folder: Run folder; the id of a run without a checkpoint yet is kept there.
            job_type: `train` or `eval`.
            tags: Beside those of `config`.
            values: The run's configuration.
            splits: Evaluated splits.
            open_image: From an image's key to a picture.
            known: Id of the run that is resumed, from its checkpoint.
        """
        os.environ["WANDB_DATA_DIR"] = str(folder / "wandb" / "data")  # images of tables are staged there
        (folder / "wandb" / "data").mkdir(parents=True, exist_ok=True)
        import wandb

        self.wandb, self.config, self.open_image = wandb, config, open_image
        noted = folder / "wandb" / "run_id"
        self.id: str | None = known or (noted.read_text() if noted.is_file() else uuid.uuid4().hex[:8])
        noted.write_text(self.id)
        self.run = wandb.init(
            project=config.project,
            id=self.id,
            resume="allow",
            group=config.group,
            job_type=job_type,
            tags=[*tags, *config.tags],
            name=folder.name,
            config=values,
            dir=str(folder.resolve()),
            mode=cast(Any, resolve_mode(config.mode)),
            reinit="finish_previous",
            settings=wandb.Settings(console="off", disable_git=True, silent=True),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        for split in splits:
            self.run.define_metric(f"eval/{split}/accuracy", step_metric="step", summary="max")
        self.table: Any = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log({prefixed(key): value for key, value in metrics.items()} | {"step": step})

    def completions(self, rows: list[dict[str, Any]], step: int) -> None:
        rows = rows[: self.config.completions_rows]
        if not rows:
            return
        columns = list(rows[0])
        if self.table is None:
            self.table = self.wandb.Table(columns=list[str | int](columns), log_mode="INCREMENTAL")
        for row in rows:
            picture = self.wandb.Image(self.open_image(row["image"]), caption=row["label"])
            self.table.add_data(*[picture if key == "image" else row[key] for key in columns])
        self.run.log({"completions": self.table, "step": step})

    def close(self, summary: dict[str, float], failed: bool) -> None:
        self.run.summary.update(summary)
        self.run.finish(exit_code=1 if failed else 0)


def resolve_mode(mode: str) -> str:
    """`auto` becomes `online` with an API key (environment or ~/.netrc) and `offline` without; WANDB_MODE wins."""
    if mode != "auto":
        return mode
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    netrc = Path("~/.netrc").expanduser()
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "api.wandb.ai" in netrc.read_text())
    return "online" if has_key else "offline"


def prefixed(name: str) -> str:
    """TRL logs training metrics under `train/`; evaluation and timing keep their own prefix."""
    return name if name.startswith(("eval/", "time/")) else f"train/{name}"
