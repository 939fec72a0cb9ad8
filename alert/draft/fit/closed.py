"""Learners without gradients: zero-shot CLIP, CALIP, the nearest class mean, the linear probe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from alert.draft.fit.base import Unfitted, base_logits, maps_of, three
from alert.draft.fit.data import Pictures, Text
from alert.draft.learners import calip, linear_probe, zero_shot
from common.config.checks import one_of, positive
from common.types import UserError


class ZeroShot(Unfitted):
    """Zero-shot CLIP."""


class Calip(Unfitted):
    """CALIP, without parameters."""

    needs = frozenset({"text", "maps"})

    def __init__(self, *, seed: int, betas: list[float], sharpness: float = calip.SHARPNESS) -> None:
        """
        Args:
            seed: Not used.
            betas: Of the three terms.
            sharpness: See `calip.terms`.
        """
        super().__init__(seed=seed)
        self.betas, self.sharpness = three(betas), sharpness

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        return calip.logits(pictures.images, maps_of(pictures), text.known, self.betas, self.sharpness)


class NearestMean(Unfitted):
    """The nearest class mean: cosine to the mean of the shots' features, each of length 1. No text, no parameter."""

    needs = frozenset()
    fixed_classes = True
    steps = 1

    means: Tensor | None = None

    def step(self, number: int) -> dict[str, float]:
        seen, count = self.train.seen, len(self.text.names)
        sums = seen.images.new_zeros(count, seen.images.shape[1])
        self.means = normalize(sums.index_add_(0, seen.labels, normalize(seen.images, dim=1)), dim=1)
        return {}

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        return base_logits(pictures, text) if self.means is None else zero_shot.logits(pictures.images, self.means)

    def head(self) -> dict[str, Any]:
        return {"means": self.means}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        super().ready(head, text)
        self.means = head["means"]


class LinearProbe(Unfitted):
    """The linear probe; its strength is searched on validation pictures. With `selection=paper`, where there are none,
    it is on a few test pictures: CoOp's code takes them, since its ImageNet has the test split for validation.
    """

    needs = frozenset()
    fixed_classes = True
    steps = 1
    probe: linear_probe.Probe | None = None

    def __init__(self, *, seed: int, strength: float | None = None, solver: str = "auto") -> None:
        """
        Args:
            seed: Of the draw of test pictures; the fit is the optimum.
            strength: scikit-learn's C; null: searched.
            solver: `sklearn`, `torch`, or `auto`: torch on a GPU.
        """
        super().__init__(seed=seed)
        one_of("few_shot.linear_probe.solver", solver, ("auto", "sklearn", "torch"))
        if strength is not None:
            positive("few_shot.linear_probe.strength", strength)
        self.strength, self.solver = strength, solver
        self.facts: dict[str, Any] = {}

    @property
    def chosen_by_test(self) -> bool:
        return self.strength is None and self.searches_test

    def check_val(self, there: bool) -> None:
        if self.strength is None and not there:
            raise UserError(
                "linear_probe searches its strength on validation images, and there are none; use validation=held_out"
                " (with fewer shots, if they take all pictures), or few_shot.linear_probe.strength=1"
            )

    def _fit(self, strength: float) -> linear_probe.Probe:
        seen = self.train.seen
        on_gpu = self.solver == "torch" or (self.solver == "auto" and seen.images.device.type != "cpu")
        solve = linear_probe.fit_torch if on_gpu else linear_probe.fit_sklearn
        return solve(seen.images, seen.labels, len(self.text.names), strength)

    def step(self, number: int) -> dict[str, float]:
        if self.strength is not None:
            self.probe = self._fit(self.strength)
            self.facts = {"strength": self.strength, "converged": self.probe.converged}
            return {}
        self.check_val(self.searched_on is not None)
        val = self.searched_on
        assert val is not None
        if self.searches_test:
            val = some_of_each(val, min(4, int(self.train.seen.labels.bincount().max())), self.seed)
        fitted: dict[float, linear_probe.Probe] = {}

        def judge(strength: float) -> float:
            fitted[strength] = self._fit(strength)
            return float((fitted[strength].logits(val.images).argmax(1) == val.labels).float().mean())

        trace = linear_probe.search(judge)
        self.probe = fitted[trace.chosen]
        self.facts = {"strength": trace.chosen, "fits": len(fitted), "converged": self.probe.converged}
        return {}

    def end(self) -> dict[str, Any]:
        return self.facts

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        return base_logits(pictures, text) if self.probe is None else self.probe.logits(pictures.images)

    def head(self) -> dict[str, Any]:
        probe = self.probe
        kept = {"weight": None, "bias": None} if probe is None else {"weight": probe.weight, "bias": probe.bias}
        return {**kept, "facts": self.facts}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        super().ready(head, text)
        self.facts = head["facts"]
        self.probe = None if head["weight"] is None else linear_probe.Probe(head["weight"], head["bias"])


def some_of_each(pictures: Pictures, count: int, seed: int) -> Pictures:
    """At most `count` random pictures of each label, in their order."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed)).to(pictures.labels.device)
    rank = torch.zeros_like(order)  # of a picture among those of its label, in the random order
    for label in pictures.labels.unique():
        own = order[pictures.labels[order] == label]
        rank[own] = torch.arange(len(own), device=order.device)
    return pictures.take(rank < count)
