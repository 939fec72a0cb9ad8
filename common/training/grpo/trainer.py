"""GRPO trainer: sample, score, compare within the group, update (arXiv 2402.03300; CLS-RL section 3.1)."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from common.config.schema import GRPO_ADVANTAGES, REPLACED, GRPOConfig
from common.forward.logprobs import PolicyScorer
from common.forward.packing import Packed, PromptGroup, pack, shared_tokens, within_budget
from common.models.encoder import EncodedPrompt, PromptEncoder
from common.models.vlm import VLM
from common.plugins import locate
from common.rewards import Reward, StatefulReward
from common.rollout.base import (
    Completion,
    Decoding,
    Request,
    Rollout,
    check_agreement,
    check_fresh,
    logprobs_match_policy,
    requests,
)
from common.runtime.distributed import gather, share_of, world
from common.training import agreement
from common.training.base import Epochs, Step, batch
from common.training.engine import Engine, EngineTrainer, zero_stage
from common.training.grpo.batch import (
    GAP,
    Measured,
    RolloutBatch,
    compare,
    compared,
    describe,
    rows,
    score_groups,
    without_differences,
)
from common.training.grpo.loss import LossInputs, importance_correction, token_weights
from common.types import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

# The completions of a rollout batch: now, or for the next batch in a thread while the update runs.
#
# A batch sampled ahead comes from weights that are one update old (`lag`). The importance correction then weights each
# token by the ratio of the current policy to the sampler (arXiv 2508.03772). Sampling ahead needs a sampler with its
# own copy of the weights.
#
# Shapes: n prompts of this rank, G completions each.


@dataclass(frozen=True)
class Sampled:
    """Encoded prompts of this rank with completions [n][G] by the weights after `version` updates.

    requests: those about the prompts' own images.
    resampled: number of times that a group was replaced because it had zero variance.
    """

    prompts: list[Prompt]
    requests: list[Request]
    completions: list[list[Completion]]
    version: int
    resampled: int = 0

    @property
    def encoded(self) -> list[EncodedPrompt]:
        return [request.encoded for request in self.requests]


class Sampling:
    """Chooses the prompts of a batch and samples their completions."""

    def __init__(
        self,
        encoder: PromptEncoder,
        rollout: Rollout,
        prompts: Epochs,
        rewards: dict[str, Reward],
        decoding: Decoding,
        config: GRPOConfig,
        seed: int,
        open_image: Callable[[str], Image] | None = None,
    ) -> None:
        """Arguments: see `GRPOTrainer`."""
        self.encoder, self.rollout, self.prompts, self.rewards = encoder, rollout, prompts, rewards
        self.decoding, self.config, self.seed, self.open_image = decoding, config, seed, open_image
        self.thread: ThreadPoolExecutor | None = None
        self.pending: tuple[int, Future[Sampled]] | None = None

    def __call__(self, number: int, version: int) -> Sampled:
        """Sample batch `number` with the current weights, which have seen `version` updates."""
        return self._complete(number, *self._ask(number), version)

    def begin(self, number: int, version: int) -> None:
        """Start sampling batch `number` in a thread; later updates of the policy do not affect it."""
        if self.thread is None:
            self.thread = ThreadPoolExecutor(1, "rollout")
        prompts, requests = self._ask(number)  # not in the thread: the encoder is not thread-safe
        self.pending = number, self.thread.submit(self._complete, number, prompts, requests, version)

    def take(self, number: int) -> Sampled | None:
        """Return batch `number` if it was begun. Wait for it, and raise the sampler's errors."""
        if self.pending is None:
            return None
        begun, future = self.pending
        self.pending = None
        assert begun == number, f"batch {begun} was begun, {number} is wanted"
        return future.result()

    def wait(self) -> None:
        """Wait until the sampler is free."""
        if self.pending is not None:
            wait([self.pending[1]])

    def close(self) -> None:
        """Wait for a batch that is no longer needed."""
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)

    def _ask(self, number: int) -> tuple[list[Prompt], list[list[Request]]]:
        chosen = batch(number, self.config.prompts_per_rollout, len(self.prompts), self.seed)
        prompts = share_of([self.prompts(epoch)[i] for epoch, i in chosen])
        # The seed of a prompt depends on its place in the whole batch, not on the rank: any number of ranks samples the
        # same.
        seeds = [f"rollout-{self.seed}-{number}-{each}" for each in share_of(list(range(len(chosen))))]
        return prompts, self._requests(prompts, seeds)

    def _requests(self, prompts: Sequence[Prompt], seeds: Sequence[str]) -> list[list[Request]]:
        """Return the requests of each prompt: about its own image, then about each of `Prompt.sampled_with`."""
        each = [
            (prompt.about(image), f"{seed}-with-{k}" if k else seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
            for k, image in enumerate((prompt.image, *prompt.sampled_with))
        ]
        made = requests(self.encoder, [prompt for prompt, _ in each], [seed for _, seed in each])
        return groups_of(made, 1 + len(prompts[0].sampled_with))

    def _generate(self, asked: Sequence[Sequence[Request]]) -> list[list[Completion]]:
        """Sample a group for each prompt, the same number of completions for each of its requests."""
        parts = len(asked[0])
        found = self.rollout.generate(
            [one for each in asked for one in each], self.config.group_size // parts, self.decoding
        )
        return [[one for part in each for one in part] for each in groups_of(found, parts)]

    def _complete(self, number: int, prompts: list[Prompt], asked: list[list[Request]], version: int) -> Sampled:
        """Sample completions, then replace zero-variance groups if configured, in at most `resample_rounds` rounds.

        `zero_variance: resample` samples them again for the same prompt, `refill` for another prompt.
        """
        size, again, prompts, now = self.config.group_size, 0, list(prompts), list(asked)
        completions = self._generate(asked)
        for attempt in range(self.config.resample_rounds if self.config.zero_variance in REPLACED else 0):
            scores = score_groups(prompts, completions, self.rewards, self.open_image)
            zero_variance = without_differences(compared(scores, self.config.zero_variance_by), size)
            if not zero_variance:
                break
            if self.config.zero_variance == "refill":
                others = self._others(number, attempt)
                for i in zero_variance:
                    prompts[i] = others[i]
                seeds = [f"{asked[i][0].seed}-again-{attempt}" for i in zero_variance]
                once_more = self._requests([prompts[i] for i in zero_variance], seeds)
            else:
                once_more = [
                    [replace(one, seed=f"{one.seed}-again-{attempt}") for one in asked[i]] for i in zero_variance
                ]
            fresh = self._generate(once_more)
            again += len(zero_variance)
            for i, request, group in zip(zero_variance, once_more, fresh, strict=True):
                now[i], completions[i] = request, group
        check_fresh(completions, version)
        return Sampled(prompts, [each[0] for each in now], completions, version, again)

    def _others(self, number: int, attempt: int) -> list[Prompt]:
        """Return another prompt for each place of this rank in batch `number`.

        They follow from the number, so a resumed run asks the same. A batch has no prompt twice while there are others.
        """
        chosen = batch(number, self.config.prompts_per_rollout, len(self.prompts), self.seed)
        rest = sorted(set(range(len(self.prompts))) - {i for _, i in chosen}) or list(range(len(self.prompts)))
        random.Random(f"refill-{self.seed}-{number}").shuffle(rest)
        places = [(epoch, rest[(attempt * len(chosen) + k) % len(rest)]) for k, (epoch, _) in enumerate(chosen)]
        return share_of([self.prompts(epoch)[i] for epoch, i in places])


def about_others(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Return the prompts about the first image that they are scored with, then about the second, ...: K lists of n."""
    return [list(each) for each in zip(*([p.about(image) for image in p.scored_with] for p in prompts), strict=True)]


T = TypeVar("T")


def groups_of(values: Sequence[T], size: int) -> list[list[T]]:
    """Return consecutive parts of that size.

    >>> groups_of([1, 2, 3, 4], 2)
    [[1, 2], [3, 4]]
    """
    return [list(values[start : start + size]) for start in range(0, len(values), size)]


# The trainer. With `num_iterations: 1` and `steps_per_rollout: 1` (both papers) every rollout batch is used for one
# update: the sampling policy is the current one, the ratio is 1 up to rounding, and clipping has no effect. With more
# iterations, the log-probabilities of the first update serve as the old policy's in the following ones, without another
# forward. With more steps, each update takes the next part of the batch; those of the later parts are computed before
# the first update, while the policy is still the one that sampled.
#
# Shapes: n prompts of this rank, G completions each, T tokens, S = n G completions.


class GRPOTrainer(EngineTrainer):
    """Trainer whose `step` makes one update. Change no weights once it is built: DeepSpeed owns the parameters."""

    def __init__(
        self,
        *,
        vlm: VLM,
        encoder: PromptEncoder,
        rollout: Rollout,
        prompts: Epochs,
        rewards: dict[str, Reward],
        decoding: Decoding,
        config: GRPOConfig,
        deepspeed: dict[str, Any],
        updates: int,
        seed: int,
        resume: Path | None = None,
        done: int = 0,
        overlap: bool = False,
        open_image: Callable[[str], Image] | None = None,
    ) -> None:
        """`resume`: folder of an engine's state, written after `done` updates. `overlap`: see `Sampling`. `open_image`:
        from an image's key to its picture, for rewards that look at it.
        """
        self.vlm, self.rollout, self.prompts = vlm, rollout, prompts
        self.version, self.overlap, self.updates = done, overlap, updates
        self.samples = Sampling(encoder, rollout, prompts, rewards, decoding, config, seed, open_image)
        self.rewards, self.config, self.seed, self.open_image = rewards, config, seed, open_image
        loss, advantages = locate(config.loss, "trainer.loss"), locate(config.advantages, "trainer.advantages")
        self.loss = partial(loss, config=config, **config.loss_options)
        self.advantages = partial(advantages, config=config, **config.advantages_options)
        # a function of one's own may make advantages of each reward
        self.by_sum = (config.advantages, config.multi_objective_aggregation) == (GRPO_ADVANTAGES, "sum_then_normalize")
        scorer = PolicyScorer(vlm, decoding.temperature, config.head_chunk).to(vlm.device)
        self.adapters = hasattr(vlm.model, "disable_adapter")
        # Reference policy: in full fine-tuning a frozen copy outside the engine. With adapters it is the base model,
        # but embeddings that a method added (extra) are trained in place, so their initial rows are kept.
        if self.adapters and config.beta > 0 and vlm.extra_embeddings is not None:
            vlm.extra_embeddings.remember()
        self.frozen = None if self.adapters or config.beta == 0 else copy.deepcopy(scorer).eval().requires_grad_(False)
        scorer.in_step = zero_stage(deepspeed) == 3
        self.engine = Engine(scorer, config, deepspeed, updates, resume)
        self._counts()  # reset: counts of the doctor's examination are not the training's
        self.tokens = 0.0
        self.scorer, self.checked, self.allowed_gap = scorer, not config.self_check, math.inf
        self.logprobs_match = logprobs_match_policy(rollout, decoding)
        self.agreed = not config.self_check or not self.logprobs_match or config.importance_correction != "none"
        self.current: RolloutBatch

    @contextmanager
    def sampling(self, sampler_only: bool = False) -> Iterator[None]:
        self.samples.wait()
        with super().sampling(sampler_only):
            yield

    def close(self) -> None:
        self.samples.close()
        super().close()

    def step(self, update: int) -> Step:
        """Make one update. Return metrics under TRL's names, seconds per phase, and the completions as rows."""
        seconds, clock = {}, time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            seconds[phase], clock = now - clock, now

        # `number`: rollout batch; `iteration`: times that it was gone through; `which`: step that takes a part of it
        number, done = divmod(update, self.config.updates_per_rollout)
        iteration, which = divmod(done, self.config.steps_per_rollout)
        metrics: dict[str, float] = {}
        counts: dict[str, float] = {}
        # 1. Roll out a new batch, unless it was sampled ahead, and compute its rewards and advantages.
        if done == 0:
            ahead = self.samples.take(number)
            with self.sampling(sampler_only=not self._others_ask()):
                sampled = ahead or self.samples(number, self.version)
                lap("rollout")
                self.current = self._score(number, sampled)
                # Begin the next batch while the sampler is awake with weights that are current now.
                if self.overlap and update + 1 < self.updates:
                    self.samples.begin(number + 1, self.version)
            metrics |= describe(self.current)
            self.tokens += metrics.pop("tokens")
            counts = self._counts()
            lap("reward")
            # 2. Before the first update: check that all forwards agree on this batch.
            if not self.checked:
                self._self_check(sampled.requests[0], self.current.groups[0])
            self._remember_old()
            self._remember_others()
        # 3. Update the policy.
        metrics |= self._update(update, self._groups_of(which), first=iteration == 0)
        self.version = update + 1
        lap("update")
        metrics["num_tokens"] = self.tokens
        metrics["epoch"] = (number + 1) * self.config.prompts_per_rollout / len(self.prompts)
        return Step(metrics, seconds, rows(update + 1, self.current) if done == 0 else [], counts)

    def _groups_of(self, step: int) -> range:
        """Return the groups of this rank that a step takes of the rollout batch: every rank the same number."""
        size = len(self.current.groups) // self.config.steps_per_rollout
        return range(step * size, (step + 1) * size)

    def _remember_old(self) -> None:
        """Keep the log-probabilities of all groups but those of the first update, whose own forward gives them.

        They are about the image that is trained about, for completions that were sampled about another one, too.
        """
        later = [i for step in range(1, self.config.steps_per_rollout) for i in self._groups_of(step)]
        self.current.old_logps.update(self._logps(self.current.groups, later))

    def _remember_others(self) -> None:
        """Keep the log-probabilities about the images of `Prompt.scored_with`, by the weights that sampled."""
        rollouts, everything = self.current, range(len(self.current.groups))
        found = [self._logps(groups, everything) for groups in rollouts.others]
        for i in found[0] if found else ():
            rollouts.other_logps[i] = torch.stack([logps[i] for logps in found])

    @torch.no_grad()
    def _logps(self, groups: Sequence[PromptGroup], taken: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return the log-probabilities of some groups by the weights of now, without gradient. Shape of each: [T]."""
        parts = self._parts(taken)
        found: dict[int, torch.Tensor] = {}
        for number in range(max(gather(len(parts)))):  # ranks gather weights together: all make as many forwards
            part = parts[number] if number < len(parts) else [0]
            scored = [groups[i] for i in part]
            logps = self.engine(self._pack(scored), False)[0]
            if number < len(parts):
                counts = [sum(len(c) for c in group.completions) for group in scored]
                found.update(zip(part, logps.split(counts), strict=True))
        return found

    def _others_ask(self) -> bool:
        """Return whether more than the sampler needs the model: image features may be missing, a judge may use it."""
        judges = (r.function for r in self.rewards.values() if isinstance(r.function, StatefulReward))
        return self.samples.encoder.store is not None or any(judge.needs_base for judge in judges)

    def _score(self, number: int, sampled: Sampled) -> RolloutBatch:
        scores, advantages = compare(
            score_groups(sampled.prompts, sampled.completions, self.rewards, self.open_image),
            {name: reward.weight for name, reward in self.rewards.items()},
            self.config.group_size,
            self.advantages,
            self.seed * 1_000_003 + number if self.config.shuffle_rewards else None,
        )
        pairs = zip(sampled.encoded, sampled.completions, strict=True)
        groups = [PromptGroup(encoded, tuple(c.ids for c in group)) for encoded, group in pairs]
        lag = self.version - sampled.version
        others = [
            [PromptGroup(encoded, group.completions) for encoded, group in zip(each, groups, strict=True)]
            for each in map(self.samples.encoder, about_others(sampled.prompts))
        ]
        return RolloutBatch(
            sampled.prompts,
            groups,
            sampled.completions,
            scores,
            advantages,
            sampled.resampled,
            lag,
            others=others,
        )

    def _counts(self) -> dict[str, float]:
        """Return the counts of stateful rewards since the last call, summed over all ranks."""
        own: dict[str, float] = {}
        for reward in self.rewards.values():
            if isinstance(reward.function, StatefulReward):
                own |= reward.function.metrics()
        ranks = gather(own)
        return {name: sum(counts[name] for counts in ranks) for name in own}

    def _update(self, update: int, taken: range, first: bool) -> dict[str, float]:
        """Compute the gradients of some groups, then make the optimizer step.

        Args:
            update: Number of the update.
            taken: Groups of the update.
            first: Whether they are used for the first time.
        """
        rollouts, weights, parts = self.current, self._weights(taken), self._parts(taken)
        # Ranks reduce gradients together, so all must make the same number of backward passes, even one with fewer
        # groups (zero-variance groups skipped, or longer completions and thus more parts elsewhere).
        forwards = max(1, max(gather(len(parts))))
        measured = Measured()
        for number in range(forwards):
            part = parts[number] if number < len(parts) else []
            indices = part or [0]  # no part left: a dummy forward whose weights are all 0
            groups = [rollouts.groups[i] for i in indices]
            packed = self._pack(groups)
            logps, entropy = self.engine(packed)
            inputs = self._loss_inputs(indices, weights[indices] * bool(part), packed, logps, first)
            outputs = self.loss(inputs)
            # DeepSpeed averages gradients over ranks, the loss is a sum over them
            self.engine.backward(outputs.loss * world(), last=number + 1 == forwards)
            if part:
                gap = inputs.old_logps - rollouts.sampled_logps(indices).to(logps) if self.logprobs_match else None
                alike = rollouts.alike(indices).to(packed.owner.device)[packed.owner]
                measured.add(inputs, outputs, entropy, gap, alike, first)
                measured.tokens(sum(len(g.prompt.ids) + len(c) for g in groups for c in g.completions), packed.tokens)
        metrics = measured.over_ranks()
        # In the first update compare with the sampler's own log-probabilities; a larger gap than rounding is an error.
        if not self.agreed and f"{GAP}/mean" in metrics:
            check_agreement(metrics[f"{GAP}/mean"], self.allowed_gap)
            self.agreed = True
        return {**metrics, **self.engine.step(update)}

    def _weights(self, taken: range) -> torch.Tensor:
        """Return the weight of a token of each completion in an update on some groups, 0 elsewhere. Shape: [n, G]."""
        config = self.config
        lengths = self.current.lengths(config.mask_truncated_completions).view(-1, config.group_size)
        lengths = lengths[taken.start : taken.stop].flatten()
        weights = torch.zeros(len(self.current.groups), config.group_size, dtype=torch.float64)
        weights[taken.start : taken.stop] = token_weights(
            config.loss_type,
            lengths,
            config.group_size,
            completions=config.prompts_per_update * config.group_size,
            tokens=sum(gather(int(lengths.sum()))),
            max_tokens=self.samples.decoding.max_tokens,
        ).view(-1, config.group_size)
        return weights

    def _parts(self, taken: Sequence[int]) -> list[list[int]]:
        """Divide groups among forwards, within the token budget; without zero-variance groups if configured."""
        config, rollouts = self.config, self.current
        skipped = set()
        if config.zero_variance == "skip":
            skipped = rollouts.zero_variance_groups(self.by_sum, config.zero_variance_by)
        live = [i for i in taken if i not in skipped]
        sizes = [shared_tokens(group) for group in rollouts.groups]
        return within_budget(live, sizes.__getitem__, config.tokens_per_forward, config.prompts_per_forward)

    def _loss_inputs(
        self, indices: list[int], weights: torch.Tensor, packed: Packed, logps: torch.Tensor, first: bool
    ) -> LossInputs:
        old, reference = self._earlier_logps(indices, packed, logps, first)
        correction, mode = None, self.config.importance_correction
        if mode != "none":
            sampled = self.current.sampled_logps(indices).to(logps)
            bounds = self.config.importance_cap, self.config.importance_floor
            correction = importance_correction(old, sampled, packed.owner, packed.completions, mode, *bounds)
        return LossInputs(
            logps=logps,
            old_logps=old,
            ref_logps=reference,
            advantages=self.current.advantages[indices].flatten().to(logps),
            weights=weights.flatten().to(logps.device),
            owner=packed.owner,
            correction=correction,
            other_logps=self._other_logps(indices, logps),
        )

    def _other_logps(self, indices: Sequence[int], logps: torch.Tensor) -> torch.Tensor | None:
        """Return the stored log-probabilities about other images, if there are any. Shape: [K, T]."""
        rollouts = self.current
        if not rollouts.others:
            return None
        if not all(i in rollouts.other_logps for i in indices):  # a dummy forward, whose weights are all 0
            return logps.detach().expand(len(rollouts.others), -1)
        return torch.cat([rollouts.other_logps[i] for i in indices], 1)

    def _pack(self, groups: Sequence[PromptGroup]) -> Packed:
        return pack(groups, self.vlm.family, self.vlm.pad, self.vlm.device, self.config.impl)

    def _earlier_logps(
        self, indices: list[int], packed: Packed, logps: torch.Tensor, first: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return log-probabilities by the old and the reference policy: the stored ones, or those of now.

        In the first update on a batch the policy's own log-probabilities serve as the old ones, so the ratio is 1.
        """
        rollouts, penalised = self.current, self.config.beta > 0
        stored, referred = (
            all(i in known for i in indices) for known in (rollouts.old_logps, rollouts.reference_logps)
        )
        old = torch.cat([rollouts.old_logps[i] for i in indices]) if stored else logps.detach()
        reference = None
        if penalised:
            if not first and not stored:  # a dummy forward, whose weights are all 0
                reference = old
            elif referred:
                reference = torch.cat([rollouts.reference_logps[i] for i in indices])
            else:
                reference = self._reference_logps(packed)
        if self.config.num_iterations > 1 and first:
            counts = [sum(len(c) for c in rollouts.groups[i].completions) for i in indices]
            rollouts.old_logps.update(zip(indices, old.split(counts), strict=True))
            if reference is not None:
                rollouts.reference_logps.update(zip(indices, reference.split(counts), strict=True))
        return old, reference

    @torch.no_grad()
    def _reference_logps(self, packed: Packed) -> torch.Tensor:
        if self.frozen is not None:
            return self.frozen(packed, False)[0]
        # With adapters: the same engine without adapters, and with the initial rows of added embeddings.
        extra = self.vlm.extra_embeddings
        with self.vlm.model.disable_adapter(), nullcontext() if extra is None else extra.as_begun():
            return self.engine(packed, False)[0]

    def _self_check(self, request: Request, group: PromptGroup) -> None:
        """Raise if sampler, shared-prefix and plain forward disagree on real data."""
        sampler = None if getattr(self.rollout, "has_weight_copy", False) else self.rollout
        with self.engine.whole_weights():
            found = agreement.measure(self.scorer, self.vlm, group, sampler, request, self.samples.decoding)
        if self.config.impl != "plain" and not found.forwards_agree:
            raise RuntimeError(
                f"the shared-prefix forward differs from the plain one by {found.shared:.2g} nats in exact arithmetic"
                f" (allowed: {found.allowed:.0e}); train with trainer.impl=plain and report this model"
            )
        if self.config.impl != "plain" and not found.gradients_agree:
            raise RuntimeError(
                f"merged attention or its gradient has a relative error of {found.merged:.2g} on this device, with"
                f" copies it is {found.copied:.2g}; train with model.attention=copy and report this device"
            )
        if not self.agreed and found.replay is not None:
            check_agreement(found.replay, found.allowed)
        self.allowed_gap = max(gather(found.allowed_of_sampler))  # the same on all ranks, which stop together
        self.checked = True
