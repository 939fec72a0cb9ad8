"""What the training loop asks of a trainer; GRPO and SFT look the same from there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


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
