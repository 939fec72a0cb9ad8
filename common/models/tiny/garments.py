"""Render garments, on which the tiny models are pre-trained: drawings with random proportions, and random views.

The drawings were designed after looking at some photographs of Fashion-MNIST, but no photograph is shown in training,
so real ones are a domain shift.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

# Drawings: polygons and lines with random proportions, one function per class of `data=fashion`. x goes right and y
# down, both from 0 to 1.


CANVAS = 112  # pixels of a drawing
Point = tuple[float, float]
DARK = (60, 110, 160)  # brightness of seams and prints; cloth is 255


class Pencil:
    """Canvas with drawing functions for one garment."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.image = rng, Image.new("L", (CANVAS, CANVAS))
        self.draw, self.between = ImageDraw.Draw(self.image), rng.uniform

    def often(self, share: float) -> bool:
        """Return True with probability `share`."""
        return self.rng.random() < share

    def dark(self) -> int:
        """Return a random brightness of `DARK`."""
        return self.rng.choice(DARK)

    def area(self, points: Sequence[Point], brightness: int = 255) -> None:
        """Draw a filled polygon."""
        self.draw.polygon([(x * CANVAS, y * CANVAS) for x, y in points], fill=brightness)

    def both(self, half: Sequence[Point], brightness: int = 255) -> None:
        """Draw a symmetric polygon; `half`: its right half from top to bottom, as distance from the middle and y."""
        self.area([(0.5 + x, y) for x, y in half] + [(0.5 - x, y) for x, y in reversed(half)], brightness)

    def line(self, points: Sequence[Point], width: float, brightness: int = 255) -> None:
        """Draw connected lines."""
        places = [(x * CANVAS, y * CANVAS) for x, y in points]
        self.draw.line(places, fill=brightness, width=max(1, round(width * CANVAS)), joint="curve")

    def oval(self, left: float, top: float, right: float, bottom: float, brightness: int = 0) -> None:
        """Draw a filled ellipse."""
        self.draw.ellipse([side * CANVAS for side in (left, top, right, bottom)], fill=brightness)


def upper_body(pencil: Pencil, sleeve: float, wider: tuple[float, float], length: float) -> tuple[float, float, float]:
    """Draw a garment of the upper body; return half the width of neck and body, and the neck's y.

    Args:
        pencil: Canvas.
        sleeve: Length of the sleeves, from 0 to 1.
        wider: Smallest and largest difference between half the width of hem and body.
        length: y of the hem.
    """
    between = pencil.between
    body, shoulder, neck, y = between(0.22, 0.29), between(0.24, 0.32), between(0.07, 0.14), between(0.02, 0.07)
    hem = body + between(*wider)
    pencil.both([(neck, y), (shoulder, y + between(0.03, 0.08)), (body + 0.02, 0.34), (body, 0.6), (hem, length)])
    end = 0.16 + sleeve * (length - 0.16) * between(0.9, 1.0)
    wide = between(0.09, 0.14) * (0.9 if sleeve < 0.5 else 0.6)
    out = min(0.5, shoulder + between(0.08, 0.2) * (0.4 + 0.6 * min(1.0, 1.5 * sleeve)))
    if sleeve > 0.05:
        for side in (1, -1):
            half = [(shoulder * 0.8, y + 0.02), (shoulder, y + 0.06), (out, end - 0.03), (out - wide, end)]
            pencil.area([(0.5 + side * x, at) for x, at in [*half, (shoulder - 0.05, 0.36)]])
    return neck, body, y


def t_shirt(pencil: Pencil) -> None:
    """Draw short sleeves, a round neck, sometimes a print."""
    between = pencil.between
    neck, _, y = upper_body(pencil, between(0.18, 0.38), (-0.02, 0.03), between(0.93, 0.99))
    pencil.oval(0.5 - neck, y - 0.08, 0.5 + neck, y + between(0.03, 0.1))
    if pencil.often(0.35):  # a print
        left, top = between(0.36, 0.48), between(0.25, 0.5)
        right, bottom = left + between(0.08, 0.22), top + between(0.06, 0.2)
        pencil.area([(left, top), (right, top), (right, bottom), (left, bottom)], pencil.dark())


def pullover(pencil: Pencil) -> None:
    """Draw long sleeves, sometimes a cuff or a print."""
    between = pencil.between
    neck, body, y = upper_body(pencil, between(0.88, 1.0), (-0.03, 0.01), between(0.9, 0.98))
    if pencil.often(0.7):
        pencil.oval(0.5 - neck, y - 0.06, 0.5 + neck, y + between(0.02, 0.06))
    if pencil.often(0.5):  # a cuff
        pencil.line([(0.5 - body, 0.9), (0.5 + body, 0.9)], 0.012, 160)
    if pencil.often(0.3):
        pencil.both([(0.14, 0.3), (0.14, between(0.38, 0.5))], pencil.dark())


def coat(pencil: Pencil) -> None:
    """Draw long sleeves and an opening, often with lapels, buttons or pockets."""
    between, length = pencil.between, pencil.between(0.93, 1.0)
    neck, _, y = upper_body(pencil, between(0.85, 1.0), (-0.01, 0.04), length)
    if pencil.often(0.6):  # lapels
        pencil.area([(0.5 - neck, y), (0.5 + neck, y), (0.5, between(0.15, 0.4))], pencil.dark())
    opening = 0.012 + (between(0.0, 0.06) if pencil.often(0.3) else 0.0)
    pencil.line([(0.5 + between(-0.03, 0.03), y), (0.5, length)], opening, pencil.rng.choice((0, *DARK[:2])))
    for button in (0.35, 0.48, 0.61, 0.74) if pencil.often(0.5) else ():
        pencil.oval(0.53, button, 0.55, button + 0.02, 70)
    for side in (1, -1) if pencil.often(0.4) else ():  # pockets
        pencil.line([(0.5 + side * 0.1, 0.62), (0.5 + side * 0.2, 0.64)], 0.014, 90)


def shirt(pencil: Pencil) -> None:
    """Draw any sleeves, and a collar with buttons or a low neck."""
    between = pencil.between
    sleeve = between(0.85, 1.0) if pencil.often(0.55) else between(0.0, 0.5)
    neck, _, y = upper_body(pencil, sleeve, (-0.01, 0.05), between(0.92, 1.0))
    kind = pencil.rng.random()
    if kind < 0.6:  # a collar, and a row of buttons
        pencil.area([(0.5 - neck, y - 0.01), (0.5 + neck, y - 0.01), (0.5, between(0.12, 0.22))], pencil.dark())
        pencil.line([(0.5, 0.14), (0.5, 0.95)], 0.01, pencil.rng.choice((120, 170)))
    elif kind < 0.85:  # a low neck
        pencil.area([(0.5 - neck, y - 0.02), (0.5 + neck, y - 0.02), (0.5, between(0.2, 0.35))], 0)


def dress(pencil: Pencil) -> None:
    """Draw a narrow waist and a long hem, often with sleeves."""
    between = pencil.between
    shoulder, waist, hem = between(0.1, 0.2), between(0.09, 0.17), between(0.13, 0.3)
    y, middle = between(0.0, 0.05), between(0.3, 0.45)
    top = [(shoulder * 0.5, y), (shoulder, y + 0.05), (waist + 0.02, 0.22), (waist, middle)]
    pencil.both([*top, (hem * between(0.8, 1.0), 0.7), (hem, between(0.95, 1.0))])
    if pencil.often(0.5):  # sleeves
        end, out = between(0.2, 0.65), shoulder + between(0.03, 0.13)
        for side in (1, -1):
            half = [(shoulder * 0.8, y + 0.02), (out, end), (out - 0.07, end + 0.02), (waist, 0.25)]
            pencil.area([(0.5 + side * x, at) for x, at in half])
    if pencil.often(0.6):
        pencil.oval(0.5 - shoulder * 0.5, y - 0.06, 0.5 + shoulder * 0.5, y + between(0.03, 0.14))
    if pencil.often(0.3):  # a belt
        pencil.line([(0.5 - waist, middle), (0.5 + waist, middle)], 0.02, 90)


def trouser(pencil: Pencil) -> None:
    """Draw two legs."""
    between = pencil.between
    waist, hip, hem = between(0.1, 0.17), between(0.13, 0.2), between(0.06, 0.11)
    crotch, foot, gap = between(0.25, 0.42), between(0.05, 0.16), between(0.005, 0.02)
    outside = [(0.0, 0.01), (waist, 0.01), (hip, crotch * 0.8), (foot + hem, 0.99)]
    for side in (1, -1):
        leg = [*outside, (foot - hem * 0.4, 0.99), (gap, crotch), (0.0, crotch)]
        pencil.area([(0.5 + side * x, y) for x, y in leg])


def bag(pencil: Pencil) -> None:
    """Draw a box, often with a handle, a flap or a clasp."""
    between = pencil.between
    high, wide, slope = between(0.35, 0.75), between(0.3, 0.49), between(-0.06, 0.08)
    bottom = between(0.92, 0.99) if pencil.often(0.7) else 0.5 + high / 2
    top = bottom - high
    if top > 0.1 and pencil.often(0.75):  # a handle
        inner, rise = between(0.1, 0.3), between(0.1, min(0.45, top + 0.08))
        box = [side * CANVAS for side in (0.5 - inner, top - rise, 0.5 + inner, top + rise)]
        pencil.draw.arc(box, 180, 360, fill=255, width=max(2, round(between(0.02, 0.05) * CANVAS)))
    pencil.both([(wide - slope, top), (wide, top + 0.08), (wide, bottom - 0.05), (wide - 0.03, bottom)])
    if pencil.often(0.6):  # a flap
        flap = top + high * between(0.25, 0.6)
        pencil.line([(0.5 - wide, flap), (0.5 + wide, flap)], 0.014, 100)
    if pencil.often(0.4):  # a clasp
        pencil.oval(0.46, top + high * 0.4, 0.54, top + high * 0.4 + 0.07, pencil.rng.choice((60, 180)))


def sandal(pencil: Pencil) -> None:
    """Draw straps on a thin sole, or a high heel."""
    between = pencil.between
    if pencil.often(0.3):
        _high_heel(pencil)
        return
    base, thick = between(0.6, 0.72), between(0.03, 0.09)
    above = [(0.02, base), (0.5, base - between(0.0, 0.03)), (0.98, base - between(0.0, 0.06))]
    pencil.area([*above, (0.98, base + thick), (0.4, base + thick), (0.04, base + thick * 0.8)])
    for _ in range(pencil.rng.randint(1, 4)):  # straps
        start = between(0.1, 0.8)
        end = min(0.95, start + between(0.08, 0.35))
        over = ((start + end) / 2, base - between(0.08, 0.28))
        pencil.line([(start, base), over, (end, base - 0.02)], between(0.02, 0.07))


def _high_heel(pencil: Pencil) -> None:
    between = pencil.between
    base, rise, heel = between(0.7, 0.85), between(0.2, 0.45), between(0.75, 0.92)
    pencil.line([(0.05, base), (0.3, base), (heel, base - rise)], 0.035)
    pencil.line([(heel, base - rise), (heel + between(-0.02, 0.06), base + 0.02)], between(0.02, 0.05))
    for _ in range(pencil.rng.randint(1, 3)):
        start = between(0.1, 0.4)
        end = (start + between(0.05, 0.3), base - between(0.1, 0.25))
        pencil.line([(start, base - 0.02), end], between(0.015, 0.04))
    if pencil.often(0.7):
        ankle = (heel - between(0.0, 0.1), base - rise - between(0.1, 0.25))
        pencil.line([(heel, base - rise), ankle, (heel - between(0.15, 0.3), base - rise - 0.08)], 0.02)


def sneaker(pencil: Pencil) -> None:
    """Draw a low shoe that points left, often with sole, laces or a stripe."""
    between, high_top = pencil.between, pencil.often(0.1)
    base, toe, ankle = between(0.62, 0.7) + 0.1 * high_top, between(0.1, 0.15), between(0.5, 0.66)
    high = between(0.4, 0.6) if high_top else between(0.24, 0.34)
    front = [(0.02, base - 0.04), (0.08, base - toe), (0.25, base - toe - 0.04), (ankle - 0.08, base - high)]
    back = [(0.75, base - high + 0.04), (0.95, base - high - between(0.0, 0.04)), (0.97, base - 0.05)]
    pencil.area([*front, (ankle, base - high - 0.01), *back, (0.98, base + 0.02), (0.03, base + 0.02)])
    if pencil.often(0.75):  # a sole
        sole = [(0.02, base - 0.02), (0.98, base - between(0.02, 0.05)), (0.98, base + 0.04), (0.05, base + 0.04)]
        pencil.area(sole, pencil.rng.choice((255, 110, 170)))
    for lace in range(3) if pencil.often(0.6) else ():
        x, y = 0.3 + 0.06 * lace, base - 0.17 - 0.03 * lace
        pencil.line([(x, y), (x + 0.08, y + 0.04)], 0.014, 120)
    if pencil.often(0.5):  # a stripe
        pencil.line([(0.5, base - 0.05), (0.66, base - high * 0.7)], between(0.02, 0.06), pencil.dark())


def ankle_boot(pencil: Pencil) -> None:
    """Draw a shaft on a shoe that points left, often with a heel."""
    between = pencil.between
    base, high, toe = between(0.78, 0.9), between(0.5, 0.75), between(0.12, 0.2)
    top, shin, back = base - high, between(0.45, 0.6), between(0.9, 0.97)
    front = [(0.03, base - 0.04), (0.07, base - toe), (0.3, base - toe - 0.08), (shin, base - between(0.28, 0.4))]
    shaft = [(shin + between(-0.04, 0.04), top), (back, top + between(-0.03, 0.05)), (back, base - 0.3)]
    pencil.area([*front, *shaft, (0.97, base - 0.05), (0.95, base), (0.05, base)])
    if pencil.often(0.7):  # a heel
        under = base + between(0.02, 0.1)
        heel = [(between(0.65, 0.8), base - 0.01), (0.96, base - 0.01), (0.95, under), (0.75, under)]
        pencil.area(heel, pencil.rng.choice((255, 120)))
    if pencil.often(0.5):
        pencil.line([(0.04, base), (0.95, base)], 0.03, pencil.dark())
    if pencil.often(0.3):  # elastic
        pencil.line([(0.62, top), (0.7, base - 0.3)], 0.05, 120)


SHAPES: dict[str, Callable[[Pencil], None]] = {  # by the names of data=fashion, in their order
    "t-shirt": t_shirt,
    "trouser": trouser,
    "pullover": pullover,
    "dress": dress,
    "coat": coat,
    "sandal": sandal,
    "shirt": shirt,
    "sneaker": sneaker,
    "bag": bag,
    "ankle boot": ankle_boot,
}


# Images: drawings under random affine views, filled with random cloth, at 28 x 28 pixels like Fashion-MNIST.
#
# Shapes: N images, V variants of a garment, S image side.

VARIANTS = 160
FINE, LOW = 56, 28  # side in pixels of a variant and of an image


def silhouette_bank(seed: int = 0) -> torch.Tensor:
    """Draw every garment in `VARIANTS` proportions. Shape: [garments, V, 56, 56], in [0, 1]."""
    rng = random.Random(seed)
    return torch.stack([torch.stack([_variant(shape, rng) for _ in range(VARIANTS)]) for shape in SHAPES.values()])


def _variant(shape: Callable[[Pencil], None], rng: random.Random) -> torch.Tensor:
    pencil = Pencil(rng)
    shape(pencil)
    small: Any = pencil.image.resize((FINE, FINE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)


def render_garments(bank: torch.Tensor, labels: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw random views of the garments `labels` [N], in random cloth. Shape: [N, 1, size, size], in [0, 1]."""
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    def sometimes(share: float) -> torch.Tensor:
        return uniform(0, 1, 1, 1, 1) < share

    chosen = bank[labels, torch.randint(bank.shape[1], (n,), generator=generator)].unsqueeze(1)  # [N, 1, 56, 56]
    # random rotation, shear, scale and shift
    angle, shear = uniform(-5, 5) * torch.pi / 180, uniform(-0.06, 0.06)
    scale_x, scale_y = 1 / uniform(0.88, 1.06), 1 / uniform(0.92, 1.06)
    cos, sin = torch.cos(angle), torch.sin(angle)
    across = torch.stack([scale_x * (cos + shear * sin), scale_x * (shear * cos - sin), uniform(-0.06, 0.06)], 1)
    down = torch.stack([scale_y * sin, scale_y * cos, uniform(-0.06, 0.06)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), [n, 1, FINE, FINE], align_corners=False)
    view = F.avg_pool2d(F.grid_sample(chosen, grid, align_corners=False), FINE // LOW)  # [N, 1, 28, 28]

    def field(side: int, mode: str) -> torch.Tensor:
        return F.interpolate(uniform(-1, 1, 1, side, side), (LOW, LOW), mode=mode)

    # cloth: brightness, shading, patterns of two sizes, stripes across or along
    along = torch.arange(float(LOW))
    lines = torch.where(sometimes(0.5), along.view(1, 1, -1, 1), along.view(1, 1, 1, -1))
    stripes = torch.sign(torch.sin(2 * torch.pi * lines / uniform(2, 7, 1, 1, 1)))
    cloth = uniform(0.25, 1.05, 1, 1, 1) + field(4, "bilinear") * uniform(0, 0.35, 1, 1, 1)
    cloth = cloth + field(LOW, "nearest") * uniform(0, 0.5, 1, 1, 1) * sometimes(0.35)  # small patterns
    cloth = cloth + field(9, "nearest") * uniform(0, 0.5, 1, 1, 1) * sometimes(0.3)  # large ones
    cloth = cloth + stripes * uniform(0, 0.3, 1, 1, 1) * sometimes(0.25)
    low = (view * cloth.clamp(0.08, 1.2)).clamp(0, 1)
    # noise on the garment only: the background of Fashion-MNIST is black
    low = (low + 0.02 * torch.randn(low.shape, generator=generator) * (view > 0.02)).clamp(0, 1)
    return F.interpolate(low, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
