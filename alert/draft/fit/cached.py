"""Learners that remember the shots: Tip-Adapter, Tip-Adapter-F, CaFo."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alert.draft.fit.base import Unfitted, base_logits
from alert.draft.fit.data import Pictures, Plan, Support, Text, accuracy
from alert.draft.fit.searched import Searched
from alert.draft.fit.trained import Trained
from alert.draft.learners import cafo, grid_search, tip_adapter
from common.config.checks import one_of, positive


class TipAdapter(Unfitted):
    """Tip-Adapter: keys from the shots, nothing trained. Without CLIP the votes of the keys alone count."""

    needs = frozenset()
    fixed_classes = True
    steps = 1
    keys: tip_adapter.Keys | None = None

    def __init__(self, *, seed: int, alpha: float, beta: float, search_scale: list[float], key_views: int) -> None:
        """
        Args:
            seed: Not used.
            alpha: Of the votes, where nothing is searched.
            beta: Likewise.
            search_scale: Ends of beta and alpha.
            key_views: Random views that a key is the mean of.
        """
        super().__init__(seed=seed)
        positive("few_shot: key_views", key_views)
        self.key_views = key_views
        self.mix = Searched(alpha, beta, search_scale)

    def step(self, number: int) -> dict[str, float]:
        mean = self.train.mean_view(self.key_views)
        self.keys = tip_adapter.keys_of(mean.images[None], mean.labels, len(self.text.names))
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
        return tip_adapter.logits(pictures.images, self.keys, base, self.mix.alpha, self.mix.beta)

    def head(self) -> dict[str, Any]:
        return {"keys": None if self.keys is None else vars(self.keys), "mix": (self.mix.alpha, self.mix.beta)}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        super().ready(head, text)
        self.keys = None if head["keys"] is None else tip_adapter.Keys(**head["keys"])
        self.mix.alpha, self.mix.beta = head["mix"]


class KeyModule(nn.Module):
    """Trainable keys of one or two encoders. Shape of each: [C, K, D]."""

    def __init__(self, keys: list[tip_adapter.Keys]) -> None:
        super().__init__()
        self.values = nn.ParameterList([nn.Parameter(each.values.clone()) for each in keys])
        for number, each in enumerate(keys):
            self.register_buffer(f"missing_{number}", each.missing)

    def keys(self) -> list[tip_adapter.Keys]:
        """As they are now."""
        return [tip_adapter.Keys(v, self.get_buffer(f"missing_{n}")) for n, v in enumerate(self.values)]


class TrainedKeys(Trained):
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
            seed: Of the order of the pictures.
            epochs: Of the training.
            batch: Pictures.
            learning_rate: At the start.
            weight_decay: Of AdamW.
            alpha: While training.
            beta: While training.
            search_scale: Ends of beta and alpha in the search.
            key_views: Random views that a key is the mean of, at the start; the training shows others.
        """
        super().__init__(seed=seed, plan=Plan("adamw", epochs, batch, learning_rate, weight_decay))
        positive("few_shot: key_views", key_views)
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

    def search(self, pictures: Pictures) -> grid_search.Found:
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
        return KeyModule([tip_adapter.Keys(weights[f"values.{n}"], weights[f"missing_{n}"]) for n in caches])

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.mix.alpha, self.mix.beta = state["mix"]


class TipAdapterF(TrainedKeys):
    """Tip-Adapter-F: the keys are trained."""

    def build(self) -> nn.Module:
        mean = self.train.mean_view(self.key_views)
        return KeyModule([tip_adapter.keys_of(mean.images[None], mean.labels, len(self.text.names))])

    def vote(self, pictures: Pictures, base: Tensor) -> Callable[[float], Tensor]:
        assert self.module is not None
        near = tip_adapter.affinity(pictures.images, self.module.keys()[0])
        return lambda beta: tip_adapter.votes(near, beta)

    def search(self, pictures: Pictures) -> grid_search.Found:
        assert self.module is not None
        return self.mix.search_keys(self.module.keys()[0], pictures, self.text)


NOT_GENERATED = "CaFo without generated pictures, which its authors add to the shots"


class CaFo(TrainedKeys):
    """CaFo: keys of CLIP and of a visual encoder, weighed for each picture; generated pictures are more shots."""

    needs = frozenset({"second"})

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
            seed: This and the next as of `TrainedKeys`.
            epochs: Of the training.
            batch: Pictures.
            learning_rate: At the start.
            weight_decay: Of AdamW.
            alpha: While training.
            beta: While training.
            search_scale: Ends of beta and alpha in the search.
            key_views: Random views that a key is the mean of, at the start.
            scheduler: `paper`: the cosine is made for the real batches, and the generated ones also move it, as in the
                authors' code; `proper`: for all batches.
            generated: Generated pictures, see alert/draft/features/generated.py; null: none.
            per_class: How many of them.
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
        one_of("few_shot.cafo.scheduler", scheduler, ("paper", "proper"))
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
        kinds = [[mean.images for mean in means], [mean.second for mean in means if mean.second is not None]]
        labels = [mean.labels for mean in means]
        made = KeyModule(
            [
                _joined([tip_adapter.keys_of(v[None], of, count) for v, of in zip(values, labels, strict=True)])
                for values in kinds
                if values
            ]
        )
        self.begun = copy.deepcopy(made.state_dict())
        return made

    def vote(self, pictures: Pictures, base: Tensor) -> Callable[[float], Tensor]:
        assert self.module is not None
        features = [pictures.images] if pictures.second is None else [pictures.images, pictures.second]
        near = [tip_adapter.affinity(f, k) for f, k in zip(features, self.module.keys(), strict=True)]
        if self.text.weights is None:  # without CLIP there is nothing to agree with: one cache, standardised
            return lambda beta: cafo.standardized(tip_adapter.votes(near[0], beta))
        return lambda beta: cafo.fused(torch.stack([tip_adapter.votes(each, beta) for each in near]), base)

    def keys_to_search_with(self) -> dict[str, Tensor] | None:
        # with validation pictures the authors search before training; without them, on ImageNet, afterwards
        return None if self.val is None else {k: v.to(self.train.seen.images.device) for k, v in self.begun.items()}


def _joined(parts: list[tip_adapter.Keys]) -> tip_adapter.Keys:
    """Keys of several sets of pictures side by side."""
    return tip_adapter.Keys(torch.cat([p.values for p in parts], 1), torch.cat([p.missing for p in parts], 1))
