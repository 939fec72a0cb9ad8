"""Ctrl-C while training: the first one is a request to stop after this update, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from common.runtime.progress import say


class Interrupted(KeyboardInterrupt):
    """The run stopped because its user asked it to; the message says how to go on. Not an `Exception`, so that a sweep
    ends with it.
    """


class Request:
    """Whether the user has asked to stop."""

    def __init__(self) -> None:
        self.made = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler."""
        if self.made:
            raise Interrupted("stopped at once; the same command goes on from the last checkpoint")
        self.made = True
        say("stopping after this update; press Ctrl-C again to stop at once")


@contextmanager
def requested() -> Iterator[Request]:
    """Inside, Ctrl-C is noted in the request; only where signals arrive, in the main thread."""
    request = Request()
    with _handling(request.note):
        yield request


@contextmanager
def left_to_ranks() -> Iterator[None]:
    """Inside, the first Ctrl-C is for the ranks alone, which get it too: a launcher waits for them to end."""
    request = Request()

    def once(number: int, frame: FrameType | None) -> None:
        if request.made:
            raise Interrupted("stopped at once; the same command goes on from the last checkpoint")
        request.made = True

    with _handling(once):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
