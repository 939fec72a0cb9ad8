"""Trainable embeddings beyond the vocabulary: token ids that no text has and no sampler can draw.

A table of entries, each `width` rows of the model's input width, stands behind the vocabulary: entry e, row j is the id
`first + e * width + j`. To the model such ids are text: they take one position each and are attended causally. The
output projection does not know them, so they never enter a distribution.

Shapes: E entries, m rows of an entry, D width, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from common.models.adapters import without_adapters


class Slots(torch.nn.Module):
    """Stands in the place of a model's input embedding.

    The rows are input embeddings as the first layer sees them: a scale that the vocabulary's own embedding applies
    (Gemma: the square root of D) is not applied to them, as it is not to image features.
    """

    begun: Any  # a tensor once something is remembered

    def __init__(self, embedding: Any, entries: torch.Tensor, trainable: bool) -> None:
        """
        Args:
            embedding: The model's own.
            entries: Shape: [E, m, D].
            trainable: Whether the rows get gradients.
        """
        super().__init__()
        self.embedding = embedding
        self.entries = torch.nn.Parameter(entries.clone(), requires_grad=trainable)
        self.first, self.width = int(embedding.num_embeddings), entries.shape[1]
        self.register_buffer("begun", None, persistent=False)
        self.back = False

    def remember(self) -> None:
        """Keep the rows as they are now for `as_begun`."""
        self.begun = self.entries.detach().clone()

    @contextmanager
    def as_begun(self) -> Iterator[None]:
        """Inside, the rows are those of `remember`, whatever a training has made of them."""
        assert self.begun is not None, "nothing was remembered"
        self.back = True
        try:
            yield
        finally:
            self.back = False

    @property
    def weight(self) -> torch.nn.Parameter:
        """The vocabulary's rows, for code that asks an embedding for them."""
        return self.embedding.weight  # type: ignore[no-any-return]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings. Shape: [...] -> [..., D]."""
        beyond = ids >= self.first
        known = self.embedding(ids.where(~beyond, 0))
        entries = self.begun if self.back else self.entries
        rows = entries.flatten(0, 1)[(ids - self.first).clamp(min=0)]
        return torch.where(beyond[..., None], rows.to(known.dtype), known)


def attach(model: Any, entries: torch.Tensor, trainable: bool) -> Slots:
    """Put slots behind the vocabulary of a `*ForConditionalGeneration`, or of the PEFT model around one."""
    base = without_adapters(model)
    # DeepSpeed wants one number format among the trained weights; it keeps fp32 master copies of bf16 ones
    formats = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    slots = Slots(
        base.get_input_embeddings(), entries.to(base.device, formats.pop() if formats else base.dtype), trainable
    )
    base.set_input_embeddings(slots)
    return slots


def rows_of_vocabulary(embedding: Any, entries: torch.Tensor) -> torch.Tensor:
    """Entries as rows that an embedding would turn into them: without the scale that it gives its own.

    Args:
        embedding: The model's.
        entries: Shape: [E, m, D].

    Returns:
        Shape: [E m, D], fp32.
    """
    flat = entries.detach().flatten(0, 1).float()
    scale = getattr(embedding, "embed_scale", None)  # Gemma 3: the square root of D
    return flat if scale is None else flat / scale.to(embedding.weight.dtype).float()


@contextmanager
def detached(model: Any) -> Iterator[None]:
    """Inside, the model is as it was before `attach`: to save it in a form that loads anywhere."""
    base = without_adapters(model)
    slots = base.get_input_embeddings()
    if not isinstance(slots, Slots):
        yield
        return
    base.set_input_embeddings(slots.embedding)
    try:
        yield
    finally:
        base.set_input_embeddings(slots)


def spread(ids: torch.Tensor, mark: int, entries: Sequence[int], first: int, width: int) -> torch.Tensor:
    """Put the ids of entries where the marks stand.

    Args:
        ids: Shape: [P].
        mark: The id that marks where an entry stands.
        entries: One for each mark, in order.
        first: Id of the first row of the first entry.
        width: Rows of an entry.

    Returns:
        Shape: [P + marks * (width - 1)].

    >>> spread(torch.tensor([5, 0, 6, 0]), mark=0, entries=[1, 0], first=10, width=2).tolist()
    [5, 12, 13, 6, 10, 11]
    """
    marked = (ids == mark).nonzero()[:, 0].tolist()
    pieces, done = [], 0
    for index, entry in zip(marked, entries, strict=True):
        pieces += [ids[done:index], torch.arange(width, device=ids.device) + first + entry * width]
        done = index + 1
    return torch.cat([*pieces, ids[done:]])
