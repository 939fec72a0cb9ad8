"""Rendered pictures of everything that the tiny models know: digits and garments, by one numbering.

Shapes: N pictures, S image side.
"""

from __future__ import annotations

from functools import cache

import torch

from common.models.tiny import glyphs, silhouettes
from common.models.tiny.wordings import DIGITS


class Pictures:
    """Draws classes of `wordings.CLASSES`, by their number: digits first, then garments."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        """Pictures of `size` pixels; `generator` decides how each looks."""
        self.size, self.generator = size, generator
        self.banks = _banks()

    def __call__(self, labels: torch.Tensor) -> torch.Tensor:
        """Fresh pictures of `labels` [N]. Shape: [N, 1, S, S], in [0, 1]."""
        pixels = torch.zeros(len(labels), 1, self.size, self.size)
        for first, draw, bank in zip((0, len(DIGITS)), (glyphs.render, silhouettes.render), self.banks, strict=True):
            chosen = (labels >= first) & (labels < first + len(bank))
            if chosen.any():
                pixels[chosen] = draw(bank, labels[chosen] - first, self.size, self.generator)
        return pixels


@cache
def _banks() -> tuple[torch.Tensor, torch.Tensor]:
    return glyphs.glyph_bank(), silhouettes.silhouette_bank()
