"""What a few-shot learner is fitted on, and how one is fitted by gradients: epochs of batches, each a pure function of
its number, so that an interrupted fit goes on as if it had not been.

Shapes: N pictures, C classes, D features, P positions, D2 features of the second encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from alert.draft.learners import coop

if TYPE_CHECKING:
    from alert.draft.features.encoder import TextEncoder

CHUNK = 1024  # pictures that are classified together


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


class FewShot(Protocol):
    """A few-shot learner on frozen features.

    needs: of `text` (CLIP's text tower), `maps` (of positions) and `second` (uses a visual encoder, if there is one).
    fixed_classes: it can tell apart only the classes that it was fitted on. steps: of the fit; 0: it is never fitted.
    remark: what every table must say of it. crop: shares of a picture that its random views cover. generated,
    generated_per_class: pictures that somebody drew, as more shots.
    """

    needs: frozenset[str]
    fixed_classes: bool
    steps: int
    remark: str
    crop: tuple[float, float]
    generated: str | None
    generated_per_class: int

    @property
    def chosen_by_test(self) -> bool:
        """Whether the fit, once begun, chooses by test pictures."""

    def check_val(self, there: bool) -> None:
        """
        Raises:
            UserError: It needs validation pictures, and there are none.
        """

    def begin(self, train: Support, val: Pictures | None, text: Text, test: Pictures | None = None) -> None:
        """Take the pictures of the fit.

        Args:
            train: The shots.
            val: To choose by; None: nothing is chosen.
            text: Of the classes.
            test: With `selection=paper`, the test pictures, by which the authors chose.
        """

    def step(self, number: int) -> dict[str, float]:
        """Step number `number` of the fit, from 0, with its metrics."""

    def end(self) -> dict[str, Any]:
        """After the last step: choose, and say what was chosen."""

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        """Shape: [N, C]. Before the fit: as it begins."""

    def head(self) -> dict[str, Any]:
        """Everything that `logits` depends on beside the encoders, as `torch.save` takes it."""

    def ready(self, head: dict[str, Any], text: Text) -> None:
        """Take over the head of a finished fit, to be asked alone. Needs no pictures: `begin` need not come before.

        Args:
            head: Of a learner with the same arguments.
            text: Of the classes that it was fitted on.
        """

    def state(self) -> dict[str, Any]:
        """The head, and what later steps depend on."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state, after `begin`, to be fitted on."""


def fit(
    learner: FewShot, train: Support, val: Pictures | None, text: Text, test: Pictures | None = None
) -> dict[str, Any]:
    """All steps of a learner. Returns what it chose. Arguments as of `FewShot.begin`."""
    learner.begin(train, val, text, test)
    for number in range(learner.steps):
        learner.step(number)
    return learner.end()


def accuracy(learner: FewShot, pictures: Pictures, text: Text) -> float:
    """Share of the pictures whose highest logit is that of their label."""
    return float((all_logits(learner, pictures, text).argmax(1) == pictures.labels).float().mean())


def all_logits(learner: FewShot, pictures: Pictures, text: Text, chunk: int = CHUNK) -> Tensor:
    """Of any number of pictures. Shape: [N, C]."""
    with torch.no_grad():
        parts = (pictures.take(slice(start, start + chunk)) for start in range(0, len(pictures), chunk))
        return torch.cat([learner.logits(part, text) for part in parts])


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
        """Of batch `number` of the fit, in `epoch`; both from 0. total: the batches that the cosine is made for."""
        if self.optimizer == "sgd":
            return coop.learning_rate(epoch, self.epochs, self.learning_rate)
        return self.learning_rate * (1 + math.cos(math.pi * number / total)) / 2


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
