"""Tip-Adapter and Tip-Adapter-F (Zhang et al. 2022): zero-shot CLIP plus votes of similar training images.

    logits = 100 x W^T + alpha exp(-beta (1 - x K^T)) V

x: an image's feature of unit length. W: the text weights. K, V: keys and labels of the training images (keys.py). As in
the authors' code (their first preprint swaps alpha and beta). Tip-Adapter-F trains the keys; CaFo trains two sets.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.config.schema import positive
from common.few_shot.heads.base import FewShotHead, GradientHead, Pictures, Plan, Text, accuracy, base_logits
from common.few_shot.heads.keys import Keys, affinity, keys_of, votes
from common.few_shot.heads.search import Found, Searched


def logits(images: Tensor, keys: Keys, zero_shot: Tensor, alpha: float, beta: float) -> Tensor:
    """Return Tip-Adapter's logits.

    Args:
        images: Raw features. Shape: [N, D].
        keys: Keys of the training images.
        zero_shot: Logits of the images. Shape: [N, C].
        alpha: Weight of the votes; 0 gives zero-shot CLIP.
        beta: Sharpness: the decay of a vote with the distance.

    Returns:
        Logits. Shape: [N, C].
    """
    return zero_shot + alpha * votes(affinity(images, keys), beta)


class TipAdapter(FewShotHead):
    """Tip-Adapter: keys from the shots, no training. Without CLIP only the votes of the keys count."""

    needs = frozenset()
    fixed_classes = True
    steps = 1
    keys: Keys | None = None

    def __init__(self, *, seed: int, alpha: float, beta: float, search_scale: list[float], key_views: int) -> None:
        """
        Args:
            seed: Not used.
            alpha: Weight of the votes if no search is made.
            beta: Sharpness of the votes if no search is made.
            search_scale: Upper ends of beta and alpha in the search.
            key_views: Number of random views over which a key is averaged.
        """
        super().__init__(seed=seed)
        positive("few_shot.key_views", key_views)
        self.key_views = key_views
        self.mix = Searched(alpha, beta, search_scale)
        self.chosen_mix: tuple[float, float] | None = None

    def follow(self, other: TipAdapter) -> None:
        self.chosen_mix = other.mix.alpha, other.mix.beta

    def step(self, number: int) -> dict[str, float]:
        mean = self.train.mean_view(self.key_views)
        # [None]: the views are averaged already, so `keys_of` gets a single one
        self.keys = keys_of(mean.images[None], mean.labels, len(self.text.names))
        return {}

    @property
    def chosen_by_test(self) -> bool:
        return self.searches_test

    def end(self) -> dict[str, Any]:
        if self.chosen_mix is not None:
            self.mix.alpha, self.mix.beta = self.chosen_mix
        elif self.searched_on is not None:
            assert self.keys is not None
            found = self.mix.search_keys(self.keys, self.searched_on, self.text)
            self.mix.alpha, self.mix.beta = found.alpha, found.beta
        return {"alpha": self.mix.alpha, "beta": self.mix.beta, "searched": self.searched_on is not None}

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        if self.keys is None:
            return base_logits(pictures, text)
        base = base_logits(pictures, text)
        return logits(pictures.images, self.keys, base, self.mix.alpha, self.mix.beta)

    def head(self) -> dict[str, Any]:
        return {"keys": None if self.keys is None else vars(self.keys), "mix": (self.mix.alpha, self.mix.beta)}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        super().ready(head, text)
        self.keys = None if head["keys"] is None else Keys(**head["keys"])
        self.mix.alpha, self.mix.beta = head["mix"]


class KeyModule(nn.Module):
    """Trainable keys of one or two encoders. Shape of each: [C, K, D]."""

    def __init__(self, keys: list[Keys]) -> None:
        super().__init__()
        self.values = nn.ParameterList([nn.Parameter(each.values.clone()) for each in keys])
        for number, each in enumerate(keys):
            self.register_buffer(f"missing_{number}", each.missing)

    def keys(self) -> list[Keys]:
        """Return the current keys."""
        return [Keys(v, self.get_buffer(f"missing_{n}")) for n, v in enumerate(self.values)]


class TrainedKeys(GradientHead):
    """Base of Tip-Adapter-F and CaFo: train keys, keep the best epoch, then search alpha and beta."""

    needs = frozenset()
    fixed_classes = True
    best = True

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
            key_views: Number of random views over which the initial keys are averaged; the training shows others.
        """
        super().__init__(seed=seed, plan=Plan("adamw", epochs, batch, learning_rate, weight_decay))
        positive("few_shot.key_views", key_views)
        self.key_views = key_views
        self.mix = Searched(alpha, beta, search_scale)
        self.chosen_mix: tuple[float, float] | None = None

    def follow(self, other: TrainedKeys) -> None:
        self.chosen_mix = other.mix.alpha, other.mix.beta

    @abstractmethod
    def vote(self, pictures: Pictures, base: Tensor) -> Callable[[float], Tensor]:
        """Return a function from beta to the votes that alpha multiplies, for images with their zero-shot logits."""

    @property
    def chosen_by_test(self) -> bool:
        return self.test is not None

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        # alpha and beta stay fixed in training; the search comes after the last epoch
        base = base_logits(pictures, text)
        return base + self.mix.alpha * self.vote(pictures, base)(self.mix.beta)

    def search(self, pictures: Pictures) -> Found:
        """Search alpha and beta on images, with the current keys."""
        return self.mix.search(lambda p: self.vote(p, base_logits(p, self.text)), pictures, self.text)

    def keys_to_search_with(self) -> dict[str, Tensor] | None:
        """Return weights to search alpha and beta with, or None for the trained ones."""
        return None

    def end(self) -> dict[str, Any]:
        facts = super().end()
        assert self.module is not None
        if self.chosen_mix is not None:
            self.mix.alpha, self.mix.beta = self.chosen_mix
            return facts | {"alpha": self.mix.alpha, "beta": self.mix.beta, "searched": False}
        if self.searched_on is None or self.judges is None:
            return facts | {"alpha": self.mix.alpha, "beta": self.mix.beta, "searched": False}
        # Search, with `selection=paper` on the keys that the authors search with, then put the trained keys back.
        trained = copy.deepcopy(self.module.state_dict())
        other = self.keys_to_search_with() if self.test is not None else None
        if other is not None:
            self.module.load_state_dict(other)
        with torch.no_grad():
            found = self.search(self.searched_on)
        self.module.load_state_dict(trained)
        # Keep the found pair only if it beats the training pair on the selection images.
        begun, before = (self.mix.alpha, self.mix.beta), accuracy(self, self.judges, self.text)
        self.mix.alpha, self.mix.beta = found.alpha, found.beta
        better = accuracy(self, self.judges, self.text) > before
        if not better:
            self.mix.alpha, self.mix.beta = begun
        return facts | {"alpha": self.mix.alpha, "beta": self.mix.beta, "searched": better}

    def head(self) -> dict[str, Any]:
        return super().head() | {"mix": (self.mix.alpha, self.mix.beta)}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        super().ready(head, text)
        self.mix.alpha, self.mix.beta = head["mix"]

    def shaped_as(self, weights: dict[str, Tensor]) -> nn.Module:
        caches = range(len(weights) // 2)  # two tensors per cache: keys and mask of missing ones
        return KeyModule([Keys(weights[f"values.{n}"], weights[f"missing_{n}"]) for n in caches])

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.mix.alpha, self.mix.beta = state["mix"]


class TipAdapterF(TrainedKeys):
    """Tip-Adapter-F: Tip-Adapter with trained keys."""

    module: KeyModule | None

    def build(self) -> nn.Module:
        mean = self.train.mean_view(self.key_views)
        return KeyModule([keys_of(mean.images[None], mean.labels, len(self.text.names))])

    def vote(self, pictures: Pictures, base: Tensor) -> Callable[[float], Tensor]:
        assert self.module is not None
        # Affinities do not depend on beta: compute them once for all betas of a search.
        near = affinity(pictures.images, self.module.keys()[0])
        return lambda beta: votes(near, beta)

    def search(self, pictures: Pictures) -> Found:
        assert self.module is not None
        return self.mix.search_keys(self.module.keys()[0], pictures, self.text)
