"""Interface of samplers, as trainer and evaluation use them, and checks of their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from common.counted import counted
from common.models.encoder import EncodedPrompt, PromptEncoder
from common.types import Prompt, UserError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Request:
    """One prompt to complete, in both forms that samplers take.

    A sampler on the training model uses `encoded`. vLLM processes images itself: it takes `unexpanded`, the ids
    with a single placeholder for every image, and the `pictures` at the model's size. These two are functions, so
    that an unused form costs nothing. Equal seeds (and weights) give equal completions.
    """

    encoded: EncodedPrompt
    seed: str
    unexpanded: Callable[[], torch.Tensor]  # [U]
    pictures: Callable[[], list[Image]]


@dataclass(frozen=True)
class Completion:
    """One sampled completion. ids, logps: [R]; ids end with an end-of-sequence id unless `truncated`.

    `logps` are natural logarithms at the sampling temperature without the banned ids, as in the trainer's scoring
    pass. `Rollout.logprobs_untruncated` tells whether they belong to the full distribution or to what top_k and
    top_p left. `version` is the number of updates of the weights that it was sampled with.
    """

    ids: torch.Tensor
    logps: torch.Tensor
    text: str
    truncated: bool
    version: int = 0


@dataclass(frozen=True)
class Decoding:
    """Sampling parameters; temperature 0 is greedy. A model's generation config has no influence."""

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
    """Sampling backend: `rollout.backend` names a class `(vlm, **rollout.options)`."""

    # whether log-probabilities are those of the full distribution although top_k and top_p restrict sampling
    logprobs_untruncated: bool

    # Optional `has_weight_copy = True`: the backend samples with its own copy of the weights and reads the policy's
    # only in `refresh`, where ZeRO-3 shards are gathered one tensor at a time.

    def generate(self, requests: Sequence[Request], group_size: int, decoding: Decoding) -> list[list[Completion]]:
        """Sample `group_size` completions of every prompt: N requests, N lists of G completions."""

    def refresh(self, version: int) -> None:
        """Take over the current weights of the policy, which have had `version` updates."""

    def rest(self) -> None:
        """Free memory until `wake`, because an update follows."""

    def wake(self) -> None:
        """Prepare for `generate` after `rest`."""

    def close(self) -> None:
        """Release everything."""


def logprobs_match_policy(backend: object, decoding: Decoding) -> bool:
    """Return whether a sampler's log-probabilities belong to the distribution that the trainer scores.

    Args:
        backend: A `Rollout`, or its class.
        decoding: Sampling parameters.
    """
    restricted = decoding.top_k > 0 or decoding.top_p < 1
    return not restricted or getattr(backend, "logprobs_untruncated", True)


def check_logprobs_match(backend: object, decoding: Decoding, correction: str) -> None:
    """Check that importance correction gets log-probabilities of the full distribution.

    Args:
        backend: A `Rollout`, or its class.
        decoding: Sampling parameters.
        correction: `trainer.importance_correction`; it divides by the sampler's probabilities.

    Raises:
        UserError: They would belong to another distribution.
    """
    if correction != "none" and not logprobs_match_policy(backend, decoding):
        raise UserError(
            f"trainer.importance_correction={correction} needs log-probabilities of the whole distribution, and the"
            " sampler of rollout.backend gives those of what top_k and top_p left (logprobs_untruncated=False); set"
            " rollout.top_k=0 rollout.top_p=1.0, or trainer.importance_correction=none"
        )


def check_agreement(mean: float, allowed: float) -> None:
    """Check that sampler and trainer agree on log-probabilities up to rounding.

    Args:
        mean: Mean difference of a sampled token's log-probability between sampler and trainer, in nats.
        allowed: Largest difference that rounding explains, see `common.training.agreement`.

    Raises:
        UserError: The difference is larger: the trainer scores another policy than the sampler's.
    """
    if not mean <= allowed:  # so written, NaN is an error, too
        raise UserError(
            f"sampler and trainer disagree: log-probabilities differ by {mean:.1e} nats on average (allowed:"
            f" {allowed:.0e}). Either the sampler has other weights, or it renders prompt or"
            " image in another way, or attends in another way (model.image_attention), or rounds more than this"
            " (model.dtype=float32). doctor=true examines it; trainer.importance_correction=sequence_mask corrects"
            " for rounding; rollout=hf samples with the trainer itself"
        )


def requests(encoder: PromptEncoder, prompts: Sequence[Prompt], seeds: Sequence[str]) -> list[Request]:
    """Return prompts as requests to a sampler.

    Args:
        encoder: Encoder of prompts.
        prompts: Prompts. Length: N.
        seeds: Seed of each prompt. Length: N.

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
    """Keep the sampler ready, with the current weights of the policy, which have had `version` updates."""
    rollout.wake()
    rollout.refresh(version)
    try:
        yield
    finally:
        rollout.rest()


def check_fresh(groups: Sequence[Sequence[Completion]], version: int) -> None:
    """Check that completions were sampled with the current weights.

    Raises:
        RuntimeError: A completion was sampled with other weights.
    """
    stale = {completion.version for group in groups for completion in group} - {version}
    if stale:
        raise RuntimeError(
            f"the sampler answered with the weights after {min(stale)} updates, but the policy has seen {version};"
            " its `refresh` must take over the weights, and its completions must carry that version"
        )
