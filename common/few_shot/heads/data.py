"""What a few-shot learner is fitted on, and how its updates are made: epochs of batches, each a pure function of its
number, so that an interrupted fit goes on as if it had not been.

Shapes: N pictures, C classes, D features, P positions, D2 features of the second encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from common.few_shot.encoders.encoder import TextEncoder

CHUNK = 1024  # pictures that are classified together
WARM_UP = 1e-5  # learning rate of the first epoch in Dassl's trainer


@dataclass(frozen=True)
class Pictures:
    """Features of some pictures.

    images: Raw, of CLIP, or of the visual encoder where there is no CLIP. Shape: [N, D].
    labels: Shape: [N].
    maps: Raw, of the positions. Shape: [N, P, D].
    second: Raw, of the visual encoder beside CLIP. Shape: [N, D2].
    """

    images: Tensor
    labels: Tensor
    maps: Tensor | None = None
    second: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Any) -> Pictures:
        """Those of an index or slice."""
        maps = None if self.maps is None else self.maps[index]
        second = None if self.second is None else self.second[index]
        return Pictures(self.images[index], self.labels[index], maps, second)


@dataclass(frozen=True)
class Text:
    """The class names as CLIP reads them. weights: of length 1, shape [C, D]; None where there is no CLIP."""

    names: tuple[str, ...]
    weights: Tensor | None = None
    clip: TextEncoder | None = None

    @property
    def known(self) -> Tensor:
        """The weights of a learner that needs them."""
        assert self.weights is not None, "learners that need texts are refused without CLIP"
        return self.weights


@dataclass(frozen=True)
class Support:
    """The training pictures. seen: their test view. view: random view number i. views: at most so many make a key, and
    so many others are repeated by a training; None: as many as are asked for. generated: more pictures of the same
    classes, which somebody drew.
    """

    seen: Pictures
    view: Callable[[int], Pictures]
    views: int | None
    generated: Support | None = None

    def mean_view(self, count: int) -> Pictures:
        """Every feature is the mean over the first `count` random views, or over the first `views`."""
        count = self._limited(count)
        total = self.view(0)
        images, second = total.images.clone(), None if total.second is None else total.second.clone()
        for number in range(1, count):
            other = self.view(number)
            images += other.images
            if second is not None and other.second is not None:
                second += other.second
        return replace(total, images=images / count, second=None if second is None else second / count, maps=None)

    def training_view(self, epoch: int, key_views: int) -> Pictures:
        """The random view that an epoch shows: none of those that `mean_view(key_views)` is made of, or a picture would
        be its own key.
        """
        return self.view(self._limited(key_views) + (epoch if self.views is None else epoch % self.views))

    def _limited(self, count: int) -> int:
        return count if self.views is None else min(count, self.views)


@dataclass(frozen=True)
class Plan:
    """How a module is trained: `sgd` (momentum 0.9, CoOp's rate by epoch) or `adamw` (eps 1e-4, a cosine by batch).

    drop_last: an epoch ends with its last whole batch, if it has one, as Dassl's `build_data_loader` trains.
    """

    optimizer: str
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    drop_last: bool = False

    def make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
        return torch.optim.AdamW(parameters, self.learning_rate, eps=1e-4, weight_decay=self.weight_decay, fused=True)

    def batches(self, pictures: int) -> int:
        """How many an epoch over so many pictures has."""
        return pictures // self.batch if self.drop_last and pictures >= self.batch else math.ceil(pictures / self.batch)

    def rate(self, epoch: int, number: int, total: int) -> float:
        """The learning rate of batch `number` of the fit, in `epoch`; both from 0.

        `total`: the batches that the cosine is made for.
        """
        if self.optimizer == "sgd":
            return dassl_rate(epoch, self.epochs, self.learning_rate)
        return self.learning_rate * (1 + math.cos(math.pi * number / total)) / 2


def dassl_rate(epoch: int, epochs: int, peak: float = 0.002) -> float:
    """The learning rate of an epoch, counted from 0: a first one at 1e-5, then half a cosine from `peak`, as CoOp's
    trainer (Dassl) steps it. Its cosine counts the epochs after the first but ends as if that one belonged to it.

    >>> [round(dassl_rate(epoch, 50), 8) for epoch in (0, 1, 2, 49)]
    [1e-05, 0.002, 0.00199803, 7.89e-06]
    """
    return WARM_UP if epoch == 0 else peak / 2 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def batches(count: int, size: int, seed: int, epoch: int, which: int = 0) -> Iterator[Tensor]:
    """The pictures of one epoch in a random order of its own. `which`: of several sets of pictures."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 2 + which)
    yield from torch.randperm(count, generator=generator).split(size)


def descend(optimizer: torch.optim.Optimizer, logits: Tensor, labels: Tensor, rate: float) -> tuple[float, int]:
    """One update on the cross entropy. Returns the loss, and how many were right before."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = cross_entropy(logits, labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach()), int((logits.argmax(1) == labels).sum())
