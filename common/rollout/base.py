"""What the trainer and the evaluation ask of a sampler; the backends differ only in how they compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from common.counted import counted
from common.models.encoder import Encoded, Encoder
from common.types import Prompt, UserError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Request:
    """One prompt to complete, in the two forms that samplers take.

    A sampler inside the trainer computes on `encoded`. An engine of its own renders images itself: it takes
    `unexpanded`, the ids with a single placeholder for every image, and the `pictures` at the model's size. These two
    are functions, so that nobody pays for the form that is not used. Equal seeds (and weights) give equal completions.
    """

    encoded: Encoded
    seed: str
    unexpanded: Callable[[], torch.Tensor]  # [U]
    pictures: Callable[[], list[Image]]


@dataclass(frozen=True)
class Completion:
    """One sampled reply. ids, logps: [R]; ids end with an end-of-sequence id unless `truncated`.

    `logps` are natural logarithms at the sampling temperature without the banned ids, as the trainer's scoring pass
    computes them. Of which distribution they are, the full one or what top_k and top_p left of it, says
    `Rollout.logprobs_untruncated`. `version` counts the updates of the weights that it was sampled with.
    """

    ids: torch.Tensor
    logps: torch.Tensor
    text: str
    truncated: bool
    version: int = 0


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens. Nothing is inherited from a model's generation config. temperature 0 is greedy."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int

    def __str__(self) -> str:
        most = f"at most {counted(self.max_tokens, 'token')}"
        if self.temperature == 0:
            return f"greedy, {most}"
        return f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}, {most}"


class Rollout(Protocol):
    """A sampling backend: `rollout.backend` names a class `(vlm, **rollout.options)`."""

    # Its log-probabilities are those of the whole distribution, although top_k and top_p restrict what is drawn.
    logprobs_untruncated: bool

    # A backend may say `has_weight_copy = True`: it samples with a copy of its own, and needs the policy's weights in
    # `refresh` alone, where those that ranks have parted among them are gathered one at a time.

    def generate(self, requests: Sequence[Request], group_size: int, decoding: Decoding) -> list[list[Completion]]:
        """`group_size` completions of every prompt: N requests, N lists of G completions."""

    def refresh(self, version: int) -> None:
        """Take over the policy's weights as they are now; they have seen `version` updates."""

    def rest(self) -> None:
        """Give back what memory can be given back until `wake`: an update follows."""

    def wake(self) -> None:
        """Be ready to generate."""

    def close(self) -> None:
        """Release everything."""


def logprobs_match_policy(backend: object, decoding: Decoding) -> bool:
    """Whether a sampler's log-probabilities are of the distribution that the trainer scores.

    Args:
        backend: A `Rollout`, or its class.
        decoding: How completions are drawn.
    """
    restricted = decoding.top_k > 0 or decoding.top_p < 1
    return not restricted or getattr(backend, "logprobs_untruncated", True)


def check_logprobs_match(backend: object, decoding: Decoding, correction: str) -> None:
    """
    Args:
        backend: A `Rollout`, or its class.
        decoding: How completions are drawn.
        correction: `trainer.importance_correction`; it divides by the sampler's probabilities.

    Raises:
        UserError: They would be of another distribution.
    """
    if correction != "none" and not logprobs_match_policy(backend, decoding):
        raise UserError(
            f"trainer.importance_correction={correction} needs log-probabilities of the whole distribution, and the"
            " sampler of rollout.backend gives those of what top_k and top_p left (logprobs_untruncated=False); set"
            " rollout.top_k=0 rollout.top_p=1.0, or trainer.importance_correction=none"
        )


def check_agreement(mean: float, allowed: float) -> None:
    """
    Args:
        mean: Difference of a sampled token's log-probability between sampler and trainer, in nats.
        allowed: What rounding explains, see `common.training.agreement`.

    Raises:
        UserError: More than rounding: what is trained is not what was sampled.
    """
    if not mean <= allowed:
        raise UserError(
            f"sampler and trainer disagree: log-probabilities differ by {mean:.1e} nats on average (allowed:"
            f" {allowed:.0e}). Either the sampler has other weights, or it renders prompt or"
            " image in another way, or attends in another way (model.image_attention), or rounds more than this"
            " (model.dtype=float32). doctor=true examines it; trainer.importance_correction=sequence_mask corrects"
            " for rounding; rollout=hf samples with the trainer itself"
        )


def requests(encoder: Encoder, prompts: Sequence[Prompt], seeds: Sequence[str]) -> list[Request]:
    """Prompts as a sampler takes them.

    Args:
        encoder: Prompts to tensors.
        prompts: N of them.
        seeds: One per prompt.

    Raises:
        UserError: A prompt is longer than the encoder's limit.
    """
    encoded = encoder(prompts)
    return [
        Request(tensors, seed, partial(encoder.unexpanded, prompt), partial(encoder.pictures, prompt))
        for prompt, tensors, seed in zip(prompts, encoded, seeds, strict=True)
    ]


@contextmanager
def sampling_mode(rollout: Rollout, version: int) -> Iterator[None]:
    """Inside, the sampler is ready and has the policy's weights of now, which have seen `version` updates."""
    rollout.wake()
    rollout.refresh(version)
    try:
        yield
    finally:
        rollout.rest()


def check_fresh(groups: Sequence[Sequence[Completion]], version: int) -> None:
    """
    Raises:
        RuntimeError: A completion was sampled with other weights than those of now.
    """
    stale = {completion.version for group in groups for completion in group} - {version}
    if stale:
        raise RuntimeError(
            f"the sampler answered with the weights after {min(stale)} updates, but the policy has seen {version};"
            " its `refresh` must take over the weights, and its completions must carry that version"
        )
