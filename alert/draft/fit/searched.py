"""Alpha and beta of learners that remember the shots."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from alert.draft.fit.base import base_logits
from alert.draft.fit.data import Pictures, Text
from alert.draft.learners import grid_search, tip_adapter
from common.config.checks import positive
from common.types import UserError

Vote = Callable[[Pictures], Callable[[float], Tensor]]  # from pictures to a function from beta to what alpha multiplies


class Searched:
    """Alpha and beta, and their search."""

    def __init__(self, alpha: float, beta: float, search_scale: list[float]) -> None:
        """
        Args:
            alpha: As the fit begins.
            beta: As the fit begins.
            search_scale: Ends of beta and alpha in the search.
        """
        positive("few_shot: beta", beta)
        if len(search_scale) != 2 or min(search_scale) <= 0.1:
            raise UserError(f"few_shot: search_scale={search_scale} must be the ends of beta and alpha, above 0.1")
        self.alpha, self.beta, self.scale = alpha, beta, (search_scale[0], search_scale[1])

    def search(self, vote: Vote, pictures: Pictures, text: Text) -> grid_search.Found:
        """The pair of the highest accuracy on some pictures."""
        return grid_search.search(
            lambda part: vote(pictures.take(part)), base_logits(pictures, text), pictures.labels, self.scale
        )

    def search_keys(self, keys: tip_adapter.Keys, pictures: Pictures, text: Text) -> grid_search.Found:
        """The same for Tip-Adapter's votes, and much faster where there are many classes."""
        return grid_search.search_keys(
            lambda part: tip_adapter.affinity(pictures.take(part).images, keys),
            base_logits(pictures, text),
            pictures.labels,
            self.scale,
        )
