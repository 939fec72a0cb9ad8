"""Trainable embeddings beyond the vocabulary: token ids that no text has and no sampler can draw.

A table of entries, each `width` rows of the model's input width, stands behind the vocabulary: entry e, row j is the id
`first + e * width + j`. To the model such ids are text: they take one position each and are attended causally. The
output projection does not know them, so they never enter a distribution.

Shapes: E entries, m rows of an entry, D width, P prompt tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from common.models.adapters import without_adapters


class ExtraEmbeddings(torch.nn.Module, ABC):
    """Stands in the place of a model's input embedding.

    The rows are input embeddings as the first layer sees them: a scale that the vocabulary's own embedding applies
    (Gemma: the square root of D) is not applied to them, as it is not to image features.
    """

    def __init__(self, embedding: Any, count: int, width: int, trainable: bool) -> None:
        """
        Args:
            embedding: The model's own.
            count: E.
            width: m.
            trainable: Whether the rows get gradients.
        """
        super().__init__()
        self.embedding, self.trainable = embedding, trainable
        self.first, self.count, self.width = int(embedding.num_embeddings), count, width
        self.back = False

    @abstractmethod
    def table(self) -> torch.Tensor:
        """All rows as they are now. Shape: [E, m, D]."""

    @abstractmethod
    def parts(self) -> list[torch.nn.Parameter]:
        """The parameters that hold the rows, if any do."""

    @abstractmethod
    def rows(self, numbers: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
        """Row `numbers` of the flattened table where `beyond`, anything elsewhere. Shape: [...] -> [..., D]."""

    @abstractmethod
    def remember(self) -> None:
        """Keep the rows as they are now for `as_begun`."""

    def flush(self) -> None:
        """Make ready for many reads; all ranks call it together."""
        return

    @contextmanager
    def as_begun(self) -> Iterator[None]:
        """Inside, the rows are those of `remember`, whatever a training has made of them."""
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
        rows = self.rows((ids - self.first).clamp(min=0), beyond)
        return torch.where(beyond[..., None], rows.to(known), known)


class DeviceEmbeddings(ExtraEmbeddings):
    """Slots whose rows are a parameter of the model."""

    begun: Any  # a tensor once something is remembered

    def __init__(self, embedding: Any, entries: torch.Tensor, trainable: bool) -> None:
        """`entries`: shape [E, m, D]."""
        super().__init__(embedding, entries.shape[0], entries.shape[1], trainable)
        self.entries = torch.nn.Parameter(entries.clone(), requires_grad=trainable)
        self.register_buffer("begun", None, persistent=False)

    def table(self) -> torch.Tensor:
        """See `Slots.table`."""
        return self.entries.detach()

    def parts(self) -> list[torch.nn.Parameter]:
        """See `Slots.parts`."""
        return [self.entries]

    def rows(self, numbers: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
        """See `Slots.rows`."""
        assert not self.back or self.begun is not None, "nothing was remembered"
        return (self.begun if self.back else self.entries).flatten(0, 1)[numbers]

    def remember(self) -> None:
        """See `Slots.remember`."""
        self.begun = self.entries.detach().clone()


def attach(model: Any, entries: torch.Tensor, trainable: bool) -> DeviceEmbeddings:
    """Put extra embeddings behind the vocabulary of a `*ForConditionalGeneration`, or of the PEFT model around one."""
    base = without_adapters(model)
    extra = DeviceEmbeddings(base.get_input_embeddings(), entries.to(base.device, trained_format(model)), trainable)
    base.set_input_embeddings(extra)
    return extra


def trained_format(model: Any) -> torch.dtype:
    """Number format of what is trained: DeepSpeed wants one, and keeps fp32 master copies of bf16 weights."""
    formats = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    return formats.pop() if formats else without_adapters(model).dtype


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
    extra = base.get_input_embeddings()
    if not isinstance(extra, ExtraEmbeddings):
        yield
        return
    base.set_input_embeddings(extra.embedding)
    try:
        yield
    finally:
        base.set_input_embeddings(extra)


def expand_placeholders(ids: torch.Tensor, mark: int, entries: Sequence[int], first: int, width: int) -> torch.Tensor:
    """Put the ids of entries where the marks stand.

    Args:
        ids: Shape: [P].
        mark: The id that marks where an entry stands.
        entries: One for each mark, in order.
        first: Id of the first row of the first entry.
        width: Rows of an entry.

    Returns:
        Shape: [P + marks * (width - 1)].

    >>> expand_placeholders(torch.tensor([5, 0, 6, 0]), mark=0, entries=[1, 0], first=10, width=2).tolist()
    [5, 12, 13, 6, 10, 11]
    """
    marked = (ids == mark).nonzero()[:, 0].tolist()
    pieces, done = [], 0
    for index, entry in zip(marked, entries, strict=True):
        pieces += [ids[done:index], torch.arange(width, device=ids.device) + first + entry * width]
        done = index + 1
    return torch.cat([*pieces, ids[done:]])
