"""CoOp (Zhou et al. 2022): the words before the class name are learnt, through the frozen text tower."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.config.schema import one_of
from common.few_shot.heads.base import DASSL_CROP, GradientHead, Pictures, Plan, Text, cosine_logits


class Context(nn.Module):
    """The token embeddings of every class's prompt, with learnt ones for its context.

    Where the class name stands: at the `end` (the paper's), in the `middle`, or at the `front` of the context.
    """

    embedded: Tensor
    order: Tensor

    def __init__(
        self,
        embedded: Tensor,
        name_lengths: Tensor,
        length: int = 16,
        position: Literal["end", "middle", "front"] = "end",
        per_class: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """
        Args:
            embedded: Embeddings of the start token, `length` words of any kind, the class name, a full stop, the end
                token and padding. Shape: [C, tokens, width].
            name_lengths: Tokens of the class names. Shape: [C].
            length: M, the learnt words.
            position: Where the class name stands.
            per_class: Every class learns a context of its own.
            generator: Draws the learnt words at the start, with standard deviation 0.02.
        """
        super().__init__()
        shape = (len(embedded), length) if per_class else (length,)
        drawn = torch.randn(*shape, embedded.shape[2], generator=generator) * 0.02
        self.context = nn.Parameter(drawn.to(embedded))
        self.register_buffer("embedded", embedded.detach(), persistent=False)  # they follow from the names
        before = {"end": length, "middle": length // 2, "front": 0}[position]
        self.register_buffer("order", _order(embedded.shape[1], name_lengths, length, before), persistent=False)

    def forward(self) -> Tensor:
        """Shape: [C, tokens, width]. The end token stands where it stood in `embedded`."""
        count, tokens, width = self.embedded.shape
        context = self.context.expand(count, -1, width)
        whole = torch.cat([self.embedded[:, :1], context, self.embedded[:, 1 + context.shape[1] :]], dim=1)
        return whole.gather(1, self.order[:, :, None].expand(count, tokens, width))


def _order(tokens: int, name_lengths: Tensor, length: int, before: int) -> Tensor:
    """Which token of "start, context, name, rest" stands where, if `before` learnt words precede the name."""
    rows = []
    for name_length in name_lengths.tolist():
        first, name, rest = 1 + before, 1 + length, 1 + length + name_length
        rows.append([*range(first), *range(name, rest), *range(first, name), *range(rest, tokens)])
    return torch.tensor(rows)


class CoOp(GradientHead):
    """CoOp: its context is trained through the frozen text tower; the last epoch counts."""

    crop = DASSL_CROP
    module: Context | None

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
            seed: Draws the start and the order of the pictures.
            epochs: Passes over the shots.
            batch: Pictures in a step.
            learning_rate: Peak of the learning rate.
            weight_decay: Weight decay of SGD.
            length: M, the learnt words.
            position: Where the class name stands: `end`, `middle`, `front`.
            per_class: Every class learns a context of its own, so no other class can be asked about.
            drop_last: See `Plan`.
        """
        super().__init__(seed=seed, plan=Plan("sgd", epochs, batch, learning_rate, weight_decay, drop_last))
        one_of("few_shot.position", position, ("end", "middle", "front"))
        self.length, self.position, self.per_class = length, position, per_class
        self.fixed_classes = per_class
        self.known: tuple[tuple[str, ...], Context, Tensor] | None = None  # names, context of them, ends

    def _context(self, text: Text) -> tuple[Context, Tensor]:
        """The prompts of some names, not yet with the learnt words."""
        assert text.clip is not None
        prompts = [" ".join(["X"] * self.length) + f" {name.replace('_', ' ')}." for name in text.names]
        embedded, ends = text.clip.embed(prompts)
        lengths = ends - self.length - 2  # without start, learnt words and full stop
        generator = torch.Generator().manual_seed(self.seed)
        made = Context(embedded, lengths.cpu(), self.length, self.position, self.per_class, generator)
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
        return cosine_logits(pictures.images, weights)

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.known = None
