"""What a sweep leaves behind for its page: which runs it has, and how they are laid out. One JSON file per sweep.

outputs/<sweep>/points.json    the runs themselves lie beside this folder, so that sweeps share them
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.types import UserError

FILE = "points.json"


@dataclass(frozen=True)
class SweepRun:
    """A run of a page. folder: beside the sweep's; keys: where the page shows it, as `method: cafo, shots: 4`."""

    folder: str
    seed: int
    keys: dict[str, str]


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was started.

    page: see common/report/paper/page.py. given: values of the command line that replace the sweep's own, but seeds
    and what no result depends on; with any the page is not the paper's. chosen: those that only choose among its own.
    """

    name: str
    page: dict[str, Any]
    given: dict[str, str]
    runs: list[SweepRun]
    chosen: dict[str, str] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)

    def save(self, folder: Path) -> None:
        """Write the file."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: value for key, value in asdict(self).items() if key != "folder"}
        temporary = folder / f"{FILE}.new"
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
        temporary.replace(folder / FILE)

    def path(self, run: SweepRun) -> Path:
        """A run's folder."""
        return self.folder.parent / run.folder


def load(folder: Path) -> Sweep:
    """Read it back.

    Raises:
        UserError: The folder is no sweep's, or its file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{folder} is no sweep's folder: there is no {FILE}; run one of sweeps/ first (docs/papers.md)")
    try:
        values: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        runs = [SweepRun(**each) for each in values["runs"]]
        return Sweep(values["name"], values["page"], values["given"], runs, values.get("chosen", {}), folder)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); the sweep's command writes it again") from error
