"""Python's garbage collector rests while the first run of a process imports its libraries.

What they make stays for good, yet the collector would walk over it again and again, a tenth of the time until the first
update.
"""

from __future__ import annotations

import gc


def rest() -> None:
    """Stop collecting until `resume`. Only once in a process: later runs import nothing."""
    if not gc.get_freeze_count():
        gc.disable()


def set_aside() -> None:
    """Never look at what exists now again, if the collector rests.

    Call it before a run makes its model: what is set aside is not freed where it refers to itself.
    """
    if not gc.isenabled():
        gc.freeze()


def resume() -> None:
    """Collect as usual."""
    gc.enable()
