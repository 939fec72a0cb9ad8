"""Check on a few prompts, within minutes, whether hours of training could teach the model anything.

Each check covers one way in which GRPO runs have silently learned nothing or broken late: a sampler that repeats
itself, rewards without differences, a sampler and a trainer that disagree, a wrong attention mask, prompts without
their image or too long for the model. The end is an estimate of time and memory, with its formula.
Shapes: n sampled prompts, G completions each.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.config.schema import GRPOConfig, TrainerConfig
from common.cost.estimate import Cost, lines
from common.counted import counted
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, pack_shared, shared_tokens, within_budget
from common.models.encoder import EncodedPrompt, PromptEncoder
from common.models.vlm import VLM
from common.rewards import Reward
from common.rollout.base import Completion, Decoding, Rollout, logprobs_match_policy, requests
from common.training import agreement
from common.training.agreement import Agreement
from common.training.grpo.batch import score_groups, without_differences
from common.training.signs import CUT, constant_rewards, fix
from common.types import Prompt, UserError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Finding:
    """Result of one check: what was seen, and the verdict `ok`, `warning` or `failed` (a reason to stop)."""

    check: str
    verdict: str
    seen: str
    fix: str = ""


PROMPTS = 8  # sampled prompts
MORE_PROMPTS = 64  # most prompts to sample while no group has differences
LONG = 20_000  # number of completions from which on a training is checked by default
FEW_LEARN = 0.8  # share of groups without differences from which on there is a warning
NOT_COMPARED = Finding(
    "sampler against trainer",
    "warning",
    "not compared: the sampler's log-probabilities are of what top_k and top_p left (logprobs_untruncated=False)",
    "compare with rollout.top_k=0 rollout.top_p=1.0",
)


def is_long(updates: int, config: TrainerConfig) -> bool:
    """Tell whether a training is long enough to be checked before it starts."""
    if not isinstance(config, GRPOConfig):
        return False
    return updates // config.num_iterations * config.prompts_per_update * config.group_size >= LONG


def examine(
    *,
    vlm: VLM,
    encoder: PromptEncoder,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    rewards: dict[str, Reward],
    decoding: Decoding,
    config: GRPOConfig,
    image_size: int,
    updates: int,
    ranks: int,
    cost: Cost,
    seed: int,
    open_image: Callable[[str], Image] | None = None,
) -> list[Finding]:
    """Sample a few groups and check them. Call it before the optimizer wraps the weights.

    Args:
        vlm: The policy.
        encoder: Encoder of prompts to tensors.
        rollout: Sampling backend.
        prompts: The training prompts; evenly spaced ones are used.
        rewards: The reward mix.
        decoding: Sampling parameters.
        config: Group size and batch sizes.
        image_size: Side of the images in pixels.
        updates: Planned updates.
        ranks: Number of processes.
        cost: Computed cost of the training.
        seed: Seed of the run.
        open_image: From an image's key to its picture, for rewards that look at it.

    Returns:
        All findings, including failed ones.
    """
    # sample: evenly spaced prompts, timed after a first call
    chosen = list(prompts)[:: max(1, len(prompts) // PROMPTS)][:PROMPTS]
    asked = requests(encoder, chosen, [f"doctor-{seed}-{number}" for number in range(len(chosen))])
    encoded = [request.encoded for request in asked]
    rollout.generate(asked[:1], config.group_size, decoding)  # the first call is slow
    began = time.perf_counter()
    completions = rollout.generate(asked, config.group_size, decoding)
    sampling = time.perf_counter() - began
    # score the completions with the trainer's forward, and compare with the sampler
    groups = [PromptGroup(e, tuple(c.ids for c in group)) for e, group in zip(encoded, completions, strict=True)]
    scorer = PolicyScorer(vlm, decoding.temperature, config.head_chunk).to(vlm.device)
    gaps, scoring = score(scorer, vlm, groups, completions, config)
    sampler = None if getattr(rollout, "has_weight_copy", False) else rollout
    found = agreement.measure(scorer, vlm, groups[0], sampler, asked[0], decoding)
    # rewards: sample more prompts while no group has differences, since a few groups may all be flat by chance
    scores = score_groups(chosen, completions, rewards, open_image)
    total, parts = scores.total, scores.parts
    cut = statistics.fmean(c.truncated for group in completions for c in group)
    for start in range(PROMPTS, MORE_PROMPTS, PROMPTS):
        if len(without_differences(total, config.group_size)) < len(total) // config.group_size:
            break
        others = list(prompts)[:: max(1, len(prompts) // MORE_PROMPTS)][start : start + PROMPTS]
        if not others:  # no prompts are left
            break
        seeds = [f"doctor-{seed}-{start + number}" for number in range(len(others))]
        fresh = rollout.generate(requests(encoder, others, seeds), config.group_size, decoding)
        scores = score_groups(others, fresh, rewards, open_image)
        total = total + scores.total
        parts = {name: [*values, *scores.parts[name]] for name, values in parts.items()}
    findings = [
        check_lengths(vlm, encoded, chosen, decoding, image_size),
        check_distinct(completions),
        check_rewards(total, parts, config.group_size, cut, decoding.max_tokens),
        check_sampler(gaps, found, corrected=config.importance_correction != "none")
        if logprobs_match_policy(rollout, decoding)
        else NOT_COMPARED,
        estimate_time(
            sampling / len(chosen), scoring / len(chosen), config, updates, ranks, len(prompts[0].scored_with)
        ),
        check_memory(cost, vlm.device),
        Finding("operations", "ok", "; ".join(lines(cost)[2:])),
    ]
    if config.impl != "plain":
        findings.insert(3, check_forward(found))
    return findings


def check_lengths(
    vlm: VLM, encoded: Sequence[EncodedPrompt], prompts: Sequence[Prompt], decoding: Decoding, image_size: int
) -> Finding:
    """Check that the image is in the prompt with all its tokens, and that prompt and completion fit the model."""
    config = vlm.model.config
    expected = vlm.family.image_tokens(config.to_dict(), image_size)
    counts = [int((e.ids == vlm.family.placeholder_tokens(config)[0]).sum()) for e in encoded]
    longest, limit = max(len(e.ids) for e in encoded), config.get_text_config().max_position_embeddings
    most = longest + decoding.max_tokens
    seen = f"up to {longest} tokens, {counts[0]} of them image; with the completion at most {most} of {limit}"
    # a processor that resizes images differently gives other numbers of image tokens
    if set(counts) != {expected}:
        wrong = next(i for i, count in enumerate(counts) if count != expected)
        return Finding(
            "prompts",
            "failed",
            f"image {prompts[wrong].image} has {counts[wrong]} image tokens instead of {expected}",
            "check model.family and the model's processor",
        )
    if most > limit:
        return Finding("prompts", "failed", seen, "lower rollout.max_completion_tokens or list fewer names")
    return Finding("prompts", "ok", seen)


def check_distinct(completions: Sequence[Sequence[Completion]]) -> Finding:
    """Check that the completions of a group differ: equal completions have no advantage and teach nothing."""
    different = [len({tuple(c.ids.tolist()) for c in group}) for group in completions]
    seen = f"{statistics.fmean(different):.1f} different completions of {len(completions[0])} on average"
    if max(different) == 1:
        fix = "raise rollout.temperature and set rollout.top_k=0 (top_k=1 is greedy); the model may be too sure"
        return Finding("sampling", "failed", seen, fix)
    return Finding("sampling", "ok", seen)


def check_rewards(
    total: Sequence[float],
    parts: Mapping[str, Sequence[float]],
    group_size: int,
    cut: float = 0.0,
    limit: int | None = None,
) -> Finding:
    """Check the rewards: a group without differences has no gradient, and a reward that is the same for all completions
    teaches nothing. Many truncated completions are reported as the likely cause.

    Args:
        total: Weighted sum of rewards of every sample, group after group.
        parts: Every reward of every sample, by name.
        group_size: G.
        cut: Share of truncated completions.
        limit: Tokens at which they are truncated, `rollout.max_completion_tokens`.
    """
    for name, values in parts.items():
        if strange := [value for value in values if not math.isfinite(value)]:
            seen = f"'{name}' gave {strange[0]} for {len(strange)} of {len(values)} completions"
            return Finding("rewards", "failed", seen, f"correct the function that rewards.{name}.fn names")
    # groups without differences, and rewards that are the same everywhere
    groups = len(total) // group_size
    flat = len(without_differences(total, group_size))
    seen = f"{flat} of {counted(groups, 'group')} without differences; mean reward {statistics.fmean(total):.3f}"
    help = "raise trainer.group_size or rollout.temperature, or add a reward in which completions differ"
    spread = {name: (statistics.fmean(values), statistics.pstdev(values)) for name, values in parts.items()}
    constant = constant_rewards(
        [{f"rewards/{n}/mean": mean, f"rewards/{n}/std": std} for n, (mean, std) in spread.items()]
    )
    if constant:
        seen += "; " + ", ".join(f"'{name}' was {value}" for name, value in constant.items())
        help = "; ".join(f"'{name}': {fix(name, value, cut)}" for name, value in constant.items())
    # named first, since truncation usually explains the other findings
    if cut >= CUT:
        seen = f"{100 * cut:.0f} % of completions were cut at rollout.max_completion_tokens={limit}; {seen}"
        help = f"raise rollout.max_completion_tokens; {help}"
    if flat == groups:
        return Finding("rewards", "failed", seen, help)
    few = constant or flat >= FEW_LEARN * groups or cut >= CUT
    return Finding("rewards", "warning" if few else "ok", seen, help)


def check_sampler(gap: torch.Tensor, found: Agreement, corrected: bool) -> Finding:
    """Check that sampler and trainer give the sampled tokens the same probability.

    Args:
        gap: Absolute differences of the log-probabilities in nats. Shape: [T].
        found: Differences that rounding explains, and the remaining difference in exact arithmetic.
        corrected: Whether the loss corrects for such differences, so that a warning is enough.
    """
    allowed = found.allowed_of_sampler
    seen = f"log-probabilities differ by {gap.mean():.1e} on average (allowed: {allowed:.0e}), {gap.max():.1e} at most"
    if found.replay is not None:
        seen += f"; in exact arithmetic by {found.replay:.1e} (allowed: {found.allowed:.0e})"
    if float(gap.mean()) <= allowed and found.sampler_agrees:
        return Finding("sampler against trainer", "ok", seen)
    return Finding(
        "sampler against trainer",
        "warning" if corrected else "failed",
        seen,
        "use rollout=hf, or correct with trainer.importance_correction=sequence_mask, or model.dtype=float32",
    )


def check_forward(found: Agreement) -> Finding:
    """Check that the shared-prefix forward equals the plain one, and merged attention the one with copies."""
    seen = f"log-probabilities differ by {found.shared:.1e} on average (allowed: {found.allowed:.0e})"
    if not found.gradients_agree:
        seen = f"merged attention has a relative error of {found.merged:.1e}, copies of {found.copied:.1e}"
        return Finding(
            "shared against plain forward", "failed", seen, "set model.attention=copy and report this device"
        )
    if found.forwards_agree:
        return Finding("shared against plain forward", "ok", seen)
    return Finding(
        "shared against plain forward", "failed", seen, "train with trainer.impl=plain and report this model"
    )


def score(
    scorer: PolicyScorer,
    vlm: VLM,
    groups: Sequence[PromptGroup],
    completions: Sequence[Sequence[Completion]],
    config: GRPOConfig,
) -> tuple[torch.Tensor, float]:
    """Run forward and backward of all groups, batched as in an update.

    Returns:
        |log-probability minus the sampler's| of every token [T], and seconds without the first, repeated forward.
    """
    sizes = [shared_tokens(group) for group in groups]
    parts = within_budget(range(len(groups)), sizes.__getitem__, config.tokens_per_forward, config.prompts_per_forward)
    gaps, began = [], 0.0
    vlm.model.train()  # with gradient checkpointing, as in an update
    for number, part in enumerate([parts[0], *parts]):  # the first call is slow, so it is repeated and not timed
        if number == 1:
            began = time.perf_counter()
        logps, _ = scorer(pack_shared([groups[i] for i in part], vlm.family, vlm.device))
        logps.sum().backward()
        scorer.zero_grad(set_to_none=True)
        if number > 0:
            gaps.append((logps.detach().cpu() - torch.cat([c.logps for i in part for c in completions[i]])).abs())
    vlm.model.eval()
    return torch.cat(gaps), time.perf_counter() - began


def report(findings: Sequence[Finding]) -> Any:
    """Return the findings as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="doctor", title_justify="left")
    for column in ("check", "verdict", "seen"):
        table.add_column(column)
    for finding in findings:
        fix = f"\nfix: {finding.fix}" if finding.verdict != "ok" else ""
        table.add_row(finding.check, finding.verdict, Text(finding.seen + fix))
    return table


def refuse(findings: Sequence[Finding]) -> None:
    """Raise an error for the first failed check.

    Raises:
        UserError: A check failed; names it, what was seen and the fix.
    """
    for finding in findings:
        if finding.verdict == "failed":
            raise UserError(f"doctor: {finding.check}: {finding.seen}. {finding.fix[0].upper()}{finding.fix[1:]}")


# Estimates of training time and memory, each with its formula.


def estimate_time(
    sampling: float, scoring: float, config: GRPOConfig, updates: int, ranks: int, others: int = 0
) -> Finding:
    """Estimate the seconds of the whole training from those of one prompt.

    Args:
        sampling: Seconds to sample one group.
        scoring: Seconds of forward and backward of one group.
        config: Batch sizes.
        updates: Planned updates.
        ranks: Number of processes.
        others: Other images that completions are scored with.
    """
    each = config.prompts_per_update / ranks
    # a forward, a third of forward and backward: of the reference with a KL term, of the old policy with several steps,
    # about other images
    once = others + 1 - 1 / config.steps_per_rollout
    reference = 1 + (config.beta > 0) / 3 + once / 3 / config.num_iterations
    total = updates * each * (sampling / config.num_iterations + scoring * reference)
    seen = (
        f"about {_duration(total)} without evaluation = {updates} updates x {each:g} prompts per rank x"
        f" ({sampling:.3g} s sampling / {config.num_iterations}"
        f" + {scoring:.3g} s forward and backward x {reference:.2f})"
    )
    return Finding("time", "ok", seen)


def check_memory(cost: Cost, device: torch.device) -> Finding:
    """Report the computed bytes of one GPU (common/cost/); on a GPU, compare with its memory and the measured peak."""
    seen = "; ".join(lines(cost)[:2])
    if device.type != "cuda":
        return Finding("memory", "ok", seen)
    available = torch.cuda.get_device_properties(device).total_memory
    seen += (
        f"; this GPU has {_bytes(available)}, the examination took {_bytes(torch.cuda.max_memory_allocated(device))}"
    )
    fix = "use deepspeed=zero3 or an offload, model.gradient_checkpointing=true, adapters, or fewer tokens_per_forward"
    return Finding("memory", "failed" if cost.bytes > available else "ok", seen, fix)


def _duration(seconds: float) -> str:
    """Format a duration.

    >>> [_duration(s) for s in (42, 600, 90_000)]
    ['42 s', '10 min', '25.0 h']
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
