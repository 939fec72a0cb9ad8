"""The completions of a rollout batch: now, or for the next batch in a thread while the update runs.

Sampled ahead, a batch is of the weights before the update that it waits for: one update old (`lag`). The importance
correction then weighs each token by the policy of now against the sampler (arXiv 2508.03772), and a group of the very
policy costs nothing but waiting. Sampling ahead needs a sampler with weights of its own.

Shapes: n prompts of this rank, G completions each.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

from common.config.schema import GRPOConfig
from common.models.encoder import Encoded, Encoder
from common.rewards import Reward
from common.rollout.base import Completion, Decoding, Request, Rollout, check_fresh, finish, requests
from common.runtime.distributed import share_of
from common.training.grpo.batch import score_groups, without_differences
from common.training.schedule import Epochs, batch
from common.types import Prompt


@dataclass(frozen=True)
class Sampled:
    """This rank's prompts, encoded, with their completions [n][G] by the weights after `version` updates.

    resampled: groups that were drawn again because they had no differences.
    """

    prompts: list[Prompt]
    requests: list[Request]
    completions: list[list[Completion]]
    version: int
    resampled: int = 0

    @property
    def encoded(self) -> list[Encoded]:
        return [request.encoded for request in self.requests]


class Sampling:
    """Which prompts a batch has, and what the sampler says to them."""

    def __init__(
        self,
        encoder: Encoder,
        rollout: Rollout,
        prompts: Epochs,
        rewards: dict[str, Reward],
        decoding: Decoding,
        config: GRPOConfig,
        seed: int,
    ) -> None:
        """As for `GRPOTrainer`."""
        self.encoder, self.rollout, self.prompts, self.rewards = encoder, rollout, prompts, rewards
        self.decoding, self.config, self.seed = decoding, config, seed
        self.thread: ThreadPoolExecutor | None = None
        self.pending: tuple[int, Future[Sampled]] | None = None

    def __call__(self, number: int, version: int) -> Sampled:
        """Batch `number` by the weights of now, which have seen `version` updates."""
        return self._complete(*self._ask(number), version)

    def begin(self, number: int, version: int) -> None:
        """Start on batch `number`; the sampler keeps the weights that it has, whatever becomes of the policy's."""
        if self.thread is None:
            self.thread = ThreadPoolExecutor(1, "rollout")
        prompts, asked = self._ask(number)  # here: an encoder is not made for two
        self.pending = number, self.thread.submit(self._complete, prompts, asked, version)

    def take(self, number: int) -> Sampled | None:
        """Batch `number` if it was begun. Waits for it, and raises what the sampler raised."""
        if self.pending is None:
            return None
        begun, future = self.pending
        self.pending = None
        assert begun == number, f"batch {begun} was begun, {number} is wanted"
        return future.result()

    def settle(self) -> None:
        """Wait until the sampler is free for something else."""
        if self.pending is not None:
            wait([self.pending[1]])

    def close(self) -> None:
        """Let a batch that nobody will take end."""
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)

    def _ask(self, number: int) -> tuple[list[Prompt], list[Request]]:
        chosen = batch(number, self.config.prompts_per_update, len(self.prompts), self.seed)
        prompts = share_of([self.prompts(epoch)[i] for epoch, i in chosen])
        seeds = [f"rollout-{self.seed}-{number}-{each}" for each in share_of(list(range(len(chosen))))]
        return prompts, requests(self.encoder, prompts, seeds)

    def _complete(self, prompts: list[Prompt], asked: Sequence[Request], version: int) -> Sampled:
        """Groups without differences are drawn again if the config says so."""
        size, again = self.config.group_size, 0
        completions = self.rollout.generate(asked, size, self.decoding)
        for attempt in range(self.config.resample_rounds if self.config.zero_variance == "resample" else 0):
            flat = without_differences(score_groups(prompts, completions, self.rewards).total, size)
            if not flat:
                break
            once_more = [replace(asked[i], seed=f"{asked[i].seed}-again-{attempt}") for i in flat]
            fresh = self.rollout.generate(once_more, size, self.decoding)
            again += len(flat)
            for i, group in zip(flat, fresh, strict=True):
                completions[i] = group
        finish(self.rollout)
        check_fresh(completions, version)
        return Sampled(prompts, list(asked), completions, version, again)
