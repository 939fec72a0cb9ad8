"""Define frozen encoders, and the views of an image that they encode: the whole image, or a random part of it."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from common.config.schema import EncoderConfig
from common.plugins import locate
from common.types import UserError

# Encoders: `clip.load` and `visual.load` name functions that make one (see `Load`).


class Encoder(Protocol):
    """Protocol of an encoder from images to features.

    Attributes:
        identity: Name of model and weights, for caches.
        source: Origin of the weights, for messages.
        look: Size and normalisation of its input images.
        width: D.
    """

    identity: str
    source: str
    look: Preprocessing
    width: int

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return raw features (not normalised). Shape: [B, 3, S, S] -> [B, D]."""


class TextEncoder(Encoder, Protocol):
    """Protocol of a CLIP: images and texts to features of one space. `positions`: P."""

    positions: int

    def maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features of the positions of each image, in the texts' space. Shape: [B, 3, S, S] -> [B, P, D]."""

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return raw text features; a text that is too long is truncated. Shape: [T, D]."""

    def embed(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token embeddings, shape [T, tokens, width], and the positions of the end tokens, shape [T].

        Raises:
            UserError: A text is too long.
        """

    def read(self, embedded: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Return the features that `texts` computes, from the embeddings of `embed`; gradients flow. Shape: [T, D]."""


class Load(Protocol):
    """Protocol of a function that `clip.load` or `visual.load` names."""

    def __call__(self, key: str, device: torch.device, cache_dir: Path, dtype: torch.dtype, **options: Any) -> Encoder:
        """
        Args:
            key: `clip` or `visual`, for errors.
            device: Device of the encoder.
            cache_dir: Folder for models that are built, not downloaded.
            dtype: Number format of the encoder.
            options: Further arguments from the configuration.

        Raises:
            UserError: The weights are missing, or of another model.
        """


def load(key: str, config: EncoderConfig, device: torch.device, cache_dir: Path) -> Encoder:
    """Load the encoder of a configuration. `key`: `clip` or `visual`."""
    import torch

    assert config.load is not None
    make: Load = locate(config.load, f"{key}.load")
    return make(key, device, cache_dir, getattr(torch, config.dtype), **config.options)


def check(key: str, config: EncoderConfig) -> None:
    """Check that a configured weights file exists, without loading it.

    Raises:
        UserError: Names the key and the file.
    """
    file = config.options.get("file")
    if file is not None and not Path(str(file)).expanduser().is_file():
        raise UserError(f"{key}.options.file={file} does not exist; {key}={config.name} reads its weights there")


# Views of an image.
#
# The test view is CLIP's unless the encoder says otherwise: resize the shorter side to S by bicubic interpolation, then
# crop the centre. A random view is a random crop, resized to S and perhaps mirrored. Each is drawn from a generator of
# its own, so that it depends only on seed, image key and view number.

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Preprocessing:
    """How pictures are prepared: their side, and what is subtracted from and divides the three channels.

    squash: a picture is resized to a square whole, as SigLIP's are, instead of losing what exceeds a square.
    interpolation: `bicubic` or `bilinear`.
    crop: share of the resized side that the central crop keeps; timm's `crop_pct`.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    squash: bool = False
    interpolation: str = "bicubic"
    crop: float = 1.0

    @property
    def name(self) -> str:
        """Return a short name that differs wherever the pixels would, for caches."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class View:
    """One view of an image.

    number: -1 for the test view, else the number of a random view.
    scale: range of the share of the image's area that a random view covers.
    flip: probability that it is mirrored.
    """

    number: int = -1
    seed: int = 0
    scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5

    @property
    def name(self) -> str:
        """Return the name of the view in caches."""
        drawn = f"{self.number}-{self.seed}-{self.scale[0]:g}-{self.scale[1]:g}-{self.flip:g}"
        return "test" if self.number < 0 else drawn


TEST = View()


def preprocess(picture: Image.Image, image: str, view: View, look: Preprocessing) -> torch.Tensor:
    """Return the normalised pixels of a view. Shape: [3, S, S].

    Args:
        picture: Image in RGB.
        image: Key of the image, which seeds a random view.
        view: View to return.
        look: Size and normalisation that the encoder needs.
    """
    how = InterpolationMode(look.interpolation)
    if view.number < 0:
        side = math.floor(look.size / look.crop)
        # one number is the shorter side, two are both
        seen = F.resize(picture, [side, side] if look.squash else [side], how)
        seen = F.center_crop(seen, [look.size, look.size])
    else:
        seen = random_view(picture, image, view, look.size, how)
    # [S, S, 3] bytes -> [3, S, S] in [0, 1]
    pixels = torch.from_numpy(np.array(seen)).permute(2, 0, 1).float() / 255
    return F.normalize(pixels, list(look.mean), list(look.std))


def random_view(
    picture: Image.Image, image: str, view: View, size: int, how: InterpolationMode = InterpolationMode.BICUBIC
) -> Image.Image:
    """Return a random crop, resized and perhaps mirrored; thread-safe, since each view has a generator of its own."""
    rng = random.Random(f"view-{view.seed}-{view.number}-{image}")
    top, left, height, width = crop_box(picture.width, picture.height, rng, view.scale)
    seen = F.resized_crop(picture, top, left, height, width, [size, size], how)
    return F.hflip(seen) if rng.random() < view.flip else seen


def crop_box(width: int, height: int, rng: random.Random, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop, by the rules of torchvision's RandomResizedCrop.

    The share of the area is uniform in `scale`, the ratio of width to height log-uniform in RATIO; after ten crops that
    do not fit, it is the largest central one whose ratio is allowed.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(*(math.log(bound) for bound in RATIO)))
        # width / height = ratio and width * height = area
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w
