"""Pictures (a stand-in until the branch with the loader is merged)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from common.types import BadImage, Images, UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def combine(parts: Sequence[tuple[Iterable[str], Images]]) -> Images:
    raise NotImplementedError


class Loader:
    def __init__(
        self, images: Images, size: int, policy: str = "squash", cache: object = None, workers: int = 1
    ) -> None:
        self.images, self.size = images, size

    def __call__(self, keys: Sequence[str]) -> list[Image]:
        from PIL.Image import Resampling

        size = (self.size, self.size)
        return [self.images.open(key).convert("RGB").resize(size, Resampling.LANCZOS) for key in keys]


def examine(loader: Loader, keys: Sequence[str]) -> dict[str, str]:
    return {}


def report(bad: dict[str, str], total: int) -> UserError:
    raise NotImplementedError(BadImage)
