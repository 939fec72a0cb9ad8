"""Check on real data, before a training, that sampler, shared-prefix forward and plain forward compute the same.

Whether the *logic* is the same (masks, positions, images) is asked in fp32 arithmetic on the weights as they are
(`common.forward.logprobs.exact`), where correct forwards differ by 1e-5 nats and wrong ones by a thousand times
that. How much the *arithmetic* of the training rounds is measured beside it, as the difference of the forward as it
is trained from the exact one; a sampler with weights and kernels of its own (vLLM) may differ from the trainer by a
few times that.

Shapes: T completion tokens of one group, G completions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from common.forward import attention
from common.forward.logprobs import PolicyScorer, exact
from common.forward.packing import PromptGroup, pack_plain, pack_shared
from common.models.vlm import VLM
from common.rollout.base import Decoding, Request, Rollout

# Smallest thresholds on mean differences, in nats, by number format of the weights. EXACT: both sides compute in fp32
# (fp64 if the weights are). SAMPLER: each side computes in its own arithmetic.
EXACT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-4}
SAMPLER = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-4}
# Two correct computations differ by about 1.4 times the noise of each.
MULTIPLE = 4.0
REPLAYED = 16  # tokens per completion that the sampler draws once more in exact arithmetic


@dataclass(frozen=True)
class Agreement:
    """Mean absolute differences of log-probabilities of one group's tokens, in nats.

    shared: between the shared-prefix and the plain forward, exact.
    replay: between a sampler that computes with the trained weights and the plain forward, exact; None: the sampler
        has weights of its own.
    noise: between plain forwards in batches of other shapes, exact.
    rounding: between the forward as it is trained and the exact plain one.
    merged, copied: relative errors of `attention.merge_error`, no log-probabilities.
    """

    shared: float
    replay: float | None
    noise: float
    rounding: float
    dtype: torch.dtype
    merged: float = 0.0
    copied: float = 0.0

    @property
    def allowed(self) -> float:
        """Return the largest difference of correct forwards in exact arithmetic."""
        return max(EXACT[self.dtype], MULTIPLE * self.noise)

    @property
    def allowed_of_sampler(self) -> float:
        """Return the largest difference of a correct sampler from the trainer, each with its own rounding."""
        return max(SAMPLER[self.dtype], MULTIPLE * self.rounding)

    @property
    def forwards_agree(self) -> bool:
        """Return whether shared-prefix and plain forward agree; False also for NaN."""
        return self.shared <= self.allowed

    @property
    def allowed_merged(self) -> float:
        """Return the largest allowed relative error of merged attention, given that of copies."""
        return max(1e-5, MULTIPLE * self.copied)

    @property
    def gradients_agree(self) -> bool:
        """Return whether merged attention and its gradients are as exact as copies; True where nothing is merged."""
        return self.merged <= self.allowed_merged

    @property
    def sampler_agrees(self) -> bool:
        """Return whether the sampler agrees in exact arithmetic, as far as this can be tested."""
        return self.replay is None or self.replay <= self.allowed


def measure(
    scorer: PolicyScorer, vlm: VLM, group: PromptGroup, rollout: Rollout | None, request: Request, decoding: Decoding
) -> Agreement:
    """Run `compare`, and add the errors of merged attention."""
    layout = pack_shared([group], vlm.family, vlm.device).inputs["shared_prefix"]
    merged, copied = attention.merge_error(vlm.model, layout)
    return replace(compare(scorer, vlm, group, rollout, request, decoding), merged=merged, copied=copied)


@torch.no_grad()
def compare(
    scorer: PolicyScorer, vlm: VLM, group: PromptGroup, rollout: Rollout | None, request: Request, decoding: Decoding
) -> Agreement:
    """Compare the forwards on one sampled group. All ranks call it together, each with a group of its own.

    Args:
        scorer: Policy as a scorer; under ZeRO-3 its weights must be gathered.
        vlm: Policy as a model, the same one.
        group: Prompt and its sampled completions.
        rollout: Sampler, if it computes with the same weights; else None.
        request: Request that the sampler answered.
        decoding: Decoding parameters of the group.
    """

    def plain(group: PromptGroup) -> torch.Tensor:
        return scorer(pack_plain([group], vlm.family, vlm.pad, vlm.device), entropy=False)[0]

    def shared() -> torch.Tensor:
        return scorer(pack_shared([group], vlm.family, vlm.device), entropy=False)[0]

    was_training = scorer.training
    # The forward exactly as in training, with its rounding.
    trained = shared()
    scorer.eval()
    # Noise: the plain forward of the whole group against that of its two halves, which differ only in batch shape.
    half = (len(group.completions) + 1) // 2
    with exact(vlm.model):
        right = plain(group)
        parts = [part for part in (group.completions[:half], group.completions[half:]) if part]
        apart = torch.cat([plain(replace(group, completions=part)) for part in parts])
        agreement = Agreement(
            shared=difference(shared(), right),
            replay=None if rollout is None else replayed(plain, rollout, request, len(group.completions), decoding),
            noise=difference(apart, right),
            rounding=difference(trained, right),
            dtype=vlm.model.dtype,
        )
    scorer.train(was_training)
    return agreement


def replayed(
    plain: Callable[[PromptGroup], torch.Tensor], rollout: Rollout, request: Request, size: int, decoding: Decoding
) -> float:
    """Sample the beginning of a group again, score it in the same arithmetic, and return the difference."""
    (completions,) = rollout.generate([request], size, replace(decoding, max_tokens=min(REPLAYED, decoding.max_tokens)))
    sampled = torch.cat([completion.logps for completion in completions])
    scored = plain(PromptGroup(request.encoded, tuple(completion.ids for completion in completions)))
    return difference(scored.cpu(), sampled)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the mean absolute difference."""
    return float((a - b.to(a)).abs().mean())
