"""Names as people write them: a process that speaks UTF-8 whatever its locale says."""

from __future__ import annotations

import os
import sys


def ensure() -> None:
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
