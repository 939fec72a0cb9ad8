"""The search of alpha and beta (Zhang et al. 2022): of every pair of a grid, the first of the highest accuracy.

`search` tries every pair on every class, for any votes. `search_keys` finds the same for Tip-Adapter's votes, a sum of
exponentials, in a fraction of the work: most classes can be shown never to come near the true one.
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

STEPS = (200, 20)  # of beta and alpha
STRIDE = 16  # betas from one node to the next
BLOCK = 16  # classes that are compared with the true one together
Vote = Callable[[Pictures], Callable[[float], Tensor]]  # from pictures to a function from beta to what alpha multiplies


class Searched:
    """Alpha and beta, and their search."""

    def __init__(self, alpha: float, beta: float, search_scale: list[float]) -> None:
        """
        Args:
            alpha: Weight of the votes as the fit begins.
            beta: How sharply a vote falls with the distance, as the fit begins.
            search_scale: Ends of beta and alpha in the search.
        """
        positive("few_shot.beta", beta)
        if len(search_scale) != 2 or min(search_scale) <= 0.1:
            raise UserError(f"few_shot.search_scale={search_scale} must be the ends of beta and alpha, above 0.1")
        self.alpha, self.beta, self.scale = alpha, beta, (search_scale[0], search_scale[1])

    def search(self, vote: Vote, pictures: Pictures, text: Text) -> Found:
        """The pair of the highest accuracy on some pictures."""
        return search(lambda part: vote(pictures.take(part)), base_logits(pictures, text), pictures.labels, self.scale)

    def search_keys(self, keys: Keys, pictures: Pictures, text: Text) -> Found:
        """The same for Tip-Adapter's votes, and much faster where there are many classes."""
        return search_keys(
            lambda part: affinity(pictures.take(part).images, keys),
            base_logits(pictures, text),
            pictures.labels,
            self.scale,
        )


def grid(scale: tuple[float, float], steps: tuple[int, int] = STEPS) -> tuple[list[float], list[float]]:
    """The betas and alphas that are tried: evenly from 0.1 towards `scale`, which is not reached itself.

    Args:
        scale: Ends of beta and alpha.
        steps: How many betas and alphas.

    >>> grid((2.1, 1.1), (2, 2))
    ([0.1, 1.1], [0.1, 0.6])
    """
    betas, alphas = (
        [i * (end - 0.1) / count + 0.1 for i in range(count)] for end, count in zip(scale, steps, strict=True)
    )
    return betas, alphas


@dataclass(frozen=True)
class Found:
    """The best pair of a search, and its accuracy."""

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
    """The pair of the highest accuracy; of equal ones the first, beta outside and alpha inside, as the authors search.

    Accuracies of all pairs are counted chunk by chunk, so that the images' affinities are never held together, and one
    exponential per beta serves all alphas.

    Args:
        vote: From some images to a function from beta to what alpha multiplies. Shape of that: [images, C].
        zero_shot: Logits of the images. Shape: [N, C].
        labels: Shape: [N].
        scale: Ends of beta and alpha.
        steps: How many betas and alphas.
        chunk: Images that are held together.
    """
    betas, alphas = grid(scale, steps)

    def count(part: slice) -> Tensor:
        base, truth, voted = zero_shot[part], labels[part], vote(part)
        mixed, counts = torch.empty_like(base), truth.new_zeros(len(betas), len(alphas))
        for row, beta in enumerate(betas):
            added = voted(beta)
            for column, alpha in enumerate(alphas):
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
    """What `search` finds for Tip-Adapter's votes, up to rounding, from the true class and its rivals alone.

    Args:
        near: From some images to their affinities. Shape of those: [images, C, K].
        zero_shot: Logits of the images. Shape: [N, C].
        labels: Shape: [N].
        scale: Ends of beta and alpha.
        steps: How many betas and alphas.
        chunk: Images that are held together.
    """
    betas, alphas = grid(scale, steps)

    def count(part: slice) -> Tensor:
        return right(near(part), zero_shot[part], labels[part], betas, alphas).sum(0)

    return _best(count, len(labels), chunk, betas, alphas)


def _best(count: Callable[[slice], Tensor], images: int, chunk: int, betas: list[float], alphas: list[float]) -> Found:
    """`count`: how many of some images are right, shape [betas, alphas]."""
    counts = sum(count(slice(start, start + chunk)) for start in range(0, images, chunk))
    assert isinstance(counts, Tensor), "there are images"
    best = int(counts.flatten().argmax())  # of equal ones the first
    return Found(alphas[best % len(alphas)], betas[best // len(alphas)], float(counts.flatten()[best]) / images)


def right(near: Tensor, base: Tensor, truth: Tensor, betas: list[float], alphas: list[float]) -> Tensor:
    """Where the true class wins, as argmax has it: of equal logits the first class's.

    Args:
        near: Affinities. Shape: [N, C, K].
        base: Zero-shot logits. Shape: [N, C].
        truth: Shape: [N].
        betas: Betas of the grid, in even steps.
        alphas: Alphas of the grid, above 0 and rising.

    Returns:
        Shape: [N, betas, alphas].
    """
    rows = torch.arange(len(truth), device=truth.device)
    own, own_base = near[rows, truth], base[rows, truth]
    own_votes = torch.stack([votes(own, beta) for beta in betas], 1)
    margin = _margin(near, base, own_votes, own_base, betas, alphas)
    margin = margin.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # of these nothing is known
    margin[rows, truth] = -torch.inf
    rivals = (margin >= 0).sum(1)
    # the strongest first: an image that they beat at every pair needs no other
    margin, order = margin.topk(max(1, int(rivals.max())))
    wins = torch.ones(len(truth), len(betas), len(alphas), dtype=torch.bool, device=truth.device)
    weight = base.new_tensor(alphas)
    for begin in range(0, order.shape[1], BLOCK):
        rest = ((rivals > begin) & wins.flatten(1).any(1)).nonzero()
        if not len(rest):
            break
        here = rest.squeeze(1)
        picked = order[here, begin : begin + BLOCK]
        first = picked < truth[here, None]
        close = near[rest, picked]
        score = base[rest, picked].masked_fill(margin[here, begin : begin + BLOCK] < 0, -torch.inf)
        for row, beta in enumerate(betas):
            # [images, alphas, rivals]
            mixed = score[:, None] + weight[:, None] * votes(close, beta)[:, None]
            mine = (own_base[here, None] + weight * own_votes[here, row, None])[:, :, None]
            behind = (mixed < mine) | ((mixed == mine) & ~first[:, None])  # false of NaN, which argmax takes
            wins[here, row] &= behind.all(2)
    return wins


def _margin(
    near: Tensor, base: Tensor, own_votes: Tensor, own_base: Tensor, betas: list[float], alphas: list[float]
) -> Tensor:
    """How far a class comes at most above the true one, anywhere on the grid: below 0, it never wins.

    Votes are convex in beta. Between two nodes a class's votes are thus never above the straight line, and the true
    class's, which are known everywhere, are below theirs by `gap` at most. So the difference is at most what it is at
    one of the nodes, and the gap. It is linear in alpha: the ends of alpha are enough.

    Returns:
        Shape: [N, C].
    """
    ends = [*range(0, len(betas) - 1, STRIDE), len(betas) - 1]
    gaps = [own_votes.new_zeros(len(base)) for _ in ends]
    for node, (left, right) in enumerate(itertools.pairwise(ends)):
        share = torch.linspace(0, 1, right - left + 1, dtype=base.dtype, device=base.device)
        line = torch.lerp(own_votes[:, left, None], own_votes[:, right, None], share)
        gap = (line - own_votes[:, left : right + 1]).amax(1)
        gaps[node], gaps[node + 1] = gaps[node].maximum(gap), gap
    most, size = torch.full_like(base, -torch.inf), base.abs().amax(1)
    for node, gap in zip(ends, gaps, strict=True):
        lead = votes(near, betas[node])
        size = size.maximum(alphas[-1] * lead.amax(1))
        most = most.maximum(lead.sub_(own_votes[:, node, None] - gap[:, None]))
    # the largest lead serves the last alpha if it is above 0, the first one if below
    reach = torch.where(most > 0, most * alphas[-1], most * alphas[0])
    slack = 64 * torch.finfo(base.dtype).eps * size  # rounding of sums of this size
    return reach.add_(base - own_base[:, None]).add_(slack[:, None])
