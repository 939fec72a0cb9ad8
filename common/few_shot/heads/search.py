"""Search alpha and beta (Zhang et al. 2022): the first pair of a grid with the highest accuracy.

`search` tries every pair on every class, for any votes. `search_keys` finds the same for Tip-Adapter's votes, a sum of
exponentials, with a fraction of the work: for most classes a bound shows that they never beat the true one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.schema import positive
from common.few_shot.heads.base import Pictures, Text, base_logits
from common.few_shot.heads.keys import Keys, affinity, votes
from common.types import UserError

STEPS = (200, 20)  # number of betas and alphas
STRIDE = 16  # betas from one node of the bound to the next
BLOCK = 16  # classes that are compared with the true one together
Vote = Callable[[Pictures], Callable[[float], Tensor]]  # images -> (beta -> the votes that alpha multiplies)


class Searched:
    """Alpha and beta of a learner, with their search."""

    def __init__(self, alpha: float, beta: float, search_scale: list[float]) -> None:
        """
        Args:
            alpha: Weight of the votes before the search.
            beta: Sharpness of the votes before the search.
            search_scale: Upper ends of beta and alpha in the search.
        """
        positive("few_shot.beta", beta)
        if len(search_scale) != 2 or min(search_scale) <= 0.1:
            raise UserError(f"few_shot.search_scale={search_scale} must be the ends of beta and alpha, above 0.1")
        self.alpha, self.beta, self.scale = alpha, beta, (search_scale[0], search_scale[1])

    def search(self, vote: Vote, pictures: Pictures, text: Text) -> Found:
        """Return the pair with the highest accuracy on some images."""
        return search(lambda part: vote(pictures.take(part)), base_logits(pictures, text), pictures.labels, self.scale)

    def search_keys(self, keys: Keys, pictures: Pictures, text: Text) -> Found:
        """Return the same for Tip-Adapter's votes, much faster where there are many classes."""
        return search_keys(
            lambda part: affinity(pictures.take(part).images, keys),
            base_logits(pictures, text),
            pictures.labels,
            self.scale,
        )


def grid(scale: tuple[float, float], steps: tuple[int, int] = STEPS) -> tuple[list[float], list[float]]:
    """Return the betas and alphas to try: evenly from 0.1 towards `scale`, which is itself left out.

    Args:
        scale: Upper ends of beta and alpha.
        steps: Number of betas and alphas.

    >>> grid((2.1, 1.1), (2, 2))
    ([0.1, 1.1], [0.1, 0.6])
    """
    betas, alphas = (
        [i * (end - 0.1) / count + 0.1 for i in range(count)] for end, count in zip(scale, steps, strict=True)
    )
    return betas, alphas


@dataclass(frozen=True)
class Found:
    """Best pair of a search, with its accuracy."""

    alpha: float
    beta: float
    accuracy: float


def search(
    vote: Callable[[slice], Callable[[float], Tensor]],
    zero_shot: Tensor,
    labels: Tensor,
    scale: tuple[float, float],
    steps: tuple[int, int] = STEPS,
    chunk: int = 512,
) -> Found:
    """Return the pair with the highest accuracy; of equal ones the first, with beta as outer loop, like the authors.

    Accuracies of all pairs are counted chunk by chunk, so that the images' affinities are never held together, and one
    exponential per beta serves all alphas.

    Args:
        vote: Function from a slice of images to a function from beta to the votes of shape [images, C].
        zero_shot: Logits of the images. Shape: [N, C].
        labels: Class indices. Shape: [N].
        scale: Upper ends of beta and alpha.
        steps: Number of betas and alphas.
        chunk: Number of images that are held together.
    """
    betas, alphas = grid(scale, steps)

    def count(part: slice) -> Tensor:
        base, truth, voted = zero_shot[part], labels[part], vote(part)
        mixed, counts = torch.empty_like(base), truth.new_zeros(len(betas), len(alphas))
        for row, beta in enumerate(betas):
            added = voted(beta)
            for column, alpha in enumerate(alphas):
                # written into one buffer: no new tensor per pair
                torch.add(base, added, alpha=alpha, out=mixed)
                counts[row, column] = (mixed.argmax(1) == truth).sum()
        return counts

    return _best(count, len(labels), chunk, betas, alphas)


def search_keys(
    near: Callable[[slice], Tensor],
    zero_shot: Tensor,
    labels: Tensor,
    scale: tuple[float, float],
    steps: tuple[int, int] = STEPS,
    chunk: int = 128,
) -> Found:
    """Return what `search` finds for Tip-Adapter's votes, up to rounding, from the true class and its rivals alone.

    Args:
        near: Function from a slice of images to their affinities of shape [images, C, K].
        zero_shot: Logits of the images. Shape: [N, C].
        labels: Class indices. Shape: [N].
        scale: Upper ends of beta and alpha.
        steps: Number of betas and alphas.
        chunk: Number of images that are held together.
    """
    betas, alphas = grid(scale, steps)

    def count(part: slice) -> Tensor:
        return right(near(part), zero_shot[part], labels[part], betas, alphas).sum(0)

    return _best(count, len(labels), chunk, betas, alphas)


def _best(count: Callable[[slice], Tensor], images: int, chunk: int, betas: list[float], alphas: list[float]) -> Found:
    """Return the best pair. `count`: from a slice of images to the correct ones per pair, shape [betas, alphas]."""
    counts = sum(count(slice(start, start + chunk)) for start in range(0, images, chunk))
    assert isinstance(counts, Tensor), "there are images"
    best = int(counts.flatten().argmax())  # of equal pairs the first
    return Found(alphas[best % len(alphas)], betas[best // len(alphas)], float(counts.flatten()[best]) / images)


def right(near: Tensor, base: Tensor, truth: Tensor, betas: list[float], alphas: list[float]) -> Tensor:
    """Return where the true class wins, by the rule of argmax: of equal logits the first class wins.

    Args:
        near: Affinities. Shape: [N, C, K].
        base: Zero-shot logits. Shape: [N, C].
        truth: True classes. Shape: [N].
        betas: Betas of the grid, evenly spaced.
        alphas: Alphas of the grid, above 0 and rising.

    Returns:
        True where the true class wins. Shape: [N, betas, alphas].
    """
    # Votes of the true class at every beta, exactly; of every other class only a bound over the whole grid.
    rows = torch.arange(len(truth), device=truth.device)
    own, own_base = near[rows, truth], base[rows, truth]
    own_votes = torch.stack([votes(own, beta) for beta in betas], 1)
    margin = _margin(near, base, own_votes, own_base, betas, alphas)
    margin = margin.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # NaN bounds nothing: keep it
    margin[rows, truth] = -torch.inf
    # A rival is a class that may reach the true one somewhere on the grid; all others need no further look.
    rivals = (margin >= 0).sum(1)
    # Strongest rivals first: an image that has lost at every pair needs no further rival.
    margin, order = margin.topk(max(1, int(rivals.max())))
    wins = torch.ones(len(truth), len(betas), len(alphas), dtype=torch.bool, device=truth.device)
    weight = base.new_tensor(alphas)
    for begin in range(0, order.shape[1], BLOCK):
        # images that have rivals left and have not lost everywhere
        rest = ((rivals > begin) & wins.flatten(1).any(1)).nonzero()
        if not len(rest):
            break
        here = rest.squeeze(1)
        picked = order[here, begin : begin + BLOCK]
        # a rival with a lower class index also wins a tie
        first = picked < truth[here, None]
        close = near[rest, picked]
        # topk fills rows of fewer rivals up with classes that are none: minus infinity takes them out.
        score = base[rest, picked].masked_fill(margin[here, begin : begin + BLOCK] < 0, -torch.inf)
        for row, beta in enumerate(betas):
            # [images, alphas, rivals]
            mixed = score[:, None] + weight[:, None] * votes(close, beta)[:, None]
            mine = (own_base[here, None] + weight * own_votes[here, row, None])[:, :, None]
            behind = (mixed < mine) | ((mixed == mine) & ~first[:, None])  # False for NaN, which argmax picks
            wins[here, row] &= behind.all(2)
    return wins


def _margin(
    near: Tensor, base: Tensor, own_votes: Tensor, own_base: Tensor, betas: list[float], alphas: list[float]
) -> Tensor:
    """Return an upper bound, over the whole grid, of each class's logit minus the true one's. Below 0, it never wins.

    Votes are convex in beta. Between two nodes a class's votes are therefore at most the straight line between them,
    and the true class's votes, which are known everywhere, are at most `gap` below their own line. So the difference is
    at most its larger value at the two nodes, plus the gap. It is linear in alpha, so the ends of alpha suffice.

    Returns:
        The bound. Shape: [N, C].
    """
    # Nodes: every STRIDE-th beta, and the last one.
    ends = [*range(0, len(betas) - 1, STRIDE), len(betas) - 1]
    # gap per node: the largest distance of the true class's line from its votes, in the intervals on both sides
    gaps = [own_votes.new_zeros(len(base)) for _ in ends]
    for node, (left, right) in enumerate(itertools.pairwise(ends)):
        share = torch.linspace(0, 1, right - left + 1, dtype=base.dtype, device=base.device)
        line = torch.lerp(own_votes[:, left, None], own_votes[:, right, None], share)
        gap = (line - own_votes[:, left : right + 1]).amax(1)
        gaps[node], gaps[node + 1] = gaps[node].maximum(gap), gap
    # Largest lead in votes over all nodes; `size` bounds the terms of the sum, for the rounding error.
    most, size = torch.full_like(base, -torch.inf), base.abs().amax(1)
    for node, gap in zip(ends, gaps, strict=True):
        lead = votes(near, betas[node])
        size = size.maximum(alphas[-1] * lead.amax(1))
        most = most.maximum(lead.sub_(own_votes[:, node, None] - gap[:, None]))
    # alpha times lead: largest at the last alpha if the lead is positive, at the first one if it is negative
    reach = torch.where(most > 0, most * alphas[-1], most * alphas[0])
    slack = 64 * torch.finfo(base.dtype).eps * size  # allows for rounding errors of sums of this size
    return reach.add_(base - own_base[:, None]).add_(slack[:, None])
