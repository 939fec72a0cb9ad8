"""Write and restore checkpoints: everything that determines the next update, written atomically.

    checkpoints/step-000040/
        state.json       updates done, tokens seen, best accuracy, ranks, seed, tracker id, length of metrics.jsonl ...
        random-<rank>.pt generators of Python, NumPy and PyTorch
        deepspeed/       weights and optimizer state by rank
        model/           weights or adapter and processor, for from_pretrained

A checkpoint is written under another name and renamed when it is complete, so a kill or a full disk at any moment
leaves the previous one intact. Schedule and data order are functions of the number of updates
(common/training/base.py) and completions of their seeds, so the generators matter only to code that draws from
them, such as a custom reward.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError

from common.runtime import saved
from common.runtime.distributed import barrier, rank, world
from common.types import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """Content of state.json. best: update and accuracy (0 to 1) of the best evaluation so far, including the one
    before training (update 0).

    began_from: SHA-256 of the weights that the run loads, including frozen ones, which checkpoints do not contain.
    lines: bytes of metrics.jsonl and timings.jsonl at this update; what follows is computed again.
    seconds: time of the run so far, over all attempts.
    """

    update: int
    tokens: float
    best: tuple[int, float] | None
    ranks: int
    seed: int
    tracker: str | None
    began_from: str
    lines: dict[str, int]
    seconds: float


class Checkpoints:
    """Checkpoints of one run. All ranks call its methods together.

    resumed, state: the checkpoint that this attempt resumes from, and its state; None for the first attempt.
    """

    def __init__(self, folder: Path, at_most: int) -> None:
        """
        Args:
            folder: Usually `checkpoints` in the run folder.
            at_most: Number of checkpoints to keep: the last one, the best by accuracy, then the most recent others.
        """
        self.folder, self.at_most = folder, at_most
        if rank() == 0:
            # left by a write that was interrupted
            for leftover in self.folder.glob("*.unfinished"):
                shutil.rmtree(leftover)
        barrier()
        self.resumed = self.latest()
        self.state = None if self.resumed is None else read_state(self.resumed)
        self.began_from = ""

    def begin_from(self, sha256: str, source: str) -> None:
        """Record the weights that the run starts from, some of which no checkpoint contains.

        Raises:
            UserError: An earlier attempt started from other weights.
        """
        if self.state is not None and self.state.began_from != sha256:
            raise UserError(f"the weights of {source} have changed since this run began; use another run_name")
        self.began_from = sha256

    def latest(self) -> Path | None:
        """Return the complete checkpoint with the most updates."""
        complete = self._complete()
        return complete[-1] if complete else None

    def best(self) -> Path | None:
        """Return the checkpoint of the best evaluation."""
        latest = self.latest()
        best = None if latest is None else read_state(latest).best
        return None if best is None else self.folder / f"step-{best[0]:06d}"

    def write(self, state: State, save: Callable[[Path], None]) -> None:
        """Write one checkpoint and delete those that are no longer needed.

        Args:
            state: State to write to state.json.
            save: Function that writes weights and optimizer state of this rank into a folder.

        Raises:
            UserError: The disk is full or cannot be written; the previous checkpoint is untouched.
        """
        final = self.folder / f"step-{state.update:06d}"
        unfinished = final.with_name(f"{final.name}.unfinished")
        try:
            if rank() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            barrier()
            save(unfinished)
            torch.save(_generators(), unfinished / f"random-{rank()}.pt")
            if rank() == 0:
                # last: its presence marks the checkpoint as complete
                (unfinished / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
                _flush(unfinished)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk; each library has its own exception
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = self._complete()
            raise UserError(
                f"the checkpoint after update {state.update} cannot be written to {self.folder} ({error}); "
                + (f"{kept[-1].name} is whole" if kept else "there is no earlier one")
                + "; free disk space and give the same command again"
            ) from error
        barrier()
        if rank() == 0:
            os.replace(unfinished, final)
            _sync(self.folder)
            self._drop_surplus()
        barrier()

    def restore_generators(self, seed: int) -> None:
        """Restore this rank's generators from the latest checkpoint; seed them anew if the number of ranks differs."""
        latest = self._complete()[-1]
        before = read_state(latest).ranks
        if before == world():
            _set_generators(saved.load(latest / f"random-{rank()}.pt"))
        else:
            log.info("generators of %d ranks are not those of %d: seeded anew", before, world())
            seed_generators(seed)

    def keep_weights_only(self) -> None:
        """Delete optimizer states and generators, which a finished run no longer needs."""
        if rank() == 0:
            for path in self._complete():
                for part in path.iterdir():
                    if part.name not in ("model", "state.json"):
                        shutil.rmtree(part) if part.is_dir() else part.unlink()

    def _complete(self) -> list[Path]:
        return sorted(
            path for path in self.folder.glob("step-*") if (path / "state.json").is_file() and not path.suffix
        )

    def _drop_surplus(self) -> None:
        complete = self._complete()
        kept, best = {complete[-1]}, read_state(complete[-1]).best
        if best is not None and self.at_most > 1:
            # an update 0 without a checkpoint matches no path
            kept.update(path for path in complete if path.name == f"step-{best[0]:06d}")
        for path in reversed(complete):
            if len(kept) < self.at_most:
                kept.add(path)
        for path in complete:
            if path not in kept:
                # renamed first: a kill in the middle must not leave an incomplete checkpoint under its name
                doomed = path.with_suffix(".unfinished")
                os.replace(path, doomed)
                shutil.rmtree(doomed)


def read_state(checkpoint: Path) -> State:
    """Read the state of a checkpoint folder."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return State(**{**state, "best": state["best"] and tuple(state["best"])})


def seed_generators(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, differently on every rank."""
    number = seed * 1_000_003 + rank()
    random.seed(number)
    numpy.random.seed(number % 2**32)
    torch.manual_seed(number)


def _generators() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _flush(folder: Path) -> None:
    """Flush every file to disk: a rename that survives a power cut must not name an incomplete file."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
