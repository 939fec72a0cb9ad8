"""Settings at the start of every process: CPU threads, UTF-8, and no garbage collection during imports."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# CPU threads: the same command must round in the same way whatever else runs on the machine.
#
# Libraries read these variables once, when they are loaded.


def set_thread_policy() -> None:
    """Set the variables; call it before torch or NumPy is imported. Ranks inherit them."""
    # threads that spin while they wait make two runs on one machine thirty times slower (docs/log.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # a sum over fewer threads rounds differently: always use all threads
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")
    os.environ["OMP_DYNAMIC"] = "FALSE"  # with TRUE, gradients of PyTorch's kernels are not finite


# UTF-8 whatever the locale, for file and class names with accents.


def ensure_utf8() -> None:
    """Restart this program in Python's UTF-8 mode if its locale is not UTF-8; call it first.

    Under `LC_ALL=C`, as in cron jobs and bare containers, neither a folder called `été` nor a class name can be printed
    or written. Child processes inherit the mode. From Python 3.15 on it is the default (PEP 686).
    """
    written = getattr(sys.stdout, "encoding", None) or "utf-8"  # there may be no terminal
    if sys.flags.utf8_mode or (_is_utf8(sys.getfilesystemencoding()) and _is_utf8(written)):
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("-", "") == "utf8"


# Garbage collection is paused while a process imports its libraries.
#
# Imported objects stay for good, yet the collector would traverse them again and again: a tenth of the time until the
# first update.


@contextmanager
def garbage_collector_paused() -> Iterator[None]:
    """Pause the garbage collector in the block, and exclude what was created there from later collections.

    It acts only the first time in a process, since later runs import nothing.
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
