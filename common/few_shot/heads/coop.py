"""CoOp (Zhou et al. 2022): learn the context words before the class name through the frozen text tower."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.config.schema import one_of
from common.few_shot.heads.base import DASSL_CROP, GradientHead, Pictures, Plan, Text, cosine_logits


class Context(nn.Module):
    """Token embeddings of every class's prompt with learnt context vectors.

    The class name stands at the `end` (the paper's), in the `middle`, or at the `front` of the context.
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
            embedded: Embeddings of the start token, `length` placeholder words, the class name, a full stop, the end
                token and padding. Shape: [C, tokens, width].
            name_lengths: Number of tokens of each class name. Shape: [C].
            length: M, the number of context vectors.
            position: Position of the class name.
            per_class: Learn one context per class.
            generator: Generator of the initial context, which has standard deviation 0.02.
        """
        super().__init__()
        shape = (len(embedded), length) if per_class else (length,)
        drawn = torch.randn(*shape, embedded.shape[2], generator=generator) * 0.02
        self.context = nn.Parameter(drawn.to(embedded))
        self.register_buffer("embedded", embedded.detach(), persistent=False)  # recomputed from the names, not saved
        before = {"end": length, "middle": length // 2, "front": 0}[position]
        self.register_buffer("order", _order(embedded.shape[1], name_lengths, length, before), persistent=False)

    def forward(self) -> Tensor:
        """Return prompts with the learnt context; end tokens keep their positions. Shape: [C, tokens, width]."""
        count, tokens, width = self.embedded.shape
        context = self.context.expand(count, -1, width)
        # Put the context in place of the placeholder words, then reorder the tokens for the position of the class name.
        whole = torch.cat([self.embedded[:, :1], context, self.embedded[:, 1 + context.shape[1] :]], dim=1)
        return whole.gather(1, self.order[:, :, None].expand(count, tokens, width))


def _order(tokens: int, name_lengths: Tensor, length: int, before: int) -> Tensor:
    """Return which token of "start, context, name, rest" stands where if `before` context vectors precede the name."""
    rows = []
    for name_length in name_lengths.tolist():
        first, name, rest = 1 + before, 1 + length, 1 + length + name_length
        rows.append([*range(first), *range(name, rest), *range(first, name), *range(rest, tokens)])
    return torch.tensor(rows)


class CoOp(GradientHead):
    """CoOp: train the context through the frozen text tower; the last epoch is kept."""

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
            seed: Seed of initialisation and order of the images.
            epochs: Passes over the shots.
            batch: Images in a step.
            learning_rate: Peak learning rate.
            weight_decay: Weight decay of SGD.
            length: M, the number of context vectors.
            position: Position of the class name: `end`, `middle`, `front`.
            per_class: Learn one context per class, so that no other classes can be tested.
            drop_last: Drop an incomplete last batch, see `Plan`.
        """
        super().__init__(seed=seed, plan=Plan("sgd", epochs, batch, learning_rate, weight_decay, drop_last))
        one_of("few_shot.position", position, ("end", "middle", "front"))
        self.length, self.position, self.per_class = length, position, per_class
        self.fixed_classes = per_class
        self.known: tuple[tuple[str, ...], Context, Tensor] | None = None  # names, their prompts, ends

    def _context(self, text: Text) -> tuple[Context, Tensor]:
        """Build the prompts of some names, with an untrained context."""
        assert text.clip is not None
        prompts = [" ".join(["X"] * self.length) + f" {name.replace('_', ' ')}." for name in text.names]
        embedded, ends = text.clip.embed(prompts)
        lengths = ends - self.length - 2  # without the start token, the context and the full stop
        generator = torch.Generator().manual_seed(self.seed)
        made = Context(embedded, lengths.cpu(), self.length, self.position, self.per_class, generator)
        return made.to(embedded.device), ends

    def build(self) -> nn.Module:
        made, ends = self._context(self.text)
        self.known = self.text.names, made, ends
        return made

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        assert text.clip is not None and self.module is not None
        # Other names than before (a split of new classes): build their prompts, with the same learnt context.
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
