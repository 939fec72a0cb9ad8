"""Progress bars on a terminal, a line a minute elsewhere (logs of a cluster, CI), and lines beside them; of rank 0."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from common.runtime.distributed import rank

T = TypeVar("T")
LINE_EVERY = 60.0  # seconds


@cache
def console() -> Console:
    """Standard error, so that tables on standard output can be piped."""
    return Console(stderr=True)


def is_shown() -> bool:
    """Whether anybody looks."""
    return console().is_terminal and rank() == 0


def say(line: str) -> None:
    """A line beside the bars, as it is, also where nobody looks; one rank speaks for all."""
    if rank() == 0:
        console().print(Text(line), soft_wrap=True)


class Bar:
    """A bar with room for a note behind it; where nobody looks, a line a minute. Nothing to do is nothing to say."""

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        """`done`: by an earlier attempt."""
        columns = (
            TextColumn("{task.description:<28}", markup=False),  # names of splits and methods are no markup
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self.description, self.total, self.done, self.first, self.note = description, total, done, done, ""
        self.begun = self.said = time.monotonic()
        shown = is_shown() and total > done
        self.progress = Progress(*columns, console=console(), disable=not shown)
        self.task = self.progress.add_task(description, total=total, completed=done, note="")

    def advance(self, note: str | None = None) -> None:
        """One step further, perhaps with another note."""
        if note is not None:
            self.progress.update(self.task, note=note)
            self.note = note
        self.progress.advance(self.task)
        self.done += 1
        now = time.monotonic()
        if not is_shown() and now - self.said >= LINE_EVERY:
            self.said = now
            say(self._line(now - self.begun))

    def _line(self, seconds: float) -> str:
        left = seconds * (self.total - self.done) / (self.done - self.first)
        times = f"{seconds / 60:.0f} min gone, about {left / 60:.0f} min left"
        return f"{self.description}: {self.done} of {self.total}, {times}" + (f"; {self.note}" if self.note else "")


@contextmanager
def bar(description: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a bar meanwhile."""
    shown = Bar(description, total, done)
    with shown.progress:
        yield shown


def progress(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items` behind a bar with elapsed and remaining time."""
    with bar(description, total) as shown:
        for item in items:
            yield item
            shown.advance()
