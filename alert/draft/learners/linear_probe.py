"""The linear probe of CLIP (Radford et al. 2021, appendix A.3), as CoOp's authors run it on few shots.

Multinomial logistic regression on raw features of the test transform: minimises half the squared weights plus
`strength` times the summed cross entropy; the intercept is not punished. The strength is searched on validation images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

COARSE = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)
HALVINGS = 8
ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """logits = images weight^T + bias. Shapes: [C, D], [C].

    converged: the solver ended before its last iteration. With great strengths it often does not.
    """

    weight: Tensor
    bias: Tensor
    converged: bool = True

    def logits(self, images: Tensor) -> Tensor:
        """From raw features, shape [N, D], to shape [N, C]."""
        return images @ self.weight.T + self.bias


def fit_sklearn(images: Tensor, labels: Tensor, classes: int, strength: float, tolerance: float = 1e-4) -> Probe:
    """By scikit-learn's L-BFGS, as the authors do.

    Args:
        images: Raw features. Shape: [N, D].
        labels: Every class occurs. Shape: [N].
        classes: C, at least 2.
        strength: scikit-learn's C.
        tolerance: Of the gradient; the default is scikit-learn's, and the authors'.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=ITERATIONS, tol=tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a search tries strengths that nobody uses
        model.fit(images.cpu().numpy(), labels.cpu().numpy())
    weight, bias = np.asarray(model.coef_), np.asarray(model.intercept_)
    if classes == 2:  # scikit-learn keeps one row, the log odds of the second class; any split of it gives the same
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    converged = bool(model.n_iter_.max() < ITERATIONS)
    return Probe(torch.as_tensor(weight).to(images), torch.as_tensor(bias).to(images), converged)


def fit_torch(images: Tensor, labels: Tensor, classes: int, strength: float) -> Probe:
    """The optimum itself by torch's L-BFGS, for a GPU. Arguments as of `fit_sklearn`."""
    weight = torch.zeros(classes, images.shape[1], dtype=images.dtype, device=images.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=images.dtype, device=images.device, requires_grad=True)
    small = torch.finfo(images.dtype).eps
    punished = 1.0 if classes == 2 else 0.5  # scikit-learn punishes the difference of two classes' weights
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=small,
        tolerance_change=small,
        line_search_fn="strong_wolfe",
    )
    scale = 1 / max(1.0, strength * len(images))  # the optimum stays, and gradients keep a size that can be judged

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = punished * weight.square().sum() + strength * cross_entropy(
            images @ weight.T + bias, labels, reduction="sum"
        )
        (loss * scale).backward()
        return loss.detach() * scale

    optimizer.step(objective)
    made, limits = optimizer.state[weight], optimizer.param_groups[0]
    converged = made["n_iter"] < limits["max_iter"] and made["func_evals"] < limits["max_eval"]
    return Probe(weight.detach(), bias.detach(), converged)


@dataclass(frozen=True)
class Trace:
    """Of a search: the strengths that were tried, with their accuracies, and the one that was chosen."""

    tried: tuple[tuple[float, float], ...]
    chosen: float


def search(accuracy: Callable[[float], float]) -> Trace:
    """The strength by the authors' search: the best of a coarse list (of equal ones the first), then eight halvings of
    the interval from a tenth to ten times of it. Each compares both ends and moves the worse one (of equal ones the
    right) to the middle in log10. The end that is kept last is the result.

    Args:
        accuracy: From a strength to the accuracy on the validation images of the probe that it gives.
    """
    accuracy = cache(accuracy)  # every halving asks for the end that it kept
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
