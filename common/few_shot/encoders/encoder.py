"""What a frozen encoder is. `clip.load` and `visual.load` name functions that make one (see `Load`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.config.schema_learner import EncoderConfig
from common.plugins import locate
from common.types import UserError

if TYPE_CHECKING:
    import torch

    from common.few_shot.encoders.views import Look


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
