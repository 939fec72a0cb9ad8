"""Trainable embeddings behind the vocabulary: token ids that occur in no text and are never sampled.

They form a table of entries with `width` rows each; row j of entry e has the id `first + e * width + j`. In the model
such ids are like text: each takes one position and is attended causally. The output projection has no rows for them,
so they have no probability.

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
    """Input embedding module that wraps the model's own and adds rows behind the vocabulary.

    The rows go into the first layer as they are: like image features, they are not scaled as the model's own
    embedding scales its rows (Gemma: by the square root of D).
    """

    def __init__(self, embedding: Any, count: int, width: int, trainable: bool) -> None:
        """
        Args:
            embedding: Input embedding of the model.
            count: Number of entries, E.
            width: Rows of an entry, m.
            trainable: Whether the rows get gradients.
        """
        super().__init__()
        self.embedding, self.trainable = embedding, trainable
        self.first, self.count, self.width = int(embedding.num_embeddings), count, width
        self.back = False

    @abstractmethod
    def table(self) -> torch.Tensor:
        """Return all rows as they are now. Shape: [E, m, D]."""

    @abstractmethod
    def parts(self) -> list[torch.nn.Parameter]:
        """Return the parameters that hold the rows, if any do."""

    @abstractmethod
    def rows(self, numbers: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
        """Return row `numbers` of the flattened table where `beyond`, anything elsewhere. Shape: [...] -> [..., D]."""

    @abstractmethod
    def remember(self) -> None:
        """Keep a copy of the current rows for `as_begun`."""

    def flush(self) -> None:
        """Prepare for many reads. All ranks call it together."""
        return

    @contextmanager
    def as_begun(self) -> Iterator[None]:
        """Use the rows that `remember` kept instead of the trained ones, for a reference policy."""
        self.back = True
        try:
            yield
        finally:
            self.back = False

    @property
    def weight(self) -> torch.nn.Parameter:
        """Return the rows of the vocabulary, for code that reads `weight` of an embedding."""
        return self.embedding.weight  # type: ignore[no-any-return]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return input embeddings. Shape: [...] -> [..., D]."""
        beyond = ids >= self.first
        # Both tables are read at all places, with a valid index where the other one counts.
        known = self.embedding(ids.where(~beyond, 0))
        rows = self.rows((ids - self.first).clamp(min=0), beyond)
        return torch.where(beyond[..., None], rows.to(known), known)


class DeviceEmbeddings(ExtraEmbeddings):
    """Extra embeddings whose rows are a parameter of the model."""

    begun: Any  # None, or the rows that `remember` kept

    def __init__(self, embedding: Any, entries: torch.Tensor, trainable: bool) -> None:
        """`entries`: initial rows, shape [E, m, D]."""
        super().__init__(embedding, entries.shape[0], entries.shape[1], trainable)
        self.entries = torch.nn.Parameter(entries.clone(), requires_grad=trainable)
        self.register_buffer("begun", None, persistent=False)

    def table(self) -> torch.Tensor:
        """Return all rows, see `ExtraEmbeddings.table`."""
        return self.entries.detach()

    def parts(self) -> list[torch.nn.Parameter]:
        """Return the parameter that holds the rows."""
        return [self.entries]

    def rows(self, numbers: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
        """Return the rows of some ids, see `ExtraEmbeddings.rows`."""
        assert not self.back or self.begun is not None, "nothing was remembered"
        return (self.begun if self.back else self.entries).flatten(0, 1)[numbers]

    def remember(self) -> None:
        """Keep a copy of the current rows for `as_begun`."""
        self.begun = self.entries.detach().clone()


def attach(model: Any, entries: torch.Tensor, trainable: bool) -> DeviceEmbeddings:
    """Add extra embeddings to a `*ForConditionalGeneration`, or to the one inside a PEFT model."""
    base = without_adapters(model)
    extra = DeviceEmbeddings(base.get_input_embeddings(), entries.to(base.device, trained_format(model)), trainable)
    base.set_input_embeddings(extra)
    return extra


def trained_format(model: Any) -> torch.dtype:
    """Return the number format of the trained parameters: DeepSpeed needs the same one for all of them."""
    formats = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    return formats.pop() if formats else without_adapters(model).dtype


def rows_of_vocabulary(embedding: Any, entries: torch.Tensor) -> torch.Tensor:
    """Return entries as rows of the vocabulary: divided by the factor with which the embedding scales its rows.

    Args:
        embedding: Input embedding of the model.
        entries: Extra embeddings. Shape: [E, m, D].

    Returns:
        Shape: [E m, D], fp32.
    """
    flat = entries.detach().flatten(0, 1).float()
    scale = getattr(embedding, "embed_scale", None)  # Gemma 3: the square root of D
    # rounded to the format of the weights, as the embedding itself applies it
    return flat if scale is None else flat / scale.to(embedding.weight.dtype).float()


@contextmanager
def detached(model: Any) -> Iterator[None]:
    """Remove the extra embeddings for a while, so that the model can be saved as an ordinary one."""
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
    """Replace every mark in a prompt by the ids of its entry.

    Args:
        ids: Token ids of a prompt. Shape: [P].
        mark: Id that marks the place of an entry.
        entries: Number of the entry for each mark, in order.
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
