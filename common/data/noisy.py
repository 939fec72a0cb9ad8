"""Read another dataset with noise added to its images: a shifted target for data without one (ALERT Table 2 in small).

The noise is Gaussian as in ImageNet-C (arXiv 1903.12261, its five severities), seeded by the image's key, so that an
image is the same in every run and on every machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common.data.listing import Location
from common.plugins import locate
from common.types import Images, Source, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

PREFIX = "noisy/"  # of keys: a run may use the same images without noise, too
SIGMA = {1: 0.08, 2: 0.12, 3: 0.18, 4: 0.26, 5: 0.38}  # standard deviation, for pixel values from 0 to 1


@dataclass(frozen=True)
class Noisy:
    """Images of another dataset, with noise added on opening."""

    images: Images
    severity: int

    def open(self, image: str) -> Image:
        import numpy as np
        from PIL import Image as Pillow

        clean = self.images.open(_clean(image))
        pixels = np.asarray(clean.convert("RGB"), np.float32)
        seed = int.from_bytes(hashlib.sha256(f"noise {_clean(image)}".encode()).digest()[:8], "big")
        noise = np.random.Generator(np.random.PCG64(seed)).standard_normal(pixels.shape, np.float32)
        noisy = Pillow.fromarray((pixels + 255 * SIGMA[self.severity] * noise).round().clip(0, 255).astype(np.uint8))
        noisy.info = clean.info
        return noisy

    def stamp(self, image: str) -> str:
        return f"{self.images.stamp(_clean(image))} noise {self.severity}"

    def size(self, image: str) -> int:
        return self.images.size(_clean(image))

    def content(self, image: str, start: int = 0, length: int | None = None) -> bytes:
        return self.images.content(_clean(image), start, length)


def read(location: Location, *, reader: str, severity: int = 3) -> Source:
    """Read the dataset of another reader, with noise.

    Args:
        location: Passed on to the other reader.
        reader: Dotted path of the other reader.
        severity: Severity of the noise, 1 to 5.

    Raises:
        UserError: There is no such severity or reader.
    """
    if severity not in SIGMA:
        raise UserError(f"data.reader.severity={severity}: give 1 to {max(SIGMA)}")
    found: Source = locate(reader, "data.reader.reader")(location)
    train, val, test = (
        tuple(replace(item, image=f"{PREFIX}{item.image}") for item in part)
        for part in (found.train, found.val, found.test)
    )
    fingerprint = f"{found.fingerprint} noise {severity}"
    images = Noisy(found.images, severity)
    return replace(found, train=train, val=val, test=test, images=images, fingerprint=fingerprint)


def _clean(image: str) -> str:
    return image.removeprefix(PREFIX)
