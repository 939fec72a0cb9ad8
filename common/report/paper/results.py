"""Read what a page is made of: the list of a sweep's runs, and the paper's published numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.types import UserError

# points.json of a sweep: which runs it has, and the layout of its page.
#
# It lies in outputs/<sweep>/; the runs themselves lie beside this folder, so that sweeps can share them.


FILE = "points.json"


@dataclass(frozen=True)
class SweepRun:
    """A run of a page. folder: beside the sweep's; keys: position on the page, such as `method: cafo, shots: 4`."""

    folder: str
    seed: int
    keys: dict[str, str]


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was started.

    page: see common/report/paper/page.py.
    given: values of the command line that replace the sweep's own, except seeds and values without influence on
        results; with any the page is not the paper's.
    chosen: values that only select some of the sweep's runs.
    """

    name: str
    page: dict[str, Any]
    given: dict[str, str]
    runs: list[SweepRun]
    chosen: dict[str, str] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)

    def save(self, folder: Path) -> None:
        """Write points.json."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: value for key, value in asdict(self).items() if key != "folder"}
        temporary = folder / f"{FILE}.new"
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
        temporary.replace(folder / FILE)

    def path(self, run: SweepRun) -> Path:
        """Return a run's folder."""
        return self.folder.parent / run.folder


def load_sweep(folder: Path) -> Sweep:
    """Read the sweep in a folder.

    Raises:
        UserError: The folder is not a sweep's, or its file is damaged.
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


# Published numbers: sweeps/paper/*.csv. Lines with # give their source.

FOLDER = Path(__file__).parents[3] / "sweeps" / "paper"
VALUE = "published"


@dataclass(frozen=True)
class Published:
    """Published numbers. source: the comment; numbers: by key columns, such as `(("method", "cafo"), ("shots", "4"))`,
    sorted by key.
    """

    source: str
    numbers: dict[tuple[tuple[str, str], ...], float]


def load_published(name: str) -> Published:
    """Read one file.

    Args:
        name: File name without folder and suffix.

    Raises:
        UserError: There is no such file, or a line has no number.
    """
    path = FOLDER / f"{name}.csv"
    if not path.is_file():
        raise UserError(f"page.published={name}: there is no {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    source = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    numbers = {}
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        try:
            value = float(row.pop(VALUE))
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: {row} has no number in the column {VALUE!r}") from error
        numbers[tuple(sorted(row.items()))] = value
    return Published(source, numbers)
