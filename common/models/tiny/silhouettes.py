"""Rendered garments: with the glyphs, the only pictures the tiny models are pre-trained on.

Drawn shapes (common/models/tiny/garments.py) under random affine views, filled with random cloth, in 28 x 28 pixels as
Fashion-MNIST has them. No photograph is ever shown, so real ones are a genuine domain shift.

Shapes: N pictures, V variants of a garment, S image side.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.models.tiny.garments import SHAPES, Pencil

VARIANTS = 160
FINE, LOW = 56, 28  # pixels of a variant, of a picture


def silhouette_bank(seed: int = 0) -> torch.Tensor:
    """Every garment in `VARIANTS` proportions. Shape: [garments, V, 56, 56], in [0, 1]."""
    rng = random.Random(seed)
    return torch.stack([torch.stack([_variant(shape, rng) for _ in range(VARIANTS)]) for shape in SHAPES.values()])


def _variant(shape: Callable[[Pencil], None], rng: random.Random) -> torch.Tensor:
    pencil = Pencil(rng)
    shape(pencil)
    small: Any = pencil.image.resize((FINE, FINE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)


def render(bank: torch.Tensor, labels: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random views of the garments `labels` [N], in random cloth. Shape: [N, 1, size, size], in [0, 1]."""
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    def sometimes(share: float) -> torch.Tensor:
        return uniform(0, 1, 1, 1, 1) < share

    chosen = bank[labels, torch.randint(bank.shape[1], (n,), generator=generator)].unsqueeze(1)  # [N, 1, 56, 56]
    angle, shear = uniform(-5, 5) * torch.pi / 180, uniform(-0.06, 0.06)
    scale_x, scale_y = 1 / uniform(0.88, 1.06), 1 / uniform(0.92, 1.06)
    cos, sin = torch.cos(angle), torch.sin(angle)
    across = torch.stack([scale_x * (cos + shear * sin), scale_x * (shear * cos - sin), uniform(-0.06, 0.06)], 1)
    down = torch.stack([scale_y * sin, scale_y * cos, uniform(-0.06, 0.06)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), [n, 1, FINE, FINE], align_corners=False)
    view = F.avg_pool2d(F.grid_sample(chosen, grid, align_corners=False), FINE // LOW)  # [N, 1, 28, 28]

    def field(side: int, mode: str) -> torch.Tensor:
        return F.interpolate(uniform(-1, 1, 1, side, side), (LOW, LOW), mode=mode)

    along = torch.arange(float(LOW))
    lines = torch.where(sometimes(0.5), along.view(1, 1, -1, 1), along.view(1, 1, 1, -1))
    stripes = torch.sign(torch.sin(2 * torch.pi * lines / uniform(2, 7, 1, 1, 1)))
    cloth = uniform(0.25, 1.05, 1, 1, 1) + field(4, "bilinear") * uniform(0, 0.35, 1, 1, 1)
    cloth = cloth + field(LOW, "nearest") * uniform(0, 0.5, 1, 1, 1) * sometimes(0.35)  # small patterns
    cloth = cloth + field(9, "nearest") * uniform(0, 0.5, 1, 1, 1) * sometimes(0.3)  # large ones
    cloth = cloth + stripes * uniform(0, 0.3, 1, 1, 1) * sometimes(0.25)
    low = (view * cloth.clamp(0.08, 1.2)).clamp(0, 1)
    low = (low + 0.02 * torch.randn(low.shape, generator=generator) * (view > 0.02)).clamp(0, 1)
    return F.interpolate(low, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
