"""CaFo (Zhang et al. 2023): two caches, of CLIP's and of DINO's features, weighted per image by agreement with CLIP.

    logits = p_zs + alpha (w_clip z(p_clip) + w_dino z(p_dino))
    p = exp(-beta (1 - x K^T)) V, see keys.py; z: over the classes of an image, mean 0 and variance 1
    w = softmax of the sums over the classes of z(p) z(p_zs)

As in the authors' code; their equation 9 has no alpha. The sum is C - 1 times a correlation, so with many classes the
weights are nearly 0 and 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.config.schema import one_of
from common.few_shot.heads.base import Pictures, Support
from common.few_shot.heads.keys import Keys, affinity, keys_of, votes
from common.few_shot.heads.tip_adapter import KeyModule, TrainedKeys

NOT_GENERATED = "CaFo without generated pictures, which its authors add to the shots"


def standardized(logits: Tensor) -> Tensor:
    """Return (p - mean) / standard deviation over the classes, the last dimension, with C - 1 in the variance."""
    return (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)


def weights(standard: Tensor, zero_shot: Tensor) -> Tensor:
    """Return the weight of each cache for each image: weights add up to 1, and gradients flow through them.

    Args:
        standard: Standardised votes of the caches. Shape: [caches, N, C].
        zero_shot: Zero-shot CLIP's logits. Shape: [N, C].

    Returns:
        Weights. Shape: [caches, N].
    """
    # Agreement with zero-shot CLIP, summed over the classes; softmax over the caches.
    return (standard * standardized(zero_shot)).sum(2).softmax(0)


def fused(votes: Tensor, zero_shot: Tensor) -> Tensor:
    """Return the weighted sum of the standardised votes, which alpha multiplies. Shapes as in `logits`."""
    standard = standardized(votes)
    return (weights(standard, zero_shot)[:, :, None] * standard).sum(0)


def logits(votes: Tensor, zero_shot: Tensor, alpha: float) -> Tensor:
    """Return CaFo's logits.

    Args:
        votes: Votes of the caches at one beta. Shape: [caches, N, C].
        zero_shot: Zero-shot CLIP's logits. Shape: [N, C].
        alpha: Weight of the votes; 0 gives zero-shot CLIP.

    Returns:
        Logits. Shape: [N, C].
    """
    return zero_shot + alpha * fused(votes, zero_shot)


class CaFo(TrainedKeys):
    """CaFo: keys of CLIP and of a visual encoder, weighted per image; generated images serve as more shots."""

    needs = frozenset({"second"})

    module: KeyModule | None

    def __init__(
        self,
        *,
        seed: int,
        epochs: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        alpha: float,
        beta: float,
        search_scale: list[float],
        key_views: int,
        scheduler: str = "proper",
        generated: str | None = None,
        per_class: int = 0,
    ) -> None:
        """
        Args:
            seed: Seed of the order of the images.
            epochs: Passes over the shots.
            batch: Images in a step.
            learning_rate: Initial learning rate.
            weight_decay: Weight decay of AdamW.
            alpha: Weight of the votes during training.
            beta: Sharpness of the votes during training.
            search_scale: Upper ends of beta and alpha in the search.
            key_views: Number of random views over which the initial keys are averaged.
            scheduler: Length of the cosine: `paper` counts only the batches of real images, though generated ones
                advance it too (as in the authors' code); `proper` counts all batches.
            generated: Source of generated images, see common/few_shot/encoders/generated.py; null: none.
            per_class: Number of generated images per class.
        """
        super().__init__(
            seed=seed,
            epochs=epochs,
            batch=batch,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            alpha=alpha,
            beta=beta,
            search_scale=search_scale,
            key_views=key_views,
        )
        one_of("few_shot.scheduler", scheduler, ("paper", "proper"))
        self.scheduler, self.generated, self.generated_per_class = scheduler, generated, per_class
        self.begun: dict[str, Tensor] = {}
        self.remark = "" if generated is not None and per_class else NOT_GENERATED

    def supports(self) -> list[Support]:
        return [self.train] if self.train.generated is None else [self.train, self.train.generated]

    def cosine_over(self) -> int:
        counted = self.supports() if self.scheduler == "proper" else self.supports()[:1]
        return self.plan.epochs * sum(self.plan.batches(len(each.seen)) for each in counted)

    def build(self) -> nn.Module:
        count, means = len(self.text.names), [support.mean_view(self.key_views) for support in self.supports()]
        # One cache per encoder; within it the keys of shots and generated images stand side by side.
        kinds = [[mean.images for mean in means], [mean.second for mean in means if mean.second is not None]]
        labels = [mean.labels for mean in means]
        made = KeyModule(
            [
                _joined([keys_of(v[None], of, count) for v, of in zip(values, labels, strict=True)])
                for values in kinds
                if values
            ]
        )
        self.begun = copy.deepcopy(made.state_dict())
        return made

    def vote(self, pictures: Pictures, base: Tensor) -> Callable[[float], Tensor]:
        assert self.module is not None
        features = [pictures.images] if pictures.second is None else [pictures.images, pictures.second]
        near = [affinity(f, k) for f, k in zip(features, self.module.keys(), strict=True)]
        if self.text.weights is None:  # no zero-shot logits to agree with: one cache, standardised
            return lambda beta: standardized(votes(near[0], beta))
        return lambda beta: fused(torch.stack([votes(each, beta) for each in near]), base)

    def keys_to_search_with(self) -> dict[str, Tensor] | None:
        # The authors search with the initial keys where there are validation images, with the trained ones on ImageNet.
        return None if self.val is None else {k: v.to(self.train.seen.images.device) for k, v in self.begun.items()}


def _joined(parts: list[Keys]) -> Keys:
    """Join keys of several sets of images, class by class."""
    return Keys(torch.cat([p.values for p in parts], 1), torch.cat([p.missing for p in parts], 1))
