"""Render training images for the tiny models: digits (here) and garments (garments.py), under one numbering.

Digits are glyphs of the fonts that ship with matplotlib, under random affine views, averaged to 8x8 pixels with noise
and enlarged exactly as the real 8x8 digits are (Lanczos). No handwriting is shown, so real digits are a domain shift.

Shapes: N images, F fonts x strokes, S image side.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from common.models.tiny import garments
from common.models.tiny.wordings import DIGITS

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmss10", "cmb10", "cmtt10"),
)
STROKES = (0, 3)
CANVAS = 64
LOW = 8  # side of scikit-learn's digit images


def glyph_bank(characters: str = "0123456789") -> torch.Tensor:
    """Draw every character in every font, in a 40x48 box as NIST did. Shape: [characters, F, 64, 64], in [0, 1]."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 72) for name in FONTS]
    return torch.stack(
        [
            torch.stack([_glyph(character, font, stroke) for font in fonts for stroke in STROKES])
            for character in characters
        ]
    )


def _glyph(character: str, font: ImageFont.FreeTypeFont, stroke: int) -> torch.Tensor:
    drawing = Image.new("L", (160, 160))
    ImageDraw.Draw(drawing).text((40, 30), character, font=font, fill=255, stroke_width=stroke)
    drawing = drawing.crop(drawing.getbbox())
    scale = min(40 / drawing.width, 48 / drawing.height)
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(drawing.resize(size, Image.Resampling.BILINEAR), ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2))
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)


def lanczos_matrix(size: int) -> torch.Tensor:
    """Return the matrix of PIL's Lanczos enlargement along one axis. Shape: [size, 8]."""
    # resizing is linear, so the image of the identity is the matrix
    identity = Image.fromarray(np.eye(LOW, dtype=np.float32))
    return torch.from_numpy(np.array(identity.resize((LOW, size), Image.Resampling.LANCZOS)))


def render_glyphs(bank: torch.Tensor, labels: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw random views of the glyphs `labels` [N]. Shape: [N, 1, size, size], in [0, 1]."""
    n = len(labels)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    font = torch.randint(bank.shape[1], (n,), generator=generator)
    glyph = bank[labels, font].unsqueeze(1)  # [N, 1, 64, 64]
    # random rotation, shear, scale and shift
    angle, shear = uniform(-15, 15) * torch.pi / 180, uniform(-0.2, 0.2)
    scale_x, scale_y = 1 / (uniform(0.8, 1.2) * uniform(0.8, 1.2)), 1 / uniform(0.8, 1.2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    affine = torch.stack(
        [
            torch.stack([scale_x * (cos + shear * sin), scale_x * (shear * cos - sin), uniform(-0.12, 0.12)], 1),
            torch.stack([scale_y * sin, scale_y * cos, uniform(-0.12, 0.12)], 1),
        ],
        1,
    )
    grid = F.affine_grid(affine, [n, 1, 4 * LOW, 4 * LOW], align_corners=False)
    view = F.grid_sample(glyph, grid, align_corners=False)
    # down to 8x8 with random brightness and noise, then enlarged
    low = F.avg_pool2d(view, 4) * uniform(1.0, 1.5).view(-1, 1, 1, 1)
    low = (low + 0.05 * torch.randn(low.shape, generator=generator)).clamp(0, 1)  # [N, 1, 8, 8]
    enlarge = lanczos_matrix(size)
    return (enlarge @ low @ enlarge.T).clamp(0, 1)


class Pictures:
    """Source of images of `wordings.CLASSES`, by class number: digits first, then garments."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        """
        Args:
            size: Image side in pixels.
            generator: Source of all randomness.
        """
        self.size, self.generator = size, generator
        self.banks = _banks()

    def __call__(self, labels: torch.Tensor) -> torch.Tensor:
        """Draw new images of `labels` [N]. Shape: [N, 1, S, S], in [0, 1]."""
        pixels = torch.zeros(len(labels), 1, self.size, self.size)
        for first, draw, bank in zip(
            (0, len(DIGITS)), (render_glyphs, garments.render_garments), self.banks, strict=True
        ):
            chosen = (labels >= first) & (labels < first + len(bank))
            if chosen.any():
                pixels[chosen] = draw(bank, labels[chosen] - first, self.size, self.generator)
        return pixels


@cache
def _banks() -> tuple[torch.Tensor, torch.Tensor]:
    return glyph_bank(), garments.silhouette_bank()
