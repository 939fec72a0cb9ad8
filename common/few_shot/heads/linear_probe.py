"""Linear probe of CLIP (Radford et al. 2021, appendix A.3), as CoOp's authors run it on few shots.

Multinomial logistic regression on raw features of the test transform: minimise half the squared weights plus `strength`
times the summed cross entropy, without a penalty on the intercept. The strength is searched on validation images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.config.schema import one_of, positive
from common.few_shot.heads.base import FewShotHead, Pictures, Text, base_logits
from common.types import UserError

COARSE = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)
HALVINGS = 8
ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier: logits = images weight^T + bias. Shapes: [C, D], [C].

    converged: True if the solver ended before its last iteration; with a large strength it often does not.
    """

    weight: Tensor
    bias: Tensor
    converged: bool = True

    def logits(self, images: Tensor) -> Tensor:
        """Return logits of shape [N, C] from raw features of shape [N, D]."""
        return images @ self.weight.T + self.bias


def fit_sklearn(
    images: Tensor,
    labels: Tensor,
    classes: int,
    strength: float,
    tolerance: float = 1e-4,
    class_weight: str | None = None,
) -> Probe:
    """Fit by scikit-learn's L-BFGS, like the authors.

    Args:
        images: Raw features. Shape: [N, D].
        labels: Class indices; every class occurs. Shape: [N].
        classes: C, at least 2.
        strength: Inverse regularisation strength, scikit-learn's C.
        tolerance: Size of the gradient at which the solver stops; the default is scikit-learn's, and the authors'.
        class_weight: `balanced`: an image counts N / (C n), where its class has n of the N images; None: 1.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=ITERATIONS, tol=tolerance, class_weight=class_weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a search also tries strengths that are not chosen
        model.fit(images.cpu().numpy(), labels.cpu().numpy())
    weight, bias = np.asarray(model.coef_), np.asarray(model.intercept_)
    if classes == 2:  # scikit-learn keeps one row, the log odds of the second class: split it over both classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    converged = bool(model.n_iter_.max() < ITERATIONS)
    return Probe(torch.as_tensor(weight).to(images), torch.as_tensor(bias).to(images), converged)


def fit_torch(images: Tensor, labels: Tensor, classes: int, strength: float, class_weight: str | None = None) -> Probe:
    """Fit to the exact optimum by torch's L-BFGS, for a GPU. Arguments as in `fit_sklearn`."""
    counts = labels.bincount(minlength=classes)
    share = None if class_weight is None else (len(labels) / (classes * counts)).to(images)
    weight = torch.zeros(classes, images.shape[1], dtype=images.dtype, device=images.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=images.dtype, device=images.device, requires_grad=True)
    small = torch.finfo(images.dtype).eps
    punished = 1.0 if classes == 2 else 0.5  # with two classes scikit-learn penalises the weights' difference
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=small,
        tolerance_change=small,
        line_search_fn="strong_wolfe",
    )
    # Scaling the objective leaves the optimum where it is, and keeps gradients at a size that the tolerances fit.
    scale = 1 / max(1.0, strength * len(images))

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = punished * weight.square().sum() + strength * cross_entropy(
            images @ weight.T + bias, labels, weight=share, reduction="sum"
        )
        (loss * scale).backward()
        return loss.detach() * scale

    # a single step: LBFGS makes all its iterations inside
    optimizer.step(objective)
    made, limits = optimizer.state[weight], optimizer.param_groups[0]
    converged = made["n_iter"] < limits["max_iter"] and made["func_evals"] < limits["max_eval"]
    return Probe(weight.detach(), bias.detach(), converged)


@dataclass(frozen=True)
class Trace:
    """Result of a search: the strengths that were tried, with their accuracies, and the chosen one."""

    tried: tuple[tuple[float, float], ...]
    chosen: float


def search(accuracy: Callable[[float], float]) -> Trace:
    """Search the strength like the authors: coarsely, then by bisection.

    Take the best of a coarse list (of equal ones the first), then halve the interval from a tenth to ten times of it
    eight times. Each halving compares both ends and moves the worse one (of equal ones the right) to the middle in
    log10. The end that is kept last is the result.

    Args:
        accuracy: Function from a strength to the validation accuracy of the probe that it gives.
    """
    accuracy = cache(accuracy)  # every halving evaluates one end again
    tried = [(strength, accuracy(strength)) for strength in COARSE]
    peak = max(tried, key=lambda pair: pair[1])[0]
    left, right = 0.1 * peak, 10 * peak
    for _ in range(HALVINGS):
        ends = [(strength, accuracy(strength)) for strength in (left, right)]
        tried += ends
        middle = 10 ** (0.5 * (math.log10(left) + math.log10(right)))
        if ends[0][1] < ends[1][1]:
            chosen, left = right, middle
        else:
            chosen, right = left, middle
    return Trace(tuple(tried), chosen)


class LinearProbe(FewShotHead):
    """Linear probe with its strength searched on validation images.

    With `selection=paper` and no validation images it is searched on a few test images: CoOp's code does so, since
    its ImageNet uses the test split for validation.
    """

    needs = frozenset()
    fixed_classes = True
    steps = 1
    probe: Probe | None = None

    def __init__(
        self, *, seed: int, strength: float | None = None, solver: str = "auto", class_weight: str | None = None
    ) -> None:
        """
        Args:
            seed: Seed of the test images to search on; the fit itself is deterministic.
            strength: Inverse regularisation strength, scikit-learn's C; null: searched.
            solver: Solver of the fit: `sklearn`, `torch`, or `auto` (torch on a GPU).
            class_weight: `balanced`: every class counts as much as any other, however many images it has.
        """
        super().__init__(seed=seed)
        one_of("few_shot.solver", solver, ("auto", "sklearn", "torch"))
        if strength is not None:
            positive("few_shot.strength", strength)
        if class_weight is not None:
            one_of("few_shot.class_weight", class_weight, ("balanced",))
        self.strength, self.solver, self.class_weight = strength, solver, class_weight
        self.facts: dict[str, Any] = {}

    @property
    def chosen_by_test(self) -> bool:
        return self.strength is None and self.searches_test

    def follow(self, other: LinearProbe) -> None:
        self.strength = other.facts["strength"]

    def check_val(self, there: bool) -> None:
        if self.strength is None and not there:
            raise UserError(
                "linear_probe searches its strength on validation images, and there are none; use validation=held_out"
                " (with fewer shots, if they take all pictures), or few_shot.strength=1"
            )

    def _fit(self, strength: float) -> Probe:
        seen = self.train.seen
        on_gpu = self.solver == "torch" or (self.solver == "auto" and seen.images.device.type != "cpu")
        solve = fit_torch if on_gpu else fit_sklearn
        return solve(seen.images, seen.labels, len(self.text.names), strength, class_weight=self.class_weight)

    def step(self, number: int) -> dict[str, float]:
        if self.strength is not None:
            self.probe = self._fit(self.strength)
            self.facts = {"strength": self.strength, "converged": self.probe.converged}
            return {}
        self.check_val(self.searched_on is not None)
        val = self.searched_on
        assert val is not None
        # As many test images per class as there are shots, at most four.
        if self.searches_test:
            val = some_of_each(val, min(4, int(self.train.seen.labels.bincount().max())), self.seed)
        fitted: dict[float, Probe] = {}

        def judge(strength: float) -> float:
            fitted[strength] = self._fit(strength)
            return float((fitted[strength].logits(val.images).argmax(1) == val.labels).float().mean())

        trace = search(judge)
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
        self.probe = None if head["weight"] is None else Probe(head["weight"], head["bias"])


def some_of_each(pictures: Pictures, count: int, seed: int) -> Pictures:
    """Return at most `count` random images of each label, in their original order."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed)).to(pictures.labels.device)
    rank = torch.zeros_like(order)  # rank of an image among those of its label, in the random order
    for label in pictures.labels.unique():
        own = order[pictures.labels[order] == label]
        rank[own] = torch.arange(len(own), device=order.device)
    return pictures.take(rank < count)
