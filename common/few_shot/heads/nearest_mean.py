"""Nearest class mean: our simplest baseline.

    logits = 100 x M^T

x: an image's feature of unit length. M: per class the mean of its images' features, each of unit length, normalised
again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from common.few_shot.heads.base import FewShotHead, Pictures, Text, base_logits, cosine_logits


class NearestMean(FewShotHead):
    """Nearest class mean: cosine to the mean of the shots' unit-length features. Uses no text and has no parameters."""

    needs = frozenset()
    fixed_classes = True
    steps = 1

    means: Tensor | None = None

    def step(self, number: int) -> dict[str, float]:
        seen, count = self.train.seen, len(self.text.names)
        sums = seen.images.new_zeros(count, seen.images.shape[1])
        # The sum needs no division by the count: it is normalised anyway.
        self.means = normalize(sums.index_add_(0, seen.labels, normalize(seen.images, dim=1)), dim=1)
        return {}

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        return base_logits(pictures, text) if self.means is None else cosine_logits(pictures.images, self.means)

    def head(self) -> dict[str, Any]:
        return {"means": self.means}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        super().ready(head, text)
        self.means = head["means"]
