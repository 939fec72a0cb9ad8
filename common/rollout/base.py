"""What the trainer and the evaluation ask of a sampler; the backends differ only in how they compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from common.grpo.packing import Encoded


@dataclass(frozen=True)
class Completion:
    """One sampled reply. ids, logps: [R]; ids end with an end-of-sequence id unless `truncated`.

    `logps` are natural logarithms under the full distribution at the sampling temperature without the banned ids: what
    the trainer's scoring pass computes. top_k and top_p restrict what is drawn, not these numbers.
    """

    ids: torch.Tensor
    logps: torch.Tensor
    text: str
    truncated: bool


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens. Nothing is inherited from a checkpoint's generation config. temperature 0 is greedy."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int

    def __str__(self) -> str:
        if self.temperature == 0:
            return f"greedy, at most {self.max_tokens} tokens"
        return (
            f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}, at most {self.max_tokens} tokens"
        )


class Rollout(Protocol):
    """A sampling backend."""

    def generate(
        self, prompts: Sequence[Encoded], group_size: int, decoding: Decoding, seeds: Sequence[str]
    ) -> list[list[Completion]]:
        """`group_size` completions of every prompt.

        Args:
            prompts: N encoded prompts.
            group_size: G.
            decoding: How to choose tokens.
            seeds: One per prompt; equal seeds and weights give equal completions, whatever else is in the batch.

        Returns:
            N lists of G completions.
        """
