"""The training of a learner's module: epochs of batches, the best epoch by the judges, a state to go on from."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from alert.draft.fit.base import Unfitted, base_logits
from alert.draft.fit.data import Pictures, Plan, Support, Text, accuracy, batches, descend
from common.config.checks import positive


class Trained(Unfitted, ABC):
    """A learner whose module is trained by gradients; `best`: the epoch that is best by the judges is kept."""

    best = False
    key_views = 0  # random views that keys are made of, which no epoch shows
    module: nn.Module | None = None

    def __init__(self, *, seed: int, plan: Plan) -> None:
        """
        Args:
            seed: Of the start and the order of the pictures.
            plan: Of the training.
        """
        super().__init__(seed=seed)
        for name in ("epochs", "batch", "learning_rate"):
            positive(f"few_shot: {name}", getattr(plan, name))
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
