"""What a method measures with the initial weights, kept in the run folder: a resumed run has the same, to the byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common.runtime.distributed import barrier, gather, rank

T = TypeVar("T")


def measured(path: Path, read: Callable[[Path], T], measure: Callable[[], T], keep: bool) -> T:
    """Return what an earlier attempt kept, or measure it. All ranks call it together.

    Args:
        path: JSON file in the run folder; written completely or not at all.
        read: Function that reads and checks it.
        measure: Function that measures it; its value can be written as JSON.
        keep: Write the file. False where no file may be left.
    """
    if all(gather(path.is_file())):
        return read(path)
    found = measure()
    if keep and rank() == 0:
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    barrier()
    return found
