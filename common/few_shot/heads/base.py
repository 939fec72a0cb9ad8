"""Define what few-shot learners have in common: their input features, resumable training, and the base classes.

`FewShotHead` is the base of all learners, `GradientHead` that of learners trained by gradients. `few_shot._target_`
names such a class, and the other keys of the entry are its arguments.

Shapes: N images, C classes, D features, P positions, D2 features of the second encoder.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from common.config.schema import positive

if TYPE_CHECKING:
    from common.few_shot.encoders.encoder import TextEncoder


# Inputs of a fit, and its updates. The batches of an epoch are a pure function of its number, so an interrupted fit
# continues as if it had not been interrupted.

CHUNK = 1024  # images that are classified together
WARM_UP = 1e-5  # learning rate of the first epoch in Dassl's trainer


@dataclass(frozen=True)
class Pictures:
    """Features of some images.

    images: Raw features of CLIP, or of the visual encoder where there is no CLIP. Shape: [N, D].
    labels: Class indices. Shape: [N].
    maps: Raw features of the positions. Shape: [N, P, D].
    second: Raw features of the visual encoder beside CLIP. Shape: [N, D2].
    """

    images: Tensor
    labels: Tensor
    maps: Tensor | None = None
    second: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Any) -> Pictures:
        """Return those of an index, mask or slice."""
        maps = None if self.maps is None else self.maps[index]
        second = None if self.second is None else self.second[index]
        return Pictures(self.images[index], self.labels[index], maps, second)


@dataclass(frozen=True)
class Text:
    """Class names with their text weights.

    weights: Unit length, shape [C, D]; None where there is no CLIP.
    prompts: Raw features of each class's prompts. C tensors of shape [prompts of the class, D].
    """

    names: tuple[str, ...]
    weights: Tensor | None = None
    clip: TextEncoder | None = None
    prompts: tuple[Tensor, ...] = ()

    @property
    def known(self) -> Tensor:
        """Return the text weights, for a learner that needs them."""
        assert self.weights is not None, "learners that need texts are refused without CLIP"
        return self.weights


@dataclass(frozen=True)
class Support:
    """The training images.

    seen: Their test view.
    view: Function that returns random view number i.
    views: At most so many views make a key, and a training cycles through so many others; None: no limit.
    generated: Generated images of the same classes, as more shots.
    groups: Group of each image (`Item.group`), for cross-validation; empty: each image is on its own.
    """

    seen: Pictures
    view: Callable[[int], Pictures]
    views: int | None
    generated: Support | None = None
    groups: Sequence[str] = ()

    def take(self, index: Tensor) -> Support:
        """Return those of a mask, in all views; generated images stay."""
        chosen = index.tolist()
        groups = [group for group, there in zip(self.groups, chosen, strict=True) if there] if self.groups else ()
        return replace(self, seen=self.seen.take(index), view=lambda n: self.view(n).take(index), groups=groups)

    def mean_view(self, count: int) -> Pictures:
        """Return features averaged over the first `count` random views (at most `views`)."""
        count = self.limited(count)
        total = self.view(0)
        images, second = total.images.clone(), None if total.second is None else total.second.clone()
        for number in range(1, count):
            other = self.view(number)
            images += other.images
            if second is not None and other.second is not None:
                second += other.second
        return replace(total, images=images / count, second=None if second is None else second / count, maps=None)

    def training_view(self, epoch: int, key_views: int) -> Pictures:
        """Return the random view of an epoch, none of those in `mean_view(key_views)`: it would match its own key."""
        return self.view(self.limited(key_views) + (epoch if self.views is None else epoch % self.views))

    def limited(self, count: int) -> int:
        """Return the number of views that there are of so many."""
        return count if self.views is None else min(count, self.views)


@dataclass(frozen=True)
class Plan:
    """Training of a module: `sgd` (momentum 0.9, CoOp's rate by epoch) or `adamw` (a cosine by batch).

    eps: of AdamW.
    drop_last: drop an incomplete last batch unless it is the only one, as in Dassl's `build_data_loader`.
    """

    optimizer: str
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    drop_last: bool = False
    eps: float = 1e-4

    def make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Build the optimizer."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
        return torch.optim.AdamW(
            parameters, self.learning_rate, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )

    def batches(self, pictures: int) -> int:
        """Return the number of batches in an epoch over so many images."""
        return pictures // self.batch if self.drop_last and pictures >= self.batch else math.ceil(pictures / self.batch)

    def rate(self, epoch: int, number: int, total: int) -> float:
        """Return the learning rate of batch `number` of the fit, in `epoch`; both from 0.

        `total`: number of batches over which the cosine falls.
        """
        if self.optimizer == "sgd":
            return dassl_rate(epoch, self.epochs, self.learning_rate)
        return self.learning_rate * (1 + math.cos(math.pi * number / total)) / 2


def dassl_rate(epoch: int, epochs: int, peak: float = 0.002) -> float:
    """Return the learning rate of an epoch, counted from 0, as in CoOp's trainer (Dassl).

    The first epoch has 1e-5, then half a cosine falls from `peak`. The cosine counts from the second epoch but has the
    length of all epochs, so it does not quite reach its end.

    >>> [round(dassl_rate(epoch, 50), 8) for epoch in (0, 1, 2, 49)]
    [1e-05, 0.002, 0.00199803, 7.89e-06]
    """
    return WARM_UP if epoch == 0 else peak / 2 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def batches(count: int, size: int, seed: int, epoch: int, which: int = 0) -> Iterator[Tensor]:
    """Yield the indices of one epoch's batches, shuffled by seed and epoch. `which`: number of the set of images."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 2 + which)
    yield from torch.randperm(count, generator=generator).split(size)


def descend(
    optimizer: torch.optim.Optimizer, logits: Tensor, labels: Tensor, rate: float, penalty: Tensor | float = 0.0
) -> tuple[float, int]:
    """Make one update on the cross entropy. Return the loss, and the number of correct predictions before it.

    `penalty`: added to the cross entropy.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = cross_entropy(logits, labels) + penalty
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach()), int((logits.argmax(1) == labels).sum())


# The base classes of all few-shot learners.

SCALE = 100.0  # exp(logit_scale) of the trained CLIP models, and a literal in Tip-Adapter's, CaFo's and CALIP's code
TEXT = frozenset({"text"})
DASSL_CROP = (0.08, 1.0)  # random crop of Dassl, whose trainer CoOp and CLIP-Adapter use
RECONSTRUCTION = "a reconstruction: the authors published no code"


def cosine_logits(images: Tensor, text: Tensor, scale: float = SCALE) -> Tensor:
    """Return cosine similarities of images and classes, times `scale`.

    Args:
        images: Raw features. Shape: [N, D].
        text: Text weights of unit length. Shape: [C, D].
        scale: exp(logit_scale) of the model.

    Returns:
        Logits. Shape: [N, C].
    """
    return scale * normalize(images, dim=1) @ text.T


def base_logits(pictures: Pictures, text: Text) -> Tensor:
    """Return zero-shot CLIP's logits, or zeros where there is no CLIP. Shape: [N, C]."""
    if text.weights is None:
        return pictures.images.new_zeros(pictures.images.shape[0], len(text.names))
    return cosine_logits(pictures.images, text.weights)


class FewShotHead:
    """A few-shot learner on frozen features. A learner without a fit needs only `logits`.

    Attributes:
        needs: Inputs beside image features: `text` (CLIP's text tower), `maps` (features of positions), `second` (the
            visual encoder's features, if there is one).
        fixed_classes: True if it can only classify into the classes that it was fitted on.
        steps: Number of steps of the fit; 0: never fitted.
        remark: Note that every table prints about its results.
        crop: Share of an image's area that random views cover.
        generated, generated_per_class: Source and number of generated images, as more shots.
        chooses: Whether the fit may choose something by validation images.
    """

    needs: frozenset[str] = TEXT
    fixed_classes = False
    steps = 0
    remark = ""
    crop = (0.5, 1.0)  # as in Tip-Adapter's and CaFo's code
    generated: str | None = None
    generated_per_class = 0
    chooses = True

    def __init__(self, *, seed: int) -> None:
        """`seed`: seed of everything random in the fit."""
        self.seed = seed

    def check_val(self, there: bool) -> None:
        """Check that there are validation images if the fit needs them. `there`: whether there are some.

        Raises:
            UserError: The fit needs validation images, and there are none.
        """

    def begin(self, train: Support, val: Pictures | None, text: Text, test: Pictures | None = None) -> None:
        """Take the images of the fit.

        Args:
            train: Shots of all classes.
            val: Validation images, to choose hyperparameters and the best epoch; None: nothing is chosen by them.
            text: Classes of the fit.
            test: Test images with `selection=paper`, since the authors made these choices by them; else None.
        """
        self.train, self.val, self.text, self.test = train, val, text, test

    @property
    def judges(self) -> Pictures | None:
        """Return the images to choose the best epoch by: validation images, or with `selection=paper` test images."""
        return self.val if self.test is None else self.test

    @property
    def searched_on(self) -> Pictures | None:
        """Return the images to search hyperparameters on: validation images, or test images where there are none."""
        return self.val if self.val is not None else self.test

    @property
    def searches_test(self) -> bool:
        """Return whether hyperparameters are searched on the test images."""
        return self.test is not None and self.val is None

    @property
    def chosen_by_test(self) -> bool:
        """Return whether the fit, once begun, makes choices by the test images."""
        return False

    def follow(self, other: Any) -> None:
        """Take, in place of a search, the values that a finished fit of the same learner has chosen.

        For cross-validation: what other images would choose could have logits of quite another scale.
        """

    def step(self, number: int) -> dict[str, float]:
        """Make step `number` of the fit, counted from 0. Return its metrics."""
        return {}

    def end(self) -> dict[str, Any]:
        """Make the choices that follow the last step. Return what was chosen."""
        return {}

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        """Return logits of shape [N, C]. Before the fit: those that the fit starts from."""
        return base_logits(pictures, text)

    def out_of_fold(self) -> tuple[Sequence[int], Tensor] | None:
        """Return logits of the training images by fits that had not seen them, if cross-validation was part of the fit.

        Returns:
            The part of each image in the first repeat, -1 for one that was always trained on (length N), and the
            logits, NaN for such an image. Shape: [repeats, N, C].
        """
        return None

    def head(self) -> dict[str, Any]:
        """Return everything that `logits` depends on beside the encoders, in a form that `torch.save` takes."""
        return {}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        """Take over the head of a finished fit, for inference only. No images are needed: `begin` need not come before.

        Args:
            head: Result of `head` of a learner with the same arguments.
            text: Classes that it was fitted on.
        """
        self.text = text

    def state(self) -> dict[str, Any]:
        """Return the state of an unfinished fit: the head, and what later steps depend on."""
        return self.head()

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state, after `begin`, to continue the fit."""
        self.ready(state, self.text)


class SolvedHead(FewShotHead, ABC):
    """A learner that is solved in one step, and answers by some tensors and numbers alone.

    `values`: names of the numbers in the solution that are searched on validation images.
    """

    fixed_classes = True
    steps = 1
    values: tuple[str, ...] = ()
    solution: dict[str, Any] | None = None
    followed: dict[str, Any] | None = None  # values of a finished fit, in place of a search

    def follow(self, other: SolvedHead) -> None:
        self.followed = other.end()

    @property
    def chosen_by_test(self) -> bool:
        return self.searches_test

    @property
    def judged(self) -> Pictures | None:
        """Return the images to search on; None: nothing is searched."""
        return None if self.followed is not None else self.searched_on

    def end(self) -> dict[str, Any]:
        assert self.solution is not None
        return {**{name: self.solution[name] for name in self.values}, "searched": self.judged is not None}

    def head(self) -> dict[str, Any]:
        return {"solution": self.solution}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        super().ready(head, text)
        self.solution = head["solution"]

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        return base_logits(pictures, text) if self.solution is None else self.solved(pictures, text, self.solution)

    @abstractmethod
    def solved(self, pictures: Pictures, text: Text, solution: dict[str, Any]) -> Tensor:
        """Return logits by the solution. Shape: [N, C]."""


class GradientHead(FewShotHead, ABC):
    """A learner whose module is trained by gradients. `best`: keep the best epoch instead of the last one."""

    best = False
    key_views = 0  # number of random views that make the keys; training epochs show other views
    module: nn.Module | None = None

    def __init__(self, *, seed: int, plan: Plan) -> None:
        """
        Args:
            seed: Seed of initialisation and order of the images.
            plan: Optimizer, epochs, batch size and learning rate.
        """
        super().__init__(seed=seed)
        for name in ("epochs", "batch", "learning_rate"):
            positive(f"few_shot.{name}", getattr(plan, name))
        self.plan, self.steps = plan, plan.epochs
        self.chosen: tuple[float, int, dict[str, Tensor]] | None = None  # accuracy, epoch, weights
        self.chooses = self.best

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the module as it is before training."""

    @abstractmethod
    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        """Return logits computed with the module. Shape: [N, C]."""

    def begin(self, train: Support, val: Pictures | None, text: Text, test: Pictures | None = None) -> None:
        super().begin(train, val, text, test)
        # Initialise from the learner's own seed without touching the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.module = self.build().to(train.seen.images)
        self.optimizer = self.plan.make([p for p in self.module.parameters() if p.requires_grad])

    def supports(self) -> list[Support]:
        """Return the sets of images that an epoch goes through, one after the other."""
        return [self.train]

    def penalty(self) -> Tensor | float:
        """Return what is added to the cross entropy of every batch."""
        return 0.0

    def cosine_over(self) -> int:
        """Return the number of batches over which the cosine of the learning rate falls."""
        return self.plan.epochs * self.plan.batches(len(self.train.seen))

    def pictures(self, support: Support, epoch: int) -> Pictures:
        """Return the images of an epoch: another random view each time, or the test view of maps."""
        return support.seen if "maps" in self.needs else support.training_view(epoch, self.key_views)

    def step(self, number: int) -> dict[str, float]:
        supports = self.supports()
        per_epoch = sum(self.plan.batches(len(each.seen)) for each in supports)
        # `done` counts batches over the whole fit, since the cosine of `adamw` falls by batch, not by epoch.
        done, losses, right, seen, rate = number * per_epoch, list[float](), 0, 0, 0.0
        for which, support in enumerate(supports):
            shown = self.pictures(support, number)
            order = batches(len(shown), self.plan.batch, self.seed, number, which)
            # islice drops the incomplete last batch with drop_last.
            for index in islice(order, self.plan.batches(len(shown))):
                part = shown.take(index.to(shown.labels.device))
                rate = self.plan.rate(number, done, self.cosine_over())
                logits = self.forward(part, self.text)
                loss, hits = descend(self.optimizer, logits, part.labels, rate, self.penalty())
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
        # strictly better: of equal epochs the first is kept
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
        # Building draws random weights, which are overwritten: keep the global generator as it was.
        with torch.random.fork_rng(devices=[]):
            self.module = self.shaped_as(head["module"]).to(next(iter(head["module"].values())).device)
        self.module.load_state_dict(head["module"])

    def shaped_as(self, weights: dict[str, Tensor]) -> nn.Module:
        """Return a module that such weights fit into."""
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
    """Make all steps of a learner. Return what it chose. Arguments as in `FewShotHead.begin`."""
    learner.begin(train, val, text, test)
    for number in range(learner.steps):
        learner.step(number)
    return learner.end()


def accuracy(learner: FewShotHead, pictures: Pictures, text: Text) -> float:
    """Return the share of images whose highest logit is that of their label."""
    return float((all_logits(learner, pictures, text).argmax(1) == pictures.labels).float().mean())


def all_logits(learner: FewShotHead, pictures: Pictures, text: Text, chunk: int = CHUNK) -> Tensor:
    """Return logits of any number of images, chunk by chunk. Shape: [N, C]."""
    with torch.no_grad():
        parts = (pictures.take(slice(start, start + chunk)) for start in range(0, len(pictures), chunk))
        return torch.cat([learner.logits(part, text) for part in parts])


def maps_of(pictures: Pictures) -> Tensor:
    """Return the maps, for a learner that needs them."""
    assert pictures.maps is not None, "learners that need maps get them"
    return pictures.maps
