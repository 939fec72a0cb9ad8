"""Handle requests to stop: Ctrl-C, SIGTERM (SLURM before it preempts, `docker stop`, `kill`), SIGHUP (lost connection)
and SIGUSR2 (submitit, before the time limit of a SLURM job).

During training the first signal requests a stop after the current update. Elsewhere all of them raise
KeyboardInterrupt.
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
LONGEST_UPDATE = 600  # seconds after a request until the process stops, even within an update
AT_ONCE = "stopped at once; the same command goes on from the last checkpoint"


class Interrupted(KeyboardInterrupt):
    """The run stopped on request; the message says how to continue. Not an `Exception`, so it also ends a sweep."""


class Request:
    """A request to stop, if there was one. by: number of the first signal."""

    def __init__(self) -> None:
        self.by: int | None = None

    @property
    def made(self) -> bool:
        """Whether a stop was requested."""
        return self.by is not None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A second Ctrl-C or a timeout stops at once; other repeats are ignored, as SLURM sends them.

        Raises:
            Interrupted: To stop at once.
        """
        if self.made:
            if number in (signal.SIGINT, signal.SIGALRM):
                raise Interrupted(AT_ONCE)
            return
        self.by = number
        signal.alarm(LONGEST_UPDATE)
        self.tell(number)

    def tell(self, number: int) -> None:
        """Print what happens now."""
        if number == signal.SIGINT:
            say("stopping after this update; press Ctrl-C again to stop at once")
        else:
            say(f"{signal.Signals(number).name}: stopping after this update")


class Relay(Request):
    """A request that a launcher passes on to its ranks, which end by themselves. Ctrl-C in a terminal reaches them
    directly.
    """

    def tell(self, number: int) -> None:
        ranks = multiprocessing.active_children()
        if not ranks:
            raise Interrupted("stopped; the same command goes on")
        for each in ranks if number != signal.SIGINT else ():
            with suppress(ProcessLookupError):  # the rank has just ended
                os.kill(each.pid or 0, number)


@contextmanager
def requested() -> Iterator[Request]:
    """Note signals in the request while the block runs; only in the main thread, where Python handles signals."""
    with _noted(Request()) as request:
        yield request


@contextmanager
def left_to_ranks() -> Iterator[Request]:
    """Pass signals on to the ranks while the block runs: a launcher waits for them to end."""
    with _noted(Relay()) as request:
        yield request


@contextmanager
def heeded() -> Iterator[None]:
    """Raise KeyboardInterrupt for the other signals as for Ctrl-C while the block runs, but only once: further signals
    while the run ends do nothing. An ignored signal (`nohup`) stays ignored; SIGUSR2 also goes to its earlier handler.
    """
    held = [signal.getsignal(number) for number in BESIDE_CTRL_C]
    once = next((handler for handler in held if isinstance(handler, _Once)), None)
    if once is not None:  # an outer block has installed the handlers already
        yield
        return
    once, theirs = _Once(), signal.getsignal(signal.SIGUSR2)
    last: Callable[[int, FrameType | None], None] = _Last(theirs, once) if callable(theirs) else once
    with _handling(once, (signal.SIGTERM, signal.SIGHUP)), _handling(last, (signal.SIGUSR2,)):
        yield


class _Once:
    """Signal handler that raises KeyboardInterrupt the first time."""

    called = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.called:
            self.called = True
            raise KeyboardInterrupt


class _Last:
    """Wrapper of an earlier SIGUSR2 handler that ends the process, as submitit's does after it has requeued the job.

    Meanwhile SLURM sends SIGTERM to the job, which must not raise KeyboardInterrupt.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], Any], once: _Once) -> None:
        self.handler, self.once = handler, once

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.once.called = True
        self.handler(number, frame)
        self.once.called = False  # the handler has returned, so the process goes on


@contextmanager
def _noted(request: Request) -> Iterator[Request]:
    with _handling(request.note, (signal.SIGINT, *BESIDE_CTRL_C, signal.SIGALRM)) as before:
        try:
            yield request
        except Interrupted:
            # the run ends: later signals must not raise KeyboardInterrupt
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
    """Call the earlier SIGUSR2 handler if SIGUSR2 was the request: submitit requeues the job and ends the process."""
    handler = before.get(signal.SIGUSR2)
    if request.by == signal.SIGUSR2 and callable(handler) and not isinstance(handler, _Once):
        handler(signal.SIGUSR2, None)


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], numbers: Sequence[int]) -> Iterator[dict[int, Any]]:
    """Set the handler for these signals, except ignored ones, while the block runs. Yields the earlier handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    # Ctrl-C is handled even if it is ignored, as in background jobs of a shell
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
    """Restore the default handlers in a forked child, so that SIGTERM ends it as its parent expects."""
    for number in BESIDE_CTRL_C:
        handler = signal.getsignal(number)
        if isinstance(handler, _Once | _Last) or isinstance(getattr(handler, "__self__", None), Request):
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave)
