"""What a frozen encoder is, and how it sees a picture: whole, or as one of its random views."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
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

# What a frozen encoder is. `clip.load` and `visual.load` name functions that make one (see `Load`).


class Encoder(Protocol):
    """Pictures to features.

    identity: model and weights, as a name for caches. source: where the weights came from. look: size and normalisation
    of its pictures. width: D.
    """

    identity: str
    source: str
    look: Look
    width: int

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raw features. Shape: [B, 3, S, S] -> [B, D]."""


class TextEncoder(Encoder, Protocol):
    """A CLIP: pictures and texts to features of one space. positions: P."""

    positions: int

    def maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of the positions of a picture, in the space of the texts. Shape: [B, 3, S, S] -> [B, P, D]."""

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Raw features; a text that is too long loses its end. Shape: [T, D]."""

    def embed(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token embeddings, shape [T, tokens, width], and the position of the end token, shape [T].

        Raises:
            UserError: A text is too long.
        """

    def read(self, embedded: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """What `texts` makes of the embeddings of `embed`; gradients flow. Shape: [T, D]."""


class Load(Protocol):
    """A function that `clip.load` or `visual.load` names."""

    def __call__(self, key: str, device: torch.device, cache_dir: Path, dtype: torch.dtype, **options: Any) -> Encoder:
        """
        Args:
            key: `clip` or `visual`, for errors.
            device: Where it computes.
            cache_dir: For models that are built.
            dtype: It computes in.
            options: From the configuration.

        Raises:
            UserError: The weights are missing, or of another model.
        """


def load(key: str, config: EncoderConfig, device: torch.device, cache_dir: Path) -> Encoder:
    """The encoder of a configuration. `key`: `clip` or `visual`."""
    import torch

    assert config.load is not None
    make: Load = locate(config.load, f"{key}.load")
    return make(key, device, cache_dir, getattr(torch, config.dtype), **config.options)


def check(key: str, config: EncoderConfig) -> None:
    """A file of weights that is not there costs a second. Loads nothing.

    Raises:
        UserError: Names the key and the file.
    """
    file = config.options.get("file")
    if file is not None and not Path(str(file)).expanduser().is_file():
        raise UserError(f"{key}.options.file={file} does not exist; {key}={config.name} reads its weights there")


# A picture as an encoder sees it: whole, or as one of its random views.
#
# The test view is CLIP's: the shorter side to S by bicubic interpolation, then the centre. A random view is a part of
# the picture, enlarged to S and perhaps mirrored, drawn from a generator of its own, so that it depends on seed,
# picture and number alone.

BICUBIC = InterpolationMode.BICUBIC
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Look:
    """How pictures are prepared: their side, and what is subtracted from and divides the three channels.

    squash: a picture is brought to S x S whole, as SigLIP's are, instead of losing what exceeds a square.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    squash: bool = False


@dataclass(frozen=True)
class View:
    """Which view of a picture. number: -1 is the test view. scale: shares of the picture that a random view covers.
    flip: how probably it is mirrored.
    """

    number: int = -1
    seed: int = 0
    scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5

    @property
    def name(self) -> str:
        """Names the view in caches."""
        drawn = f"{self.number}-{self.seed}-{self.scale[0]:g}-{self.scale[1]:g}-{self.flip:g}"
        return "test" if self.number < 0 else drawn


TEST = View()


def see(picture: Image.Image, image: str, view: View, look: Look) -> torch.Tensor:
    """The normalised pixels of a view. Shape: [3, S, S].

    Args:
        picture: RGB.
        image: Its key, which a random view is drawn from.
        view: Which one.
        look: Size and normalisation that the encoder wants.
    """
    if view.number < 0 and look.squash:
        seen = F.resize(picture, [look.size, look.size], BICUBIC)
    elif view.number < 0:
        seen = F.center_crop(F.resize(picture, [look.size], BICUBIC), [look.size, look.size])
    else:
        seen = random_view(picture, image, view, look.size)
    pixels = torch.from_numpy(np.array(seen)).permute(2, 0, 1).float() / 255
    return F.normalize(pixels, list(look.mean), list(look.std))


def random_view(picture: Image.Image, image: str, view: View, size: int) -> Image.Image:
    """A random part, enlarged, and perhaps mirrored; from a generator of its own, so threads may draw side by side."""
    rng = random.Random(f"view-{view.seed}-{view.number}-{image}")
    top, left, height, width = crop_box(picture.width, picture.height, rng, view.scale)
    seen = F.resized_crop(picture, top, left, height, width, [size, size], BICUBIC)
    return F.hflip(seen) if rng.random() < view.flip else seen


def crop_box(width: int, height: int, rng: random.Random, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part, by the rules of torchvision's RandomResizedCrop.

    Its share of the area is uniform in `scale`, its ratio of width to height log-uniform in RATIO; after ten parts that
    do not fit, the largest one in the centre whose ratio is allowed.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(*(math.log(bound) for bound in RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w
