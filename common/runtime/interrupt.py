"""Being asked to stop: by Ctrl-C, by SIGTERM (SLURM before it preempts, `docker stop`, `kill`), by SIGHUP (a lost
connection) or by SIGUSR2 (submitit, before the time limit of a SLURM job).

While training the first of them is a request to stop after this update. Elsewhere all of them raise KeyboardInterrupt.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from common.runtime.progress import say

BESIDE_CTRL_C = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
LONGEST_UPDATE = 600  # seconds that a request waits for the update to end
AT_ONCE = "stopped at once; the same command goes on from the last checkpoint"


class Interrupted(KeyboardInterrupt):
    """The run stopped because its user asked it to; the message says how to go on. Not an `Exception`, so that a sweep
    ends with it.
    """


class Request:
    """Whether somebody has asked to stop. by: the first signal."""

    def __init__(self) -> None:
        self.by: int | None = None

    @property
    def made(self) -> bool:
        """Whether it was."""
        return self.by is not None

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler. A second Ctrl-C, or an update without end, stops at once; SLURM repeats its SIGTERM.

        Raises:
            Interrupted: At once.
        """
        if self.made:
            if number in (signal.SIGINT, signal.SIGALRM):
                raise Interrupted(AT_ONCE)
            return
        self.by = number
        signal.alarm(LONGEST_UPDATE)
        self.tell(number)

    def tell(self, number: int) -> None:
        """Say what happens now."""
        if number == signal.SIGINT:
            say("stopping after this update; press Ctrl-C again to stop at once")
        else:
            say(f"{signal.Signals(number).name}: stopping after this update")


class Relay(Request):
    """A request that a launcher passes on to its ranks, which end by themselves. A terminal's Ctrl-C reaches them
    without it.
    """

    def tell(self, number: int) -> None:
        ranks = multiprocessing.active_children()
        if not ranks:
            raise Interrupted("stopped; the same command goes on")
        for each in ranks if number != signal.SIGINT else ():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(each.pid or 0, number)


@contextmanager
def requested() -> Iterator[Request]:
    """Inside, being asked to stop is noted in the request; only where signals arrive, in the main thread."""
    with _noted(Request()) as request:
        yield request


@contextmanager
def left_to_ranks() -> Iterator[Request]:
    """Inside, being asked to stop is passed on to the ranks: a launcher waits for them to end."""
    with _noted(Relay()) as request:
        yield request


@contextmanager
def heeded() -> Iterator[None]:
    """Inside, the other signals raise KeyboardInterrupt as Ctrl-C does, once: while the run ends, more of them change
    nothing. One that is ignored (`nohup`) stays so, and SIGUSR2 goes to whoever waited for it before.
    """
    held = [signal.getsignal(number) for number in BESIDE_CTRL_C]
    once = next((handler for handler in held if isinstance(handler, _Once)), None)
    if once is not None:  # a caller's
        yield
        return
    once, theirs = _Once(), signal.getsignal(signal.SIGUSR2)
    last: Callable[[int, FrameType | None], None] = _Last(theirs, once) if callable(theirs) else once
    with _handling(once, (signal.SIGTERM, signal.SIGHUP)), _handling(last, (signal.SIGUSR2,)):
        yield


class _Once:
    """A handler that raises KeyboardInterrupt the first time."""

    called = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.called:
            self.called = True
            raise KeyboardInterrupt


class _Last:
    """Somebody else's handler, which ends the process: SLURM sends SIGTERM to a job that submitit has queued again."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any], once: _Once) -> None:
        self.handler, self.once = handler, once

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.once.called = True
        self.handler(number, frame)
        self.once.called = False  # it has let the process go on


@contextmanager
def _noted(request: Request) -> Iterator[Request]:
    with _handling(request.note, (signal.SIGINT, *BESIDE_CTRL_C, signal.SIGALRM)) as before:
        try:
            yield request
        except Interrupted:
            for handler in before.values():
                if isinstance(handler, _Once):
                    handler.called = True
            _pass_on(request, before)
            raise
        else:
            _pass_on(request, before)
        finally:
            if request.made:
                signal.alarm(0)


def _pass_on(request: Request, before: dict[int, Any]) -> None:
    """What was asked by SIGUSR2 goes to whoever waited for it: submitit queues the job again and ends the process."""
    handler = before.get(signal.SIGUSR2)
    if request.by == signal.SIGUSR2 and callable(handler) and not isinstance(handler, _Once):
        handler(signal.SIGUSR2, None)


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], numbers: Sequence[int]) -> Iterator[dict[int, Any]]:
    """Inside, the handler gets these signals, but for those that are ignored. Yields the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    before: dict[int, Any] = {
        number: signal.signal(number, handler)
        for number in numbers
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield before
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _leave() -> None:
    """A forked child ends by SIGTERM, as who starts it expects."""
    for number in BESIDE_CTRL_C:
        handler = signal.getsignal(number)
        if isinstance(handler, _Once | _Last) or isinstance(getattr(handler, "__self__", None), Request):
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave)
