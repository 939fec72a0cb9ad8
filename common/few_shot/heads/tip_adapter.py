"""Tip-Adapter and Tip-Adapter-F (Zhang et al. 2022): zero-shot CLIP plus votes of the training images that are alike.

    logits = 100 x W^T + alpha exp(-beta (1 - x K^T)) V

x: an image's feature of length 1. W: the text weights. K, V: keys and labels of the training images (keys.py). As the
authors' code (their first preprint swaps alpha and beta). Tip-Adapter-F trains the keys; CaFo trains two sets of them.
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
    """
    Args:
        images: Raw features. Shape: [N, D].
        keys: Keys of the training images.
        zero_shot: Logits of the images. Shape: [N, C].
        alpha: Weight of the votes; 0 leaves zero-shot CLIP.
        beta: How sharply a vote falls with the distance.

    Returns:
        Shape: [N, C].
    """
    return zero_shot + alpha * votes(affinity(images, keys), beta)


class TipAdapter(FewShotHead):
    """Tip-Adapter: keys from the shots, nothing trained. Without CLIP the votes of the keys alone count."""

    needs = frozenset()
    fixed_classes = True
    steps = 1
    keys: Keys | None = None

    def __init__(self, *, seed: int, alpha: float, beta: float, search_scale: list[float], key_views: int) -> None:
        """
        Args:
            seed: Not used.
            alpha: Weight of the votes, where nothing is searched.
            beta: How sharply a vote falls with the distance, where nothing is searched.
            search_scale: Ends of beta and alpha.
            key_views: Random views that a key is the mean of.
        """
        super().__init__(seed=seed)
        positive("few_shot.key_views", key_views)
        self.key_views = key_views
        self.mix = Searched(alpha, beta, search_scale)

    def step(self, number: int) -> dict[str, float]:
        mean = self.train.mean_view(self.key_views)
        self.keys = keys_of(mean.images[None], mean.labels, len(self.text.names))
        return {}

    @property
    def chosen_by_test(self) -> bool:
        return self.searches_test

    def end(self) -> dict[str, Any]:
        if self.searched_on is not None:
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
        """As they are now."""
        return [Keys(v, self.get_buffer(f"missing_{n}")) for n, v in enumerate(self.values)]


class TrainedKeys(GradientHead):
    """What Tip-Adapter-F and CaFo share: trained keys, the best epoch, then a search of alpha and beta."""

    needs = frozenset()
    fixed_classes = True
    best = True
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
    ) -> None:
        """
        Args:
            seed: Draws the order of the pictures.
            epochs: Passes over the shots.
            batch: Pictures in a step.
            learning_rate: Learning rate at the start.
            weight_decay: Weight decay of AdamW.
            alpha: Weight of the votes while training.
            beta: How sharply a vote falls with the distance, while training.
            search_scale: Ends of beta and alpha in the search.
            key_views: Random views that a key is the mean of, at the start; the training shows others.
        """
        super().__init__(seed=seed, plan=Plan("adamw", epochs, batch, learning_rate, weight_decay))
        positive("few_shot.key_views", key_views)
        self.key_views = key_views
        self.mix = Searched(alpha, beta, search_scale)

    @abstractmethod
    def vote(self, pictures: Pictures, base: Tensor) -> Callable[[float], Tensor]:
        """From pictures and their zero-shot logits to a function from beta to what alpha multiplies."""

    @property
    def chosen_by_test(self) -> bool:
        return self.test is not None

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        base = base_logits(pictures, text)
        return base + self.mix.alpha * self.vote(pictures, base)(self.mix.beta)

    def search(self, pictures: Pictures) -> Found:
        """Alpha and beta on some pictures, with the keys as they are."""
        return self.mix.search(lambda p: self.vote(p, base_logits(p, self.text)), pictures, self.text)

    def keys_to_search_with(self) -> dict[str, Tensor] | None:
        """Weights to search alpha and beta with, if they are not the trained ones."""
        return None

    def end(self) -> dict[str, Any]:
        facts = super().end()
        assert self.module is not None
        if self.searched_on is None or self.judges is None:
            return facts | {"alpha": self.mix.alpha, "beta": self.mix.beta, "searched": False}
        trained = copy.deepcopy(self.module.state_dict())
        other = self.keys_to_search_with() if self.test is not None else None
        if other is not None:
            self.module.load_state_dict(other)
        with torch.no_grad():
            found = self.search(self.searched_on)
        self.module.load_state_dict(trained)
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
        caches = range(len(weights) // 2)  # of each its keys, and which are missing
        return KeyModule([Keys(weights[f"values.{n}"], weights[f"missing_{n}"]) for n in caches])

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.mix.alpha, self.mix.beta = state["mix"]


class TipAdapterF(TrainedKeys):
    """Tip-Adapter-F: the keys are trained."""

    def build(self) -> nn.Module:
        mean = self.train.mean_view(self.key_views)
        return KeyModule([keys_of(mean.images[None], mean.labels, len(self.text.names))])

    def vote(self, pictures: Pictures, base: Tensor) -> Callable[[float], Tensor]:
        assert self.module is not None
        near = affinity(pictures.images, self.module.keys()[0])
        return lambda beta: votes(near, beta)

    def search(self, pictures: Pictures) -> Found:
        assert self.module is not None
        return self.mix.search_keys(self.module.keys()[0], pictures, self.text)
