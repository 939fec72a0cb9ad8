"""APE (Zhu et al. 2023, arXiv 2304.01195), training-free: Tip-Adapter on the channels that tell the classes apart.

    logits = 100 x W^T + alpha exp(-beta (1 - x' K'^T)) (V exp(gamma D))

x', K': image and keys of unit length, of the chosen channels alone. V: labels of the keys, one-hot. D: for each key the
Kullback-Leibler divergence of its label from what CLIP takes the key for, softmax(K' W'^T), so that keys that CLIP
misreads count more (gamma > 0). A channel is better the less alike classes are in it, and the more their texts vary.
As in the authors' code, where the softmax has no temperature and the logarithm the base 2.

APE-T trains instead. All channels stay; on the chosen ones each class has a residual R, which its text and its keys
share, and each key a weight v in place of exp(gamma D):

    logits = 100 x (W + R)^T + alpha exp(-beta (1 - x (K + R)^T)) (v V)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.config.schema import positive
from common.few_shot.heads.base import TEXT, Pictures, SolvedHead, Text, base_logits
from common.few_shot.heads.keys import Keys, affinity, keys_of
from common.few_shot.heads.search import Found, search
from common.few_shot.heads.tip_adapter import TrainedKeys
from common.types import UserError

GAMMAS = 5  # values of gamma in the search
STEPS = (50, 20)  # of beta and alpha
EPSILON = 1e-6


def channels(shots: Tensor, labels: Tensor, text: Tensor, similarity: float, count: int) -> Tensor:
    """Return the best channels.

    Args:
        shots: Features of unit length. Shape: [N, D].
        labels: Class indices. Shape: [N].
        text: Text weights of unit length. Shape: [C, D].
        similarity: Weight of the similarity between classes, against that of the variance of the texts.
        count: Number of channels to choose.

    Returns:
        Their indices. Shape: [count].
    """
    # Products of all pairs of different classes, by channel: those of all pairs without those inside a class. The text
    # of a class is one of its examples.
    classes = len(text)
    sums = text.clone().index_add_(0, labels, shots)
    counts = torch.bincount(labels, minlength=classes).to(shots) + 1
    products = sums.sum(0).square() - sums.square().sum(0)
    pairs = counts.sum().square() - counts.square().sum()
    return (-similarity * products / pairs + (1 - similarity) * text.var(0)).topk(count).indices


def check_shares(share: float, similarity: float) -> None:
    """Check the values that channels are chosen by.

    Raises:
        UserError: One is not between 0 and 1, or no channel would be left.
    """
    for name, value in (("share", share), ("similarity", similarity)):
        if not 0 <= value <= 1 or not share:
            raise UserError(f"few_shot.{name}={value} must be a share between 0 and 1")


class APE(SolvedHead):
    """APE, training-free."""

    values = ("alpha", "beta", "gamma")

    def __init__(
        self,
        *,
        seed: int,
        alpha: float,
        beta: float,
        gamma: float,
        search_scale: list[float],
        share: float,
        similarity: float,
        key_views: int,
    ) -> None:
        """
        Args:
            seed: Not used.
            alpha: Weight of the votes if no search is made.
            beta: Sharpness of the votes, likewise.
            gamma: How much more keys count that CLIP misreads, likewise.
            search_scale: Upper ends of beta, alpha and gamma in the search.
            share: Share of the channels that are kept.
            similarity: Weight of the similarity between classes in the choice of channels; the variance has the rest.
            key_views: Number of random views over which a key is averaged.
        """
        super().__init__(seed=seed)
        for name, value in (("beta", beta), ("key_views", key_views)):
            positive(f"few_shot.{name}", value)
        if len(search_scale) != 3 or min(search_scale[:2]) <= 0.1:
            raise UserError(
                f"few_shot.search_scale={search_scale} must be the ends of beta, alpha (above 0.1) and gamma"
            )
        check_shares(share, similarity)
        self.given = {"alpha": alpha, "beta": beta, "gamma": gamma}
        self.scale, self.share, self.similarity, self.key_views = search_scale, share, similarity, key_views

    def step(self, number: int) -> dict[str, float]:
        text, mean = self.text.known, self.train.mean_view(self.key_views)
        keys = normalize(mean.images, dim=1)
        kept = channels(keys, mean.labels, text, self.similarity, max(1, round(self.share * keys.shape[1])))
        keys, values = normalize(keys[:, kept], dim=1), torch.eye(len(text)).to(keys)[mean.labels]
        read = (keys @ normalize(text[:, kept], dim=1).T).softmax(1)
        divergence = (values * torch.log2((values + EPSILON) / (read + EPSILON))).sum(1)
        self.solution = {"kept": kept, "keys": keys, "values": values, "divergence": divergence}
        judged = self.judged
        if judged is None:
            self.solution |= {name: (self.followed or self.given)[name] for name in self.values}
        else:
            self.solution |= self._search(judged, self.solution)
        return {}

    def _search(self, judged: Pictures, solution: dict[str, Any]) -> dict[str, float]:
        """Return the first alpha, beta and gamma with the highest accuracy, with gamma as the outer loop."""
        base, best = base_logits(judged, self.text), (-1.0, dict[str, float]())
        for number in range(GAMMAS):
            gamma = number * self.scale[2] / GAMMAS
            at = solution | {"gamma": gamma}

            def vote(part: slice, at: dict[str, Any] = at) -> Callable[[float], Tensor]:
                return lambda beta: votes(judged.take(part).images, at | {"beta": beta})

            found = search(
                vote,
                base,
                judged.labels,
                (self.scale[0], self.scale[1]),
                STEPS,
            )
            if found.accuracy > best[0]:
                best = found.accuracy, {"alpha": found.alpha, "beta": found.beta, "gamma": gamma}
        return best[1]

    def solved(self, pictures: Pictures, text: Text, solution: dict[str, Any]) -> Tensor:
        return base_logits(pictures, text) + solution["alpha"] * votes(pictures.images, solution)


def votes(images: Tensor, solution: dict[str, Any]) -> Tensor:
    """Return the votes of the keys, which alpha multiplies. Shapes: [N, D] -> [N, C]."""
    near = normalize(normalize(images, dim=1)[:, solution["kept"]], dim=1) @ solution["keys"].T
    weight = torch.exp(solution["gamma"] * solution["divergence"])
    return torch.exp(-solution["beta"] * (1 - near)) @ (solution["values"] * weight[:, None])


class Residuals(nn.Module):
    """What APE-T trains: a residual of each class on the chosen channels, shape [C, Q], and weights of the keys."""

    def __init__(self, keys: Keys, kept: Tensor) -> None:
        super().__init__()
        self.residual = nn.Parameter(keys.values.new_zeros(len(keys.values), len(kept)))
        self.weight = nn.Parameter(torch.ones_like(keys.values[..., 0]))
        for name, value in (("values", keys.values), ("missing", keys.missing), ("kept", kept)):
            self.register_buffer(name, value)

    def on_all(self) -> Tensor:
        """Return the residuals on all channels. Shape: [C, D]."""
        return torch.zeros_like(self.get_buffer("values")[:, 0]).index_add(1, self.get_buffer("kept"), self.residual)

    def keys(self) -> Keys:
        """Return the keys with their residuals, not normalised again."""
        return Keys(self.get_buffer("values") + self.on_all()[:, None], self.get_buffer("missing"))


class APET(TrainedKeys):
    """APE-T. The training's alpha and beta stay where no pair of the search is better."""

    needs = TEXT
    module: Residuals | None

    def __init__(self, *, eps: float, share: float, similarity: float, **training: Any) -> None:
        """
        Args:
            eps: Of AdamW.
            share: Share of the channels that have residuals; they are chosen by the texts alone.
            similarity: Weight of the similarity between classes in the choice of channels; the variance has the rest.
            training: Arguments of `TrainedKeys`.
        """
        super().__init__(**training)
        positive("few_shot.eps", eps)
        check_shares(share, similarity)
        self.share, self.similarity = share, similarity
        self.plan = replace(self.plan, eps=eps)

    @property
    def judges(self) -> Pictures | None:
        return self.searched_on  # its code keeps the best epoch on validation images

    @property
    def chosen_by_test(self) -> bool:
        return self.searches_test

    def build(self) -> nn.Module:
        mean, text = self.train.mean_view(self.key_views), self.text.known
        keys = keys_of(mean.images[None], mean.labels, len(text))
        count = max(1, round(self.share * text.shape[1]))
        return Residuals(keys, channels(text[:0], mean.labels[:0], text, self.similarity, count))

    def shaped_as(self, weights: dict[str, Tensor]) -> nn.Module:
        return Residuals(Keys(weights["values"], weights["missing"]), weights["kept"])

    def moved(self, text: Text) -> Text:
        """Return the classes with their residuals added to their text weights, which are not normalised again."""
        assert self.module is not None
        return replace(text, weights=text.known + self.module.on_all())

    def vote(self, pictures: Pictures, base: Tensor) -> Callable[[float], Tensor]:
        assert self.module is not None
        weight, near = self.module.weight, affinity(pictures.images, self.module.keys())
        return lambda beta: ((near - 1).mul_(beta).exp_() * weight).sum(-1)

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        return super().forward(pictures, self.moved(text))

    def search(self, pictures: Pictures) -> Found:
        return self.mix.search(lambda part: self.vote(part, part.images), pictures, self.moved(self.text))
