"""What few-shot learners have in common: the features they are fitted on, and updates that can be interrupted."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from common.config.schema import positive

if TYPE_CHECKING:
    from common.few_shot.encoders.encoder import TextEncoder


# What a few-shot learner is fitted on, and how its updates are made: epochs of batches, each a pure function of its
# number, so that an interrupted fit goes on as if it had not been.
#
# Shapes: N pictures, C classes, D features, P positions, D2 features of the second encoder.


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


# What all few-shot learners are: `FewShotHead`, and `GradientHead` for those that are trained by gradients.
#
# `few_shot._target_` names such a class, and the other keys of the entry are its arguments.

SCALE = 100.0  # exp(logit_scale) of the trained CLIP models, and a literal in Tip-Adapter's, CaFo's and CALIP's code
TEXT = frozenset({"text"})
DASSL_CROP = (0.08, 1.0)  # of Dassl, whose trainer CoOp and CLIP-Adapter use
RECONSTRUCTION = "a reconstruction: the authors published no code"


def cosine_logits(images: Tensor, text: Tensor, scale: float = SCALE) -> Tensor:
    """
    Args:
        images: Raw features. Shape: [N, D].
        text: Text weights, of length 1. Shape: [C, D].
        scale: exp(logit_scale) of the model.

    Returns:
        Cosines times `scale`. Shape: [N, C].
    """
    return scale * normalize(images, dim=1) @ text.T


def base_logits(pictures: Pictures, text: Text) -> Tensor:
    """Zero-shot CLIP's logits, or zeros where there is no CLIP. Shape: [N, C]."""
    if text.weights is None:
        return pictures.images.new_zeros(len(pictures), len(text.names))
    return cosine_logits(pictures.images, text.weights)


class FewShotHead:
    """A few-shot learner on frozen features. One without a fit needs no more than `logits`.

    needs: of `text` (CLIP's text tower), `maps` (of positions) and `second` (uses a visual encoder, if there is one).
    fixed_classes: it can tell apart only the classes that it was fitted on. steps: of the fit; 0: it is never fitted.
    remark: what every table must say of it. crop: shares of a picture that its random views cover. generated,
    generated_per_class: pictures that somebody drew, as more shots.
    """

    needs: frozenset[str] = TEXT
    fixed_classes = False
    steps = 0
    remark = ""
    crop = (0.5, 1.0)  # of Tip-Adapter's and CaFo's code
    generated: str | None = None
    generated_per_class = 0

    def __init__(self, *, seed: int) -> None:
        """`seed`: draws whatever is random in the fit."""
        self.seed = seed

    def check_val(self, there: bool) -> None:
        """Refuse a fit without validation pictures, where it needs some.

        Raises:
            UserError: It needs them, and there are none.
        """

    def begin(self, train: Support, val: Pictures | None, text: Text, test: Pictures | None = None) -> None:
        """Take the pictures of the fit.

        Args:
            train: The shots.
            val: Pictures to choose by; None: nothing is chosen.
            text: The classes.
            test: With `selection=paper`, the test pictures, by which the authors chose.
        """
        self.train, self.val, self.text, self.test = train, val, text, test

    @property
    def judges(self) -> Pictures | None:
        """The pictures to choose an epoch by: validation pictures, or the authors' choice, the test pictures."""
        return self.val if self.test is None else self.test

    @property
    def searched_on(self) -> Pictures | None:
        """What values are searched on: as the authors do, the test pictures only where there are no others."""
        return self.val if self.val is not None else self.test

    @property
    def searches_test(self) -> bool:
        """Whether values are searched on the test pictures."""
        return self.test is not None and self.val is None

    @property
    def chosen_by_test(self) -> bool:
        """Whether the fit, once begun, chooses by test pictures."""
        return False

    def step(self, number: int) -> dict[str, float]:
        """Make step number `number` of the fit, from 0. Returns its metrics."""
        return {}

    def end(self) -> dict[str, Any]:
        """Choose, after the last step. Returns what was chosen."""
        return {}

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        """Shape: [N, C]. Before the fit: as it begins."""
        return base_logits(pictures, text)

    def head(self) -> dict[str, Any]:
        """Everything that `logits` depends on beside the encoders, as `torch.save` takes it."""
        return {}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        """Take over the head of a finished fit, to be asked alone. Needs no pictures: `begin` need not come before.

        Args:
            head: What `head` of a learner with the same arguments returned.
            text: The classes that it was fitted on.
        """
        self.text = text

    def state(self) -> dict[str, Any]:
        """The head, and what later steps depend on."""
        return self.head()

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state, after `begin`, to be fitted on."""
        self.ready(state, self.text)


class GradientHead(FewShotHead, ABC):
    """A learner whose module is trained by gradients; `best`: the epoch that is best by the judges is kept."""

    best = False
    key_views = 0  # random views that keys are made of, which no epoch shows
    module: nn.Module | None = None

    def __init__(self, *, seed: int, plan: Plan) -> None:
        """
        Args:
            seed: Draws the start and the order of the pictures.
            plan: How the module is trained.
        """
        super().__init__(seed=seed)
        for name in ("epochs", "batch", "learning_rate"):
            positive(f"few_shot.{name}", getattr(plan, name))
        self.plan, self.steps = plan, plan.epochs
        self.chosen: tuple[float, int, dict[str, Tensor]] | None = None  # accuracy, epoch, weights

    @abstractmethod
    def build(self) -> nn.Module:
        """The module as training begins."""

    @abstractmethod
    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        """Logits with the module. Shape: [N, C]."""

    def begin(self, train: Support, val: Pictures | None, text: Text, test: Pictures | None = None) -> None:
        super().begin(train, val, text, test)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.module = self.build().to(train.seen.images)
        self.optimizer = self.plan.make([p for p in self.module.parameters() if p.requires_grad])

    def supports(self) -> list[Support]:
        """What an epoch goes through, one after the other."""
        return [self.train]

    def cosine_over(self) -> int:
        """The batches that the cosine of the learning rate is made for."""
        return self.plan.epochs * self.plan.batches(len(self.train.seen))

    def pictures(self, support: Support, epoch: int) -> Pictures:
        """What an epoch shows of them: another random view each time, or the test view of maps."""
        return support.seen if "maps" in self.needs else support.training_view(epoch, self.key_views)

    def step(self, number: int) -> dict[str, float]:
        supports = self.supports()
        per_epoch = sum(self.plan.batches(len(each.seen)) for each in supports)
        done, losses, right, seen, rate = number * per_epoch, list[float](), 0, 0, 0.0
        for which, support in enumerate(supports):
            shown = self.pictures(support, number)
            order = batches(len(shown), self.plan.batch, self.seed, number, which)
            for index in islice(order, self.plan.batches(len(shown))):
                part = shown.take(index.to(shown.labels.device))
                rate = self.plan.rate(number, done, self.cosine_over())
                loss, hits = descend(self.optimizer, self.forward(part, self.text), part.labels, rate)
                losses, right, seen, done = [*losses, loss], right + hits, seen + len(index), done + 1
        metrics = {
            "loss": sum(losses) / len(losses),
            "train/accuracy": right / seen,
            "learning_rate": rate,
        }
        if self.best and self.judges is not None:
            metrics["selection/accuracy"] = self._keep_best(number)
        return metrics

    def _keep_best(self, number: int) -> float:
        assert self.judges is not None and self.module is not None
        found = accuracy(self, self.judges, self.text)
        if self.chosen is None or found > self.chosen[0]:
            self.chosen = found, number, copy.deepcopy(self.module.state_dict())
        return found

    def end(self) -> dict[str, Any]:
        if self.chosen is None:
            return {}
        assert self.module is not None
        self.module.load_state_dict(self.chosen[2])
        return {"epoch": self.chosen[1] + 1, "selection_accuracy": self.chosen[0]}

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        return base_logits(pictures, text) if self.module is None else self.forward(pictures, text)

    def head(self) -> dict[str, Any]:
        assert self.module is not None, "it was fitted"
        return {"module": self.module.state_dict()}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        super().ready(head, text)
        with torch.random.fork_rng(devices=[]):
            self.module = self.shaped_as(head["module"]).to(next(iter(head["module"].values())).device)
        self.module.load_state_dict(head["module"])

    def shaped_as(self, weights: dict[str, Tensor]) -> nn.Module:
        """A module that such weights fit into."""
        return self.build()

    def state(self) -> dict[str, Any]:
        return self.head() | {"optimizer": self.optimizer.state_dict(), "chosen": self.chosen}

    def restore(self, state: dict[str, Any]) -> None:
        assert self.module is not None, "begin comes first"
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.chosen = state["chosen"]


def fit(
    learner: FewShotHead, train: Support, val: Pictures | None, text: Text, test: Pictures | None = None
) -> dict[str, Any]:
    """All steps of a learner. Returns what it chose. Arguments as of `FewShotHead.begin`."""
    learner.begin(train, val, text, test)
    for number in range(learner.steps):
        learner.step(number)
    return learner.end()


def accuracy(learner: FewShotHead, pictures: Pictures, text: Text) -> float:
    """Share of the pictures whose highest logit is that of their label."""
    return float((all_logits(learner, pictures, text).argmax(1) == pictures.labels).float().mean())


def all_logits(learner: FewShotHead, pictures: Pictures, text: Text, chunk: int = CHUNK) -> Tensor:
    """Logits of any number of pictures, chunk by chunk. Shape: [N, C]."""
    with torch.no_grad():
        parts = (pictures.take(slice(start, start + chunk)) for start in range(0, len(pictures), chunk))
        return torch.cat([learner.logits(part, text) for part in parts])


def maps_of(pictures: Pictures) -> Tensor:
    """The maps of a learner that needs them."""
    assert pictures.maps is not None, "learners that need maps get them"
    return pictures.maps
