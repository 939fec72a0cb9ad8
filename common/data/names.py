"""Class names as they are shown to a model."""

from __future__ import annotations

from pathlib import Path


def display(raw: str) -> str:
    """Underscores are blanks."""
    return " ".join(raw.replace("_", " ").split())


def read_aliases(path: Path, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Placeholder until the branch with names is merged."""
    raise NotImplementedError
