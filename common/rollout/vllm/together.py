"""Ranks that share an engine, each with a part of its weights, ask it together.

A tensor-parallel engine answers only if all its ranks ask the same, but ranks have prompts of their own, and not
equally often: the last batch of an evaluation, or a group that is drawn again, concerns some alone. So they ask in
rounds, each for the prompts of all, and a rank that has no more joins the rounds of the others until nobody has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.runtime.distributed import rank, world

Ask = Callable[[Sequence[Any], Sequence[dict[str, Any]], float], list[Any]]


@dataclass(frozen=True)
class Asked:
    """What a rank wants to know: see `Engine.generate`."""

    prompts: list[Any]
    choices: list[dict[str, Any]]
    temperature: float


class Together:
    """The ranks of one engine."""

    def __init__(self, size: int, ask: Ask) -> None:
        """
        Args:
            size: Ranks of an engine; it divides their number.
            ask: The engine.
        """
        import torch.distributed as dist

        self.ask, self.place = ask, rank() % size
        groups = [dist.new_group(list(range(first, first + size)), backend="gloo") for first in range(0, world(), size)]
        self.size, self.group = size, groups[rank() // size]

    def round(self, mine: Asked) -> list[Any]:
        """The engine's outputs for this rank's prompts."""
        return self._round(self._of_all(mine))

    def finish(self) -> None:
        """Join the others' rounds until they have no more."""
        while any(parts := self._of_all(None)):
            self._round(parts)

    def _of_all(self, mine: Asked | None) -> list[Asked | None]:
        import torch.distributed as dist

        parts: list[Asked | None] = [None] * self.size
        dist.all_gather_object(parts, mine, group=self.group)
        return parts

    def _round(self, parts: list[Asked | None]) -> list[Any]:
        """Ask for all, those of one temperature at a time; the outputs of this rank."""
        outputs: list[Any] = []
        for temperature in sorted({part.temperature for part in parts if part}):
            shares = [part if part and part.temperature == temperature else Asked([], [], 0.0) for part in parts]
            found = self.ask(
                [prompt for part in shares for prompt in part.prompts],
                [choice for part in shares for choice in part.choices],
                temperature,
            )
            before = sum(len(part.prompts) for part in shares[: self.place])
            outputs += found[before : before + len(shares[self.place].prompts)]
        return outputs
