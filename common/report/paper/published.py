"""The papers' own numbers: sweeps/paper/*.csv. Lines with # say what they are and where they stand."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from common.types import UserError

FOLDER = Path(__file__).parents[3] / "sweeps" / "paper"
VALUE = "published"


@dataclass(frozen=True)
class Published:
    """source: the comment; numbers: by key columns, such as `(("method", "cafo"), ("shots", "4"))`, sorted by key."""

    source: str
    numbers: dict[tuple[tuple[str, str], ...], float]


def load(name: str) -> Published:
    """One file.

    Args:
        name: Without folder and ending.

    Raises:
        UserError: There is no such file, or a line of it is no number.
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
