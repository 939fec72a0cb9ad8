"""GRPO: roll out, score, compare within the group, and step (arXiv 2402.03300; CLS-RL section 3.1).

On-policy: every rollout batch is used for one update, so the sampling policy is the current one and the ratio is 1 up
to rounding; clipping then has no effect, as in the authors' code.

Shapes: N prompts of an update, G completions each, T tokens, S = N G completions.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from common.distributed import gather, share_of, world
from common.engine import Engine, micro_batches
from common.grpo.advantages import group_advantages
from common.grpo.logprobs import PolicyScorer
from common.grpo.loss import LossInputs, grpo_loss
from common.grpo.packing import Group, Packed, pack_plain, pack_shared
from common.models.vlm import VLM, Encoder
from common.rewards import Reward, Scores, score
from common.rollout.base import Completion, Decoding, Rollout
from common.schedule import batch
from common.schema import GRPO
from common.types import Prompt, Sample, Step

# Mean difference of a log-probability between the shared and the plain forward that rounding explains, by dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class RolloutBatch:
    """This rank's completions of one update with their scores and advantages [N, G]."""

    prompts: list[Prompt]
    groups: list[Group]
    completions: list[list[Completion]]
    scores: Scores
    advantages: torch.Tensor


class GRPOTrainer:
    """One `step` per update. Construct it before the weights are touched again: DeepSpeed takes over the parameters."""

    def __init__(
        self,
        *,
        vlm: VLM,
        encoder: Encoder,
        rollout: Rollout,
        prompts: Sequence[Prompt],
        rewards: dict[str, Reward],
        decoding: Decoding,
        config: GRPO,
        deepspeed: dict[str, Any],
        updates: int,
        seed: int,
    ) -> None:
        self.vlm, self.encoder, self.rollout, self.prompts = vlm, encoder, rollout, list(prompts)
        self.rewards, self.decoding, self.config, self.seed = rewards, decoding, config, seed
        scorer = PolicyScorer(vlm.model, vlm.banned, decoding.temperature, config.head_chunk).to(vlm.device)
        self.adapters = hasattr(vlm.model, "disable_adapter")
        self.reference = None
        if config.beta > 0:
            self.reference = scorer if self.adapters else copy.deepcopy(scorer).eval().requires_grad_(False)
        self.engine = Engine(scorer, config, deepspeed, updates)
        self.tokens = 0.0
        self.checked = not config.self_check or config.impl == "plain"

    def step(self, update: int) -> Step:
        """One update: metrics under TRL's names, seconds per phase, and the completions as rows."""
        seconds, clock = {}, time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            seconds[phase], clock = now - clock, now

        chosen = batch(update, self.config.prompts_per_update, len(self.prompts), self.seed)
        prompts = share_of([self.prompts[i] for i in chosen])
        encoded = self.encoder(prompts)
        seeds = [f"rollout-{self.seed}-{update}-{place}" for place in share_of(list(range(len(chosen))))]
        completions = self.rollout.generate(encoded, self.config.group_size, self.decoding, seeds)
        lap("rollout")
        rollouts = self._score(update, prompts, encoded, completions)
        lap("reward")
        if not self.checked:
            self._self_check(rollouts.groups[0])
        metrics = self._update(update, rollouts)
        lap("update")
        metrics |= describe(rollouts)
        self.tokens += metrics.pop("tokens")
        metrics["num_tokens"] = self.tokens
        metrics["epoch"] = (update + 1) * self.config.prompts_per_update / len(self.prompts)
        return Step(metrics, seconds, [row for part in gather(_rows(update, rollouts)) for row in part])

    def _score(
        self, update: int, prompts: list[Prompt], encoded: list[Any], completions: list[list[Completion]]
    ) -> RolloutBatch:
        samples = [Sample(p, c.text) for p, group in zip(prompts, completions, strict=True) for c in group]
        scores = score(samples, self.rewards)
        total = torch.tensor(scores.total)
        if self.config.shuffle_rewards:
            mixer = torch.Generator().manual_seed(self.seed * 1_000_003 + update)
            total = total[torch.randperm(len(total), generator=mixer)]
        advantages = group_advantages(total.view(-1, self.config.group_size))
        groups = [Group(e, tuple(c.ids for c in group)) for e, group in zip(encoded, completions, strict=True)]
        return RolloutBatch(prompts, groups, completions, scores, advantages)

    def _update(self, update: int, rollouts: RolloutBatch) -> dict[str, float]:
        """Gradients of all groups, then the optimiser step. Metrics are means over the tokens that were scored."""
        sampled = [torch.cat([c.logps for c in group]) for group in rollouts.completions]
        live = list(range(len(rollouts.groups)))
        if self.reference is None:
            # a group without differences has a zero gradient; without KL nothing else would come of it
            live = [i for i in live if rollouts.advantages[i].any()]
        parts = list(micro_batches(live, self.config.prompts_per_forward))
        # gradients are reduced across ranks in every backward, so all ranks must make the same number of them
        forwards = max(1, max(gather(len(parts))))
        sums: dict[str, float] = {}
        for number in range(forwards):
            part = parts[number] if number < len(parts) else []
            shown = part or [0]
            packed = self._pack([rollouts.groups[i] for i in shown])
            logps, entropy = self.engine(packed)
            advantages = rollouts.advantages[shown] * (1.0 if part else 0.0)
            inputs = LossInputs(
                logps=logps,
                old_logps=logps.detach(),
                ref_logps=self._reference_logps(packed),
                advantages=advantages.flatten().to(logps),
                owner=packed.owner,
                completions=self.config.prompts_per_update * self.config.group_size,
            )
            # DeepSpeed averages gradients over ranks, the loss is a sum over them
            outputs = grpo_loss(inputs, self.config.epsilon, self.config.beta if part else 0.0)
            self.engine.backward(outputs.loss * world(), last=number + 1 == forwards)
            if part:
                gap = (logps.detach().float().cpu() - torch.cat([sampled[i] for i in part])).abs()
                found = {
                    **outputs.metrics,
                    "loss": float(outputs.loss.detach()),
                    "entropy": float(entropy.sum()),
                    "gap": float(gap.sum()),
                }
                largest = max(sums.get("gap_max", 0.0), float(gap.max()))
                sums = {key: sums.get(key, 0.0) + value for key, value in found.items()} | {"gap_max": largest}
        return {**_token_means(gather(sums)), **self.engine.step(update)}

    def _pack(self, groups: Sequence[Group]) -> Packed:
        if self.config.impl == "plain":
            return pack_plain(groups, self.vlm.family, self.vlm.pad, self.vlm.device)
        return pack_shared(groups, self.vlm.family, self.vlm.device)

    @torch.no_grad()
    def _reference_logps(self, packed: Packed) -> torch.Tensor | None:
        if self.reference is None:
            return None
        off = self.vlm.model.disable_adapter() if self.adapters else nullcontext()
        with off:
            return self.reference(packed)[0]

    @torch.no_grad()
    def _self_check(self, group: Group) -> None:
        """Refuse to train if the shared forward and the plain one disagree on real data."""
        shared, _ = self.engine(pack_shared([group], self.vlm.family, self.vlm.device))
        plain, _ = self.engine(pack_plain([group], self.vlm.family, self.vlm.pad, self.vlm.device))
        difference = float((shared - plain).abs().mean())
        allowed = TOLERANCE[self.vlm.model.dtype]
        if not difference <= allowed:
            raise RuntimeError(
                f"the shared-prefix forward differs from the plain one by {difference:.2g} nats (allowed:"
                f" {allowed:.0e}); train with trainer.impl=plain and report this model"
            )
        self.checked = True

    def close(self) -> None:
        self.engine.close()


def _token_means(parts: list[dict[str, float]]) -> dict[str, float]:
    """Per-token means over all ranks, under TRL's names."""
    total = {key: sum(part.get(key, 0.0) for part in parts) for key in {key for part in parts for key in part}}
    tokens = total.get("tokens", 0.0) or 1.0
    scored = [part for part in parts if part]  # a rank may have had no group to learn from
    low, high = total.get("clip_low", 0.0) / tokens, total.get("clip_high", 0.0) / tokens
    metrics = {
        "loss": total.get("loss", 0.0),
        "entropy": total.get("entropy", 0.0) / tokens,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/low_min": min(part["clip_low"] / part["tokens"] for part in scored) if scored else 0.0,
        "clip_ratio/high_max": max(part["clip_high"] / part["tokens"] for part in scored) if scored else 0.0,
        "clip_ratio/region_mean": low + high,
        "sampling/sampling_logp_difference/mean": total.get("gap", 0.0) / tokens,
        "sampling/sampling_logp_difference/max": max(part.get("gap_max", 0.0) for part in parts),
    }
    if "kl" in total:
        metrics["kl"] = total["kl"] / tokens
    return metrics


def describe(rollouts: RolloutBatch) -> dict[str, float]:
    """Rewards and lengths of the update over all ranks, under TRL's names."""
    size = rollouts.advantages.shape[1]
    mine: dict[str, list[Any]] = {
        "total": rollouts.scores.total,
        "lengths": [len(c.ids) for group in rollouts.completions for c in group],
        "truncated": [c.truncated for group in rollouts.completions for c in group],
        "prompt_tokens": [len(group.prompt.ids) * size for group in rollouts.groups],
        **{f"rewards/{name}": values for name, values in rollouts.scores.parts.items()},
    }
    ranks = gather(mine)
    joined = {key: [value for part in ranks for value in part[key]] for key in mine}
    groups = [joined["total"][i : i + size] for i in range(0, len(joined["total"]), size)]
    spreads = [statistics.stdev(group) for group in groups]
    lengths = joined["lengths"]
    ended = [n for n, cut in zip(lengths, joined["truncated"], strict=True) if not cut] or [0]
    metrics = {
        "reward": statistics.fmean(joined["total"]),
        "reward_std": statistics.fmean(spreads),
        "frac_reward_zero_std": statistics.fmean(spread == 0 for spread in spreads),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": statistics.fmean(joined["truncated"]),
        "completions/mean_terminated_length": statistics.fmean(ended),
        "completions/min_terminated_length": float(min(ended)),
        "completions/max_terminated_length": float(max(ended)),
        "tokens": float(sum(lengths) + sum(joined["prompt_tokens"])),
    }
    for name in rollouts.scores.parts:
        values = joined[f"rewards/{name}"]
        metrics[f"rewards/{name}/mean"] = statistics.fmean(values)
        metrics[f"rewards/{name}/std"] = statistics.stdev(values)
    return metrics


def _rows(update: int, rollouts: RolloutBatch) -> list[dict[str, Any]]:
    """The completions of this rank, one row each."""
    rows = []
    size = rollouts.advantages.shape[1]
    for i, prompt in enumerate(rollouts.prompts):
        for j, completion in enumerate(rollouts.completions[i]):
            place = i * size + j
            rows.append(
                {
                    "step": update + 1,
                    "image": prompt.image,
                    "prompt": prompt.text,
                    "label": prompt.label,
                    "completion": completion.text,
                    "tokens": len(completion.ids),
                    "truncated": completion.truncated,
                    "reward": rollouts.scores.total[place],
                    **{f"rewards/{name}": values[place] for name, values in rollouts.scores.parts.items()},
                    "advantage": float(rollouts.advantages[i, j]),
                }
            )
    return rows
