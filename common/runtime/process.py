"""What every process of ours sets first: CPU threads, UTF-8, and a garbage collector that waits for the imports."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# How CPU threads divide and wait for work, so that the same command rounds alike whatever else the machine does.
#
# Libraries read these variables once, when they are loaded.


def set_thread_policy() -> None:
    """Set them; call it before torch or NumPy is imported. Ranks inherit them."""
    # threads that spin while they wait slow two runs on one machine down thirty times (docs/log.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # a sum that fewer threads share rounds otherwise: always as many as there may be
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")
    os.environ["OMP_DYNAMIC"] = "FALSE"  # with TRUE, gradients of PyTorch's kernels are not finite


# Names as people write them: a process that speaks UTF-8 whatever its locale says.


def ensure_utf8() -> None:
    """Start this program again in Python's UTF-8 mode if its locale has no accents; call it first.

    Under `LC_ALL=C`, as in cron jobs and bare containers, neither a folder called `été` nor a class name can be printed
    or written. Processes that this one starts inherit the mode. From Python 3.15 on it is the default (PEP 686).
    """
    written = getattr(sys.stdout, "encoding", None) or "utf-8"  # there may be no terminal
    if sys.flags.utf8_mode or (_is_utf8(sys.getfilesystemencoding()) and _is_utf8(written)):
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("-", "") == "utf8"


# Python's garbage collector rests while a process imports its libraries.
#
# What they make stays for good, yet the collector would walk over it again and again, a tenth of the time until the
# first update.


@contextmanager
def garbage_collector_paused() -> Iterator[None]:
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
