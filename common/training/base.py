"""Define the interface between training loop and trainers, and which prompts and learning rate an update uses."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from common.config.schema import GRPOConfig, TrainerConfig
from common.types import Prompt


@dataclass(frozen=True)
class Step:
    """Report of one update.

    metrics: values by name.
    seconds: time by phase.
    rows: completions as table rows.
    counts: counts that a resumed run would not repeat (names with a `/`).
    """

    metrics: dict[str, float]
    seconds: dict[str, float]
    rows: list[dict[str, Any]]
    counts: dict[str, float] = field(default_factory=dict)


class Trainer(Protocol):
    """Interface of GRPO and SFT for the training loop. All ranks call the methods together. tokens: seen so far."""

    tokens: float

    def step(self, update: int) -> Step:
        """Make update number `update`, counted from 0."""

    def sampling(self, sampler_only: bool = False) -> AbstractContextManager[None]:
        """Give every rank all weights, and a sampler that is awake and has them: to sample, score and save.

        `sampler_only`: only the sampler needs weights, so none are gathered if it keeps a copy of its own. This is the
        only place where weights are gathered and the sampler gets new ones, for training and evaluation alike.
        """

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into a folder that a trainer can resume from."""

    def restore(self, folder: Path, done: int) -> None:
        """Load the weights that `save` wrote on the same number of ranks after `done` updates."""

    def close(self) -> None:
        """Release the engine."""


# Data order and learning rate: pure functions of the update's number, so that a resumed run, or one on another number
# of ranks, sees the same data in the same order.


class Epochs:
    """Prompts of every epoch, in the order of the training images, built on demand."""

    def __init__(self, ask: Callable[[int], Sequence[Prompt]], first: Sequence[Prompt] | None = None) -> None:
        """
        Args:
            ask: Function from an epoch, counted from 0, to its prompts.
            first: Prompts of epoch 0, if they exist already.
        """
        self.ask, self.known = ask, {0: ask(0) if first is None else first}
        self.size = len(self.known[0])

    def __call__(self, epoch: int) -> Sequence[Prompt]:
        """Return the prompts of one epoch, counted from 0."""
        if epoch not in self.known:
            # Keep only the previous epoch: a batch can cross the border between two epochs.
            self.known = {number: prompts for number, prompts in self.known.items() if number == epoch - 1}
            self.known[epoch] = self.ask(epoch)
        return self.known[epoch]

    def __len__(self) -> int:
        return self.size


def total_updates(config: TrainerConfig, items: int) -> int:
    """Return `updates` if set, else the updates in `epochs` passes over the items (the last one may be partial).

    GRPO makes `updates_per_rollout` updates per rollout batch. 0 for trainer=none.
    """
    if config.name == "none":
        return 0
    several, prompts = 1, config.prompts_per_update
    if isinstance(config, GRPOConfig):
        several, prompts = config.updates_per_rollout, config.prompts_per_rollout
    return config.updates or several * math.ceil(config.epochs * items / prompts)


def batch(update: int, size: int, items: int, seed: int) -> list[tuple[int, int]]:
    """Return epoch and index of each prompt of an update: consecutive slices of freshly shuffled epochs.

    >>> sorted(batch(0, 2, 4, seed=1) + batch(1, 2, 4, seed=1) + batch(2, 2, 4, seed=1))[:4]
    [(0, 0), (0, 1), (0, 2), (0, 3)]
    """
    chosen = []
    for position in range(update * size, (update + 1) * size):
        epoch, offset = divmod(position, items)
        chosen.append((epoch, _order(epoch, items, seed)[offset]))
    return chosen


@lru_cache(maxsize=2)  # an update asks for the same one or two epochs once per prompt
def _order(epoch: int, items: int, seed: int) -> tuple[int, ...]:
    order = list(range(items))
    random.Random(f"epoch-{seed}-{epoch}").shuffle(order)
    return tuple(order)


def learning_rate(config: TrainerConfig, update: int, updates: int) -> float:
    """Return the rate: linear warm-up over `warmup_ratio` of the updates, then constant, linear or cosine decay.

    Decay ends at `final_ratio` of the peak. `update` counts from 0. Without warm-up the first update uses the full
    rate, and linear decay would reach its end one update after the last, as in transformers.
    """
    warmup = math.ceil(config.warmup_ratio * updates)
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    done = (update - warmup) / max(1, updates - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * shape)
