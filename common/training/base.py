"""What the training loop asks of a trainer, and which prompts and which learning rate an update uses."""

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

# What the training loop asks of a trainer; GRPO and SFT look the same from there.


@dataclass(frozen=True)
class Step:
    """What one update reports: metrics by name, seconds by phase, its completions as table rows, and counts that a
    resumed run would not repeat (names with a `/`).
    """

    metrics: dict[str, float]
    seconds: dict[str, float]
    rows: list[dict[str, Any]]
    counts: dict[str, float] = field(default_factory=dict)


class Trainer(Protocol):
    """GRPO and SFT look the same from the loop. All ranks call the methods together. tokens: seen so far."""

    tokens: float

    def step(self, update: int) -> Step:
        """Update number `update`, counted from 0."""

    def sampling(self, sampler_only: bool = False) -> AbstractContextManager[None]:
        """Inside, every rank holds all weights, and the sampler is awake and has them: to sample, score and save.

        `sampler_only`: nobody else needs them, so that they are not gathered for a sampler that keeps its own.

        The one place where weights are gathered and the sampler is told about them, for training and evaluation alike.
        """

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into a folder that a trainer can resume from."""

    def restore(self, folder: Path, done: int) -> None:
        """Take over the weights that `save` wrote on as many ranks after `done` updates."""

    def close(self) -> None:
        """Release the engine."""


# Which prompts and which learning rate an update uses: pure functions of its number.
#
# Nothing here has a state, so a resumed run and a run on another number of ranks see the same data in the same order.


class Epochs:
    """The prompts of every epoch, in the order of the training images; asked for when they are needed."""

    def __init__(self, ask: Callable[[int], Sequence[Prompt]], first: Sequence[Prompt] | None = None) -> None:
        """
        Args:
            ask: From an epoch, counted from 0, to its prompts.
            first: Those of epoch 0, if they are known already.
        """
        self.ask, self.known = ask, {0: ask(0) if first is None else first}
        self.size = len(self.known[0])

    def __call__(self, epoch: int) -> Sequence[Prompt]:
        """The prompts of one epoch, counted from 0."""
        if epoch not in self.known:
            # an update reaches from one epoch into the next at most
            self.known = {number: prompts for number, prompts in self.known.items() if number == epoch - 1}
            self.known[epoch] = self.ask(epoch)
        return self.known[epoch]

    def __len__(self) -> int:
        return self.size


def total_updates(config: TrainerConfig, items: int) -> int:
    """`updates` if set, else as many as `epochs` passes over the items take (the last one may be partial).

    Each rollout batch makes `num_iterations` updates. 0 for trainer=none.
    """
    if config.name == "none":
        return 0
    several = config.num_iterations if isinstance(config, GRPOConfig) else 1
    return config.updates or several * math.ceil(config.epochs * items / config.prompts_per_update)


def batch(update: int, size: int, items: int, seed: int) -> list[tuple[int, int]]:
    """Epoch and index of each of the update's prompts: consecutive stretches of freshly shuffled epochs.

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
    """Linear warm-up over `warmup_ratio` of the updates, then constant, linear or cosine to `final_ratio` of the peak.

    `update` counts from 0. Without warm-up the first update uses the full rate, and linear decay would reach its end
    one update after the last, as in transformers.
    """
    warmup = math.ceil(config.warmup_ratio * updates)
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    done = (update - warmup) / max(1, updates - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * shape)
