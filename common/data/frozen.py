"""What a learner asks beside the images, frozen with hashes: prompts.json in a run folder.

The manifest says which images and labels; this says which prompts, and which files decided them. It is written once
they are those that will really be asked (not before the model has seen the pictures, if they depend on it), and a
continued run compares.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.runtime.distributed import barrier, rank
from common.types import UserError

FILE = "prompts.json"
AGAIN = "put that one back or use another run folder"


def freeze(folder: Path, prompts: Mapping[str, str], sources: Mapping[str, str]) -> None:
    """Write the hashes down, or check that an earlier attempt had the same. All ranks call it together.

    Args:
        folder: Run folder.
        prompts: Hash of every split's prompts, by the split's name.
        sources: Hash of every file that decides them, by its configuration key.

    Raises:
        UserError: One has changed since.
    """
    path = folder / FILE
    if rank() == 0 and not path.is_file():
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"prompts": prompts, "sources": sources}, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    barrier()
    check_sources(folder, sources)
    before = _read(path)["prompts"]
    if changed := [split for split, found in prompts.items() if before.get(split) != found]:
        raise UserError(
            f"{path} froze other prompts for split '{changed[0]}' than this configuration and this model ask now; use"
            " another run folder"
        )


def check_sources(folder: Path, sources: Mapping[str, str]) -> None:
    """Check before anything is loaded that the files that decide the prompts are those of an earlier attempt.

    Raises:
        UserError: One of them is another file now.
    """
    path = folder / FILE
    if not path.is_file():
        return
    before = _read(path)["sources"]
    for key, found in sources.items():
        if before.get(key) != found:
            raise UserError(f"{key}: the file is not the one that {path} froze; {AGAIN}")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
