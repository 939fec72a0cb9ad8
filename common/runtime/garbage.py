"""Python's garbage collector rests while a process imports its libraries.

What they make stays for good, yet the collector would walk over it again and again, a tenth of the time until the first
update.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_rest() -> Iterator[None]:
    """Collect nothing inside, and never look at what was made there again. Only the first time in a process: later runs
    import nothing.
    """
    if gc.get_freeze_count() or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
