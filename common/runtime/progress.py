"""Show progress on rank 0: bars on a terminal; elsewhere (logs of a cluster, CI) a line per minute.

A command opens `watched`, which prints something within two seconds and then at least once a minute; `doing` and the
bars inside name the current step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from common.runtime.distributed import rank

T = TypeVar("T")
LINE_EVERY = 60.0  # seconds
SOON = 0.5  # seconds after which a command that may be quick prints what it does


@dataclass(eq=False)
class Stage:
    """A step of the work. line: maps the present time to a progress line; empty: print nothing."""

    line: Callable[[float], str]


_stages: list[Stage] = []  # the innermost last
_spoken = -LINE_EVERY  # time of the last printed line
_is_watched = False


@cache
def console() -> Console:
    """Return the console for standard error, so that tables on standard output can be piped."""
    return Console(stderr=True)


def is_shown() -> bool:
    """Tell whether bars are drawn: on a terminal, by rank 0."""
    return console().is_terminal and rank() == 0


def say(line: str) -> None:
    """Print a line as it is, also without a terminal; only rank 0 prints."""
    global _spoken
    _spoken = time.monotonic()
    if rank() == 0:
        console().print(Text(line), soft_wrap=True)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name the step that the block does, for the line per minute."""
    with _stage(_since(what)):
        yield


def turn_to(what: str) -> None:
    """Rename the outermost step, where no block of code corresponds to it."""
    if _stages:
        _stages[0].line = _since(what)


def _since(what: str) -> Callable[[float], str]:
    begun = time.monotonic()
    return lambda now: f"{what}: {_minutes(now - begun)} gone"


@contextmanager
def watched(what: str, first: float = 0.0) -> Iterator[None]:
    """Print progress while the block runs, so that it is never silent for long.

    Args:
        what: Name of the work. If nothing was printed after `first` seconds, it is printed; a shorter block is silent.
        first: 0: print at once, for slow work such as importing torch, during which no thread can print.
    """
    global _is_watched
    with doing(what):
        if not first:
            say(what)
        if _is_watched:  # an outer block prints already
            yield
            return
        ended, _is_watched = threading.Event(), True
        arguments = (what, first, time.monotonic(), ended)
        watch = threading.Thread(target=_watch, args=arguments, daemon=True, name="progress")
        watch.start()
        try:
            yield
        finally:
            _is_watched = False
            ended.set()
            watch.join()


def _watch(what: str, first: float, begun: float, ended: threading.Event) -> None:
    if first and not ended.wait(first) and _spoken < begun:
        say(what)
    while not ended.wait(min(1.0, LINE_EVERY / 4)):
        now = time.monotonic()
        if now - max(_spoken, begun) >= LINE_EVERY and (line := _present(now)):
            say(line)


def _present(now: float) -> str:
    """Return the line of the current step; empty while a bar is drawn or other processes print."""
    try:
        return _stages[-1].line(now)
    except IndexError:  # the step has ended meanwhile, in the other thread
        return ""


@contextmanager
def _stage(line: Callable[[float], str]) -> Iterator[None]:
    stage = Stage(line)
    _stages.append(stage)
    try:
        yield
    finally:
        _stages.remove(stage)


def quiet() -> AbstractContextManager[None]:
    """Print no line per minute in the block, since other processes print their own."""
    return _stage(lambda now: "")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


class Bar:
    """A bar with a note behind it; without a terminal, a line per minute. It is not drawn if nothing is left to do."""

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        """`done`: steps done by an earlier attempt."""
        columns = (
            TextColumn("{task.description:<28}", markup=False),  # names of splits may contain square brackets
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self.description, self.total, self.done, self.first, self.note = description, total, done, done, ""
        self.begun = time.monotonic()
        self.is_drawn = is_shown() and total > done
        self.progress = Progress(*columns, console=console(), disable=not self.is_drawn)
        self.task = self.progress.add_task(description, total=total, completed=done, note="")

    def advance(self, note: str | None = None) -> None:
        """Count one step, optionally with a new note."""
        if note is not None:
            self.progress.update(self.task, note=note)
            self.note = note
        self.progress.advance(self.task)
        self.done += 1
        now = time.monotonic()
        if now - max(_spoken, self.begun) >= LINE_EVERY and (line := self.line(now)):
            say(line)

    def line(self, now: float) -> str:
        """Return the progress as text; empty while the bar is drawn."""
        if self.is_drawn:
            return ""
        seconds, made = now - self.begun, self.done - self.first
        times = f"{_minutes(seconds)} gone"
        if made:
            times += f", about {_minutes(seconds * (self.total - self.done) / made)} left"
        return f"{self.description}: {self.done} of {self.total}, {times}" + (f"; {self.note}" if self.note else "")


@contextmanager
def bar(description: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a bar while the block runs."""
    shown = Bar(description, total, done)
    with shown.progress, _stage(shown.line):
        yield shown


def progress(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items` behind a bar with elapsed and remaining time."""
    with bar(description, total) as shown:
        for item in items:
            yield item
            shown.advance()


# Time of a run by phase.


class Stopwatch:
    """Measures seconds by phase; the time outside all phases is `other`, so that they sum to the total."""

    def __init__(self, earlier: float = 0.0) -> None:
        """`earlier`: seconds of earlier attempts of the run."""
        self.began, self.earlier = time.perf_counter(), earlier
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for `name`."""
        clock = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - clock

    def elapsed(self) -> float:
        """Return the seconds of this attempt and those before it."""
        return self.earlier + time.perf_counter() - self.began

    def split(self, known: Mapping[str, float]) -> dict[str, float]:
        """Return all phases, the `known` ones measured elsewhere, `other`, and the total."""
        phases, total = {**self.phases, **known}, self.elapsed()
        return {**phases, "other": total - sum(phases.values()), "total": total}
