"""What a command says while it works, of rank 0: bars on a terminal, elsewhere (logs of a cluster, CI) a line a minute.

A command opens `watched`, so that it has said something within two seconds and is never silent for longer than a
minute, whatever it is doing; `doing` and the bars inside name that.
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
SOON = 0.5  # seconds after which a command that may be quick says what it does


@dataclass(eq=False)
class Stage:
    """Something that is being done. line: says how far it is, from the present time; empty: nothing is to be said."""

    line: Callable[[float], str]


_stages: list[Stage] = []  # the innermost last
_spoken = -LINE_EVERY  # when the last line was said
_is_watched = False


@cache
def console() -> Console:
    """Standard error, so that tables on standard output can be piped."""
    return Console(stderr=True)


def is_shown() -> bool:
    """Whether anybody looks."""
    return console().is_terminal and rank() == 0


def say(line: str) -> None:
    """A line beside the bars, as it is, also where nobody looks; one rank speaks for all."""
    global _spoken
    _spoken = time.monotonic()
    if rank() == 0:
        console().print(Text(line), soft_wrap=True)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name what is done inside, for the line a minute."""
    with _stage(_since(what)):
        yield


def turn_to(what: str) -> None:
    """Name anew what the command as a whole is doing, where no block of code holds that."""
    if _stages:
        _stages[0].line = _since(what)


def _since(what: str) -> Callable[[float], str]:
    begun = time.monotonic()
    return lambda now: f"{what}: {_minutes(now - begun)} gone"


@contextmanager
def watched(what: str, first: float = 0.0) -> Iterator[None]:
    """Inside, nobody waits without a word.

    Args:
        what: Is done. If nothing else was said by then, it is said after `first` seconds; what ends before is quiet.
        first: 0: at once, for what is known to be slow, such as the import of torch, which no thread can speak during.
    """
    global _is_watched
    with doing(what):
        if not first:
            say(what)
        if _is_watched:
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
    """The line about what is being done; empty while a terminal shows it as a bar, or while others speak."""
    try:
        return _stages[-1].line(now)
    except IndexError:  # it has ended meanwhile
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
    """Inside, the line a minute is left to other processes, which say their own."""
    return _stage(lambda now: "")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


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
        self.begun = time.monotonic()
        self.is_drawn = is_shown() and total > done
        self.progress = Progress(*columns, console=console(), disable=not self.is_drawn)
        self.task = self.progress.add_task(description, total=total, completed=done, note="")

    def advance(self, note: str | None = None) -> None:
        """One step further, perhaps with another note."""
        if note is not None:
            self.progress.update(self.task, note=note)
            self.note = note
        self.progress.advance(self.task)
        self.done += 1
        now = time.monotonic()
        if now - max(_spoken, self.begun) >= LINE_EVERY and (line := self.line(now)):
            say(line)

    def line(self, now: float) -> str:
        """How far it is, in words; empty where it is drawn."""
        if self.is_drawn:
            return ""
        seconds, made = now - self.begun, self.done - self.first
        times = f"{_minutes(seconds)} gone"
        if made:
            times += f", about {_minutes(seconds * (self.total - self.done) / made)} left"
        return f"{self.description}: {self.done} of {self.total}, {times}" + (f"; {self.note}" if self.note else "")


@contextmanager
def bar(description: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a bar meanwhile."""
    shown = Bar(description, total, done)
    with shown.progress, _stage(shown.line):
        yield shown


def progress(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items` behind a bar with elapsed and remaining time."""
    with bar(description, total) as shown:
        for item in items:
            yield item
            shown.advance()


# Where the time of a run goes.


class Stopwatch:
    """Seconds by phase since it was made; what no phase claims is `other`, so that they add up to the total."""

    def __init__(self, earlier: float = 0.0) -> None:
        """`earlier`: seconds that former attempts of the run took."""
        self.began, self.earlier = time.perf_counter(), earlier
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time inside belongs to `name`."""
        clock = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - clock

    def elapsed(self) -> float:
        """Seconds of this attempt and those before it."""
        return self.earlier + time.perf_counter() - self.began

    def split(self, known: Mapping[str, float]) -> dict[str, float]:
        """All phases, `known` ones from elsewhere, `other`, and the total."""
        phases, total = {**self.phases, **known}, self.elapsed()
        return {**phases, "other": total - sum(phases.values()), "total": total}
