"""Progress bars on a terminal, silence elsewhere (logs, CI, ranks other than 0)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.distributed import rank

T = TypeVar("T")


@cache
def console() -> Console:
    """Standard error, so that tables on standard output can be piped."""
    return Console(stderr=True)


def progress(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items` behind a bar with elapsed and remaining time."""
    quiet = not console().is_terminal or rank() != 0
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), disable=quiet) as bar:
        yield from bar.track(items, total=total, description=description)
