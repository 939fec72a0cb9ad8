"""Learners that train a module beside CLIP: CoOp, CLIP-Adapter, VT-CLIP, CALIP-FS."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from alert.draft.fit.base import DASSL_CROP, RECONSTRUCTION, maps_of, three
from alert.draft.fit.data import Pictures, Plan, Text
from alert.draft.fit.trained import Trained
from alert.draft.learners import calip_fs, clip_adapter, coop, vt_clip, zero_shot
from common.config.checks import one_of


class CoOp(Trained):
    """CoOp: its context is trained through the frozen text tower; the last epoch counts."""

    crop = DASSL_CROP
    module: coop.Context | None

    def __init__(
        self,
        *,
        seed: int,
        epochs: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        length: int = 16,
        position: Literal["end", "middle", "front"] = "end",
        per_class: bool = False,
        drop_last: bool = False,
    ) -> None:
        """
        Args:
            seed: Of the start.
            epochs: Of the training.
            batch: Pictures.
            learning_rate: The peak.
            weight_decay: Of SGD.
            length: M, the learnt words.
            position: Of the class name: `end`, `middle`, `front`.
            per_class: A context of its own for every class, which then cannot be others.
            drop_last: See `Plan`.
        """
        super().__init__(seed=seed, plan=Plan("sgd", epochs, batch, learning_rate, weight_decay, drop_last))
        one_of("few_shot.coop.position", position, ("end", "middle", "front"))
        self.length, self.position, self.per_class = length, position, per_class
        self.fixed_classes = per_class
        self.known: tuple[tuple[str, ...], coop.Context, Tensor] | None = None  # names, context of them, ends

    def _context(self, text: Text) -> tuple[coop.Context, Tensor]:
        """The prompts of some names, not yet with the learnt words."""
        assert text.clip is not None
        prompts = [" ".join(["X"] * self.length) + f" {name.replace('_', ' ')}." for name in text.names]
        embedded, ends = text.clip.embed(prompts)
        lengths = ends - self.length - 2  # without start, learnt words and full stop
        generator = torch.Generator().manual_seed(self.seed)
        made = coop.Context(embedded, lengths.cpu(), self.length, self.position, self.per_class, generator)
        return made.to(embedded.device), ends

    def build(self) -> nn.Module:
        made, ends = self._context(self.text)
        self.known = self.text.names, made, ends
        return made

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        assert text.clip is not None and self.module is not None
        if self.known is None or self.known[0] != text.names:
            made, ends = self._context(text)
            made.context = self.module.context
            self.known = text.names, made, ends
        _, made, ends = self.known
        weights = normalize(text.clip.read(made(), ends), dim=1)
        return zero_shot.logits(pictures.images, weights)

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.known = None


class ClipAdapter(Trained):
    """CLIP-Adapter; the last epoch counts."""

    crop = DASSL_CROP
    module: clip_adapter.Adapter | None

    def __init__(
        self,
        *,
        seed: int,
        epochs: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        ratio: float,
        drop_last: bool = False,
    ) -> None:
        """
        Args:
            seed: Of the start.
            epochs: Of the training.
            batch: Pictures.
            learning_rate: The peak.
            weight_decay: Of SGD.
            ratio: Share of the adapter.
            drop_last: See `Plan`.
        """
        super().__init__(seed=seed, plan=Plan("sgd", epochs, batch, learning_rate, weight_decay, drop_last))
        self.ratio = ratio

    def build(self) -> nn.Module:
        return clip_adapter.Adapter(self.text.known.shape[1])

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        assert self.module is not None
        return clip_adapter.logits(self.module, pictures.images, text.known, self.ratio)


class VTClip(Trained):
    """VT-CLIP."""

    needs = frozenset({"text", "maps"})
    remark = RECONSTRUCTION
    module: vt_clip.TextAttention | None

    def __init__(
        self,
        *,
        seed: int,
        epochs: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        heads: int = vt_clip.HEADS,
        drop_last: bool = False,
    ) -> None:
        """
        Args:
            seed: Of the start.
            epochs: Of the training.
            batch: Pictures.
            learning_rate: The peak.
            weight_decay: Of SGD.
            heads: Of the attention.
            drop_last: See `Plan`.
        """
        super().__init__(seed=seed, plan=Plan("sgd", epochs, batch, learning_rate, weight_decay, drop_last))
        self.heads = heads

    def build(self) -> nn.Module:
        return vt_clip.TextAttention(self.text.known.shape[1], self.heads)

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        assert self.module is not None
        return vt_clip.logits(self.module, pictures.images, maps_of(pictures), text.known)


class CalipFS(Trained):
    """CALIP-FS."""

    needs = frozenset({"text", "maps"})
    remark = RECONSTRUCTION
    module: calip_fs.CrossAttention | None

    def __init__(
        self,
        *,
        seed: int,
        epochs: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        betas: list[float],
        hidden: int = calip_fs.HIDDEN,
        drop_last: bool = False,
    ) -> None:
        """
        Args:
            seed: Of the start.
            epochs: Of the training.
            batch: Pictures.
            learning_rate: The peak.
            weight_decay: Of SGD.
            betas: Of the three terms.
            hidden: Width of the network.
            drop_last: See `Plan`.
        """
        super().__init__(seed=seed, plan=Plan("sgd", epochs, batch, learning_rate, weight_decay, drop_last))
        self.betas, self.hidden = three(betas), hidden

    def build(self) -> nn.Module:
        return calip_fs.CrossAttention(self.text.known.shape[1], self.hidden)

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        assert self.module is not None
        return calip_fs.logits(self.module, pictures.images, maps_of(pictures), text.known, self.betas)
