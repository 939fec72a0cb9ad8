"""Run folders as they lie on disk: finished ones with their result, the others with the reason why there is none."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import trust
from common.config.composition import decides_result
from common.counted import counted
from common.data import manifest
from common.report.paper.points import FILE
from common.run.result import Result
from common.run.run_folder import LOCK, MANIFEST
from common.types import UserError

ASKED = "asked"


@dataclass(frozen=True)
class Run:
    """One folder. state: `finished`, `running`, `unfinished`, `damaged`, `asked` (by manifest=true alone) or `foreign`;
    why: in words, if not finished.

    values: what the result depends on, of the configuration. gpus: that it was started with; no result depends on them.
    """

    path: Path
    state: str
    why: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    result: Result | None = None
    gpus: int = 0


def read(path: Path) -> Run:
    """What a folder holds."""
    config = path / "config.yaml"
    if not config.is_file():
        if manifest.is_one(path / MANIFEST):
            return Run(path, ASKED, "manifest=true showed its questions; nothing was run")
        return Run(path, "foreign", "no run wrote it: there is no config.yaml")
    try:
        values = trust.read(config)
    except UserError as error:
        return Run(path, "damaged", str(error))
    if "signature" not in values:
        return Run(path, "foreign", "no run wrote its config.yaml")
    values.pop("signature")
    gpus = values.get("gpus", 0)
    values = decides_result(values)
    if not (path / "metrics.json").is_file():
        state = "running" if _is_locked(path / LOCK) else "unfinished"
        return Run(path, state, f"after {counted(_updates(path), 'update')}", values, gpus=gpus)
    try:
        return Run(path, "finished", "", values, Result.load(path), gpus)
    except UserError as error:
        return Run(path, "damaged", str(error), values, gpus=gpus)


def find(paths: Iterable[Path]) -> list[Run]:
    """The folders among the paths, each once; files beside them and sweeps' own folders are passed over.

    Raises:
        UserError: One does not exist.
    """
    paths = list(paths)
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(f"{missing[0]} does not exist")
    once = {path.resolve(): path for path in reversed(paths)}
    return [read(path) for path in reversed(once.values()) if path.is_dir() and not (path / FILE).is_file()]


def _is_locked(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _updates(path: Path) -> int:
    """The last update that metrics.jsonl has; a line that a kill has cut does not count."""
    last = 0
    if (path / "metrics.jsonl").is_file():
        for line in (path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                last = max(last, int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue
    return last
