"""Build one rollout batch (completions, rewards, advantages), and the metrics of the batch and its updates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from common.forward.packing import PromptGroup
from common.rewards import Reward, Scores, StatefulReward, score, weighted
from common.rollout.base import Completion
from common.runtime.distributed import gather, interleave, share_of
from common.training.grpo.loss import LossInputs, LossOutputs
from common.types import Prompt, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

# What one update measures about itself, under TRL's names.
#
# Shapes: T tokens of one forward.


GAP = "sampling/sampling_logp_difference"


class Measured:
    """Sums over the forwards of one update, averaged over all ranks at the end, under TRL's names."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.means: dict[str, tuple[float, float]] = {}
        self.lowest: dict[str, float] = {}
        self.highest: dict[str, float] = {}

    def add(
        self,
        inputs: LossInputs,
        outputs: LossOutputs,
        entropy: torch.Tensor,
        gap: torch.Tensor | None,
        alike: torch.Tensor,
        first: bool,
    ) -> None:
        """Add one forward.

        `gap` [T]: the trainer's log-probability of each token minus the sampler's; None if the two belong to different
        distributions. `alike` [T]: whether both are about the same image, see `RolloutBatch.alike`.
        """
        self.loss += float(outputs.loss.detach())
        # masked completions (weight 0) count in no metric
        counted = inputs.weights[inputs.owner] > 0
        means = dict(outputs.means)
        means["entropy"] = (float(entropy[counted].sum()), float(counted.sum()))
        # Sampler and trainer are compared only in the first update of a batch: later ones have other weights.
        if first and bool(counted.any()):
            comparable = counted & alike
            if gap is not None and bool(comparable.any()):
                distance = gap[comparable].abs()
                means[f"{GAP}/mean"] = (float(distance.sum()), float(comparable.sum()))
                self._extreme(self.highest, f"{GAP}/max", float(distance.max()), max)
            ratio = inputs.correction
            if ratio is not None:
                ratio = ratio[counted]
                means["sampling/importance_sampling_ratio/mean"] = (float(ratio.sum()), float(counted.sum()))
                self._extreme(self.lowest, "sampling/importance_sampling_ratio/min", float(ratio.min()), min)
                self._extreme(self.highest, "sampling/importance_sampling_ratio/max", float(ratio.max()), max)
        for name, (total, count) in means.items():
            before = self.means.get(name, (0.0, 0.0))
            self.means[name] = before[0] + total, before[1] + count
        if outputs.lowest is not None and outputs.highest is not None:
            self._extreme(self.lowest, "clip_ratio/low_min", outputs.lowest, min)
            self._extreme(self.highest, "clip_ratio/high_max", outputs.highest, max)

    def tokens(self, plain: int, computed: int) -> None:
        """Add the tokens that the plain layout would have computed, without padding, and those that were computed."""
        before = self.means.get("shared_prefix/token_ratio", (0.0, 0.0))
        self.means["shared_prefix/token_ratio"] = before[0] + plain, before[1] + computed

    @staticmethod
    def _extreme(values: dict[str, float], name: str, value: float, choose: Callable[[float, float], float]) -> None:
        values[name] = choose(values.get(name, value), value)

    def over_ranks(self) -> dict[str, float]:
        """Return the metrics over all ranks, which call it together; a rank may have had no group with a gradient."""
        # Sums and counts are gathered, so that means are over all tokens and not over the ranks' means.
        parts = gather(self)
        metrics = {"loss": sum(part.loss for part in parts)}
        for name in sorted({name for part in parts for name in part.means}):
            pairs = [part.means.get(name, (0.0, 0.0)) for part in parts]
            metrics[name] = sum(total for total, _ in pairs) / (sum(count for _, count in pairs) or 1.0)
        for kind, choose in (("lowest", min), ("highest", max)):
            for name in sorted({name for part in parts for name in getattr(part, kind)}):
                metrics[name] = choose(getattr(part, kind)[name] for part in parts if name in getattr(part, kind))
        return metrics


# One rollout batch.
#
# Shapes: n prompts of this rank, N of all ranks, G completions each, K rewards.


@dataclass(frozen=True)
class RolloutBatch:
    """Completions of one rollout on this rank.

    scores: rewards by component, and their weighted sum as `total`, each with G values per prompt in a row.
    advantages: [n, G].
    lag: updates since the weights that sampled it.
    old_logps, reference_logps: stored by the first update over the batch for those that follow, by group.
    others: the groups with each image of `Prompt.scored_with` in place of their own: K lists of n.
    other_logps: [K, T] by group, of the completions in these.
    """

    prompts: list[Prompt]
    groups: list[PromptGroup]
    completions: list[list[Completion]]
    scores: Scores
    advantages: torch.Tensor
    resampled: int = 0
    lag: int = 0
    old_logps: dict[int, torch.Tensor] = field(default_factory=dict)
    reference_logps: dict[int, torch.Tensor] = field(default_factory=dict)
    others: list[list[PromptGroup]] = field(default_factory=list)
    other_logps: dict[int, torch.Tensor] = field(default_factory=dict)

    def lengths(self, without_truncated: bool) -> torch.Tensor:
        """Return the tokens per completion that count; 0 for a truncated one if those are masked. Shape: [n G]."""
        completions = [c for group in self.completions for c in group]
        return torch.tensor([0 if c.truncated and without_truncated else len(c.ids) for c in completions])

    def zero_variance_groups(self, by_sum: bool, by: str | None = None) -> set[int]:
        """Groups whose completions all have the same advantage, so no gradient but that of the KL.

        `by_sum`: advantages depend on the weighted sum of the rewards alone, not on each reward. `by`: groups whose
        completions are all the same in that reward, instead.
        """
        size = self.advantages.shape[1]
        if by_sum or by is not None:
            return set(without_differences(compared(self.scores, by), size))
        return set.intersection(*(set(without_differences(part, size)) for part in self.scores.parts.values()))

    def alike(self, groups: Sequence[int]) -> torch.Tensor:
        """Return which completions of some groups were sampled about the image that they are trained about.

        For the others the sampler's log-probabilities belong to another prompt. Shape: [len(groups) G].
        """
        size = self.advantages.shape[1]
        return torch.tensor([image == self.prompts[i].image for i in groups for image in images(self.prompts[i], size)])

    def sampled_logps(self, groups: Sequence[int]) -> torch.Tensor:
        """Return the sampler's log-probabilities of the tokens of some groups. Shape: [T]."""
        return torch.cat([c.logps for i in groups for c in self.completions[i]])


def images(prompt: Prompt, group_size: int) -> list[str]:
    """Return the image that each completion of a group is sampled about. Length: G.

    >>> images(Prompt("a", "?", "six", sampled_with=("b",)), 4)
    ['a', 'a', 'b', 'b']
    """
    each = (prompt.image, *prompt.sampled_with)
    return [image for image in each for _ in range(group_size // len(each))]


def score_groups(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    rewards: dict[str, Reward],
    open_image: Callable[[str], Image] | None = None,
) -> Scores:
    """Compute every reward of every completion, group after group.

    `open_image`: from an image's key to its picture, for rewards that look at it.

    A reward that says it may be missing (`may_be_missing`) gives NaN where it is, and is then left out for the whole
    group, as 0: the others are still compared fairly. NaN from any other reward stops the run, as it should.
    """
    samples = [
        Sample(prompt, completion.text, len(completion.ids), completion.truncated, open_image)
        for prompt, group in zip(prompts, completions, strict=True)
        for completion in group
    ]
    scores = score(samples, rewards)
    parts, missing = dict(scores.parts), {}
    for name, reward in rewards.items():
        if isinstance(reward.function, StatefulReward) and reward.function.may_be_missing:
            missing[name] = gaps(parts[name], len(completions[0]))
            parts[name] = [0.0 if gap else value for value, gap in zip(parts[name], missing[name], strict=True)]
    weights = {name: reward.weight for name, reward in rewards.items()}
    return Scores(parts, weighted(parts, weights) if parts else scores.total, missing, scores.judge_replies)


def gaps(values: Sequence[float], group_size: int) -> list[bool]:
    """Return for every value whether its group has a NaN.

    >>> gaps([1.0, float("nan"), 0.5, 0.0], 2)
    [True, True, False, False]
    """
    groups = [values[start : start + group_size] for start in range(0, len(values), group_size)]
    return [any(map(math.isnan, group)) for group in groups for _ in group]


def compared(scores: Scores, by: str | None) -> list[float]:
    """Return the values in which completions must differ: those of that reward, or with None the weighted sums."""
    return scores.total if by is None else scores.parts[by]


def without_differences(total: Sequence[float], group_size: int) -> list[int]:
    """Return the zero-variance groups: all completions have the same reward, so there is nothing to learn from.

    >>> without_differences([1.0, 1.0, 0.0, 1.0], 2)
    [0]
    """
    groups = range(len(total) // group_size)
    return [i for i in groups if len(set(total[i * group_size : (i + 1) * group_size])) == 1]


def compare(
    scores: Scores,
    weights: dict[str, float],
    group_size: int,
    advantages: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shuffle_seed: int | None,
) -> tuple[Scores, torch.Tensor]:
    """Compute the advantages of this rank's completions from the rewards of all ranks.

    Args:
        scores: Rewards of this rank.
        weights: Weight of each reward.
        group_size: G.
        advantages: From rewards [K, N, G] and their weights [K] to advantages [N, G].
        shuffle_seed: The control experiment: permute the rewards over all completions of the update.

    Returns:
        The rewards as they were used (permuted or not), and advantages [n, G].
    """
    # One matrix of everything that is gathered and permuted together.
    columns = [*scores.parts.values(), scores.total, *scores.missing.values()]
    mine = torch.tensor(columns, dtype=torch.float64).view(len(columns), -1, group_size)  # [columns, n, G]
    # All ranks gather all rewards: with `batch` scaling and GDPO the normalisation is over the whole update.
    everyone = torch.stack(interleave([list(part.unbind(1)) for part in gather(mine)]), 1)  # [columns, N, G]
    if shuffle_seed is not None:
        order = torch.randperm(everyone[0].numel(), generator=torch.Generator().manual_seed(shuffle_seed))
        everyone = everyone.flatten(1)[:, order].view_as(everyone)
    kinds, weight = len(scores.parts), torch.tensor([weights[name] for name in scores.parts], dtype=torch.float64)
    estimates = advantages(everyone[:kinds], weight)  # [N, G]
    used = torch.stack(share_of(list(everyone.unbind(1))), 1).flatten(1).tolist()
    parts = dict(zip(scores.parts, used[:kinds], strict=True))
    missing = {name: [gap > 0 for gap in row] for name, row in zip(scores.missing, used[kinds + 1 :], strict=True)}
    return Scores(parts, used[kinds], missing, scores.judge_replies), torch.stack(
        share_of(list(estimates.unbind(0)))
    ).float()


def describe(batch: RolloutBatch) -> dict[str, float]:
    """Return rewards and lengths of the rollout over all ranks, under TRL's names.

    For a reward that may be missing: mean and deviation where it exists (left out if it exists nowhere), and the share
    of samples without it (`rewards/<name>/missing`).
    """
    size = batch.advantages.shape[1]
    mine: dict[str, list[Any]] = {
        "total": batch.scores.total,
        "lengths": [len(c.ids) for group in batch.completions for c in group],
        "truncated": [c.truncated for group in batch.completions for c in group],
        "prompt_tokens": [len(group.prompt.ids) * size for group in batch.groups],
        "resampled": [batch.resampled],
        **{f"rewards/{name}": values for name, values in batch.scores.known.items()},
    }
    # one collective for everything, then statistics over all completions of the update
    ranks = gather(mine)
    joined = {key: [value for part in ranks for value in part[key]] for key in mine}
    zero_variance = without_differences(joined["total"], size)
    lengths = joined["lengths"]
    ended = [n for n, cut in zip(lengths, joined["truncated"], strict=True) if not cut] or [0]
    metrics = {
        "sampling/lag": float(batch.lag),
        "reward": statistics.fmean(joined["total"]),
        "reward_std": _std(joined["total"]),
        "frac_reward_zero_std": len(zero_variance) * size / len(joined["total"]),
        "frac_resampled": sum(joined["resampled"]) * size / len(joined["total"]),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": statistics.fmean(joined["truncated"]),
        "completions/mean_terminated_length": statistics.fmean(ended),
        "completions/min_terminated_length": float(min(ended)),
        "completions/max_terminated_length": float(max(ended)),
        "tokens": float(sum(lengths) + sum(joined["prompt_tokens"])),
    }
    for name in batch.scores.parts:
        values = [value for value in joined[f"rewards/{name}"] if value is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = statistics.fmean(values)
            metrics[f"rewards/{name}/std"] = _std(values)
        if name in batch.scores.missing:
            metrics[f"rewards/{name}/missing"] = 1 - len(values) / len(joined["total"])
    return metrics


def _std(values: list[float]) -> float:
    """Return the unbiased deviation, or NaN if a value is NaN (the statistics module would raise)."""
    return float(torch.tensor(values, dtype=torch.float64).std())


def rows(number: int, batch: RolloutBatch) -> list[dict[str, Any]]:
    """Return the completions of all ranks as table rows, in the order of the prompts.

    The column `sampled_with`, the image that a completion was sampled about, exists where it may be another one.
    """
    size, rewards = batch.advantages.shape[1], batch.scores.known
    mine = []
    for i, prompt in enumerate(batch.prompts):
        records, about = [], images(prompt, size)
        for j, completion in enumerate(batch.completions[i]):
            row = i * size + j
            records.append(
                {
                    "step": number,
                    "image": prompt.image,
                    **({"sampled_with": about[j]} if prompt.sampled_with else {}),
                    "prompt": prompt.text,
                    "label": prompt.label,
                    "completion": completion.text,
                    "tokens": len(completion.ids),
                    "truncated": completion.truncated,
                    "reward": batch.scores.total[row],
                    **{f"rewards/{name}": values[row] for name, values in rewards.items()},
                    **{f"judge_reply/{name}": texts[row] for name, texts in batch.scores.judge_replies.items()},
                    "advantage": float(batch.advantages[i, j]),
                    "lag": batch.lag,
                }
            )
        mine.append(records)
    # undo `share_of`: ranks hold every world-th prompt
    return [row for group in interleave(gather(mine)) for row in group]
