"""Choose among learners by cross-validation on the training images, then fit the best one on all of them.

Repeated stratified k-fold cross-validation: every setting of every learner is fitted on k - 1 parts of the training
images and classifies the remaining part, for all k parts, several times with other parts. Of a learner's settings the
one with the smallest cross entropy counts, which varies less than the number of right answers. Of the learners the
first one stays, unless another is ahead by more than one standard error of the difference (Breiman et al. 1984): with
few images the highest of several accuracies is often the luckiest.

Every image is thus classified by learners that have not seen it; these predictions also say how sure the result may be
(common/evaluation/calibration.py) and which labels are doubtful (common/few_shot/doubts.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.config.schema import positive
from common.evaluation import calibration
from common.few_shot.heads.base import FewShotHead, Pictures, Support, Text, base_logits
from common.few_shot.heads.folds import UNKNOWN, divide
from common.plugins import check_call, locate
from common.types import UserError


class BestOf(FewShotHead):
    """The best of several learners by cross-validation. One step fits one setting on all parts but one."""

    fixed_classes = True

    def __init__(self, *, seed: int, learners: Mapping[str, Mapping[str, Any]], folds: int, repeats: int) -> None:
        """
        Args:
            seed: Seed of the parts, and of the learners.
            learners: Learners by name: `_target_`, arguments, and `grid`, lists of values to try, by argument.
            folds: Number of parts, k.
            repeats: Number of times that the images are divided into parts.

        Raises:
            UserError: There is no learner, or an argument of one is wrong.
        """
        super().__init__(seed=seed)
        positive("few_shot.repeats", repeats)
        if folds < 2:
            raise UserError(f"few_shot.folds={folds} must be 2 or more: each part is classified by the others")
        if not learners:
            raise UserError("few_shot.learners is empty; name one, such as few_shot.learners=[linear_probe]")
        self.folds, self.repeats = folds, repeats
        self.settings = [setting for name, entry in learners.items() for setting in _settings(name, entry, seed)]
        self.needs = frozenset().union(*(each.build().needs for each in self.settings))
        self.steps = len(self.settings) * folds * repeats + 1  # the last one fits the best setting on all images
        self.fitted: FewShotHead | None = None
        self.chosen: int | None = None
        # Logits of every setting in every repeat for the images that it had not seen. [settings, repeats, N, C]
        self.held_out: Tensor | None = None

    def begin(self, train: Support, val: Pictures | None, text: Text, test: Pictures | None = None) -> None:
        super().begin(train, val, text, test)
        images, classes = len(train.seen), len(text.names)
        shape = (len(self.settings), self.repeats, images, classes)
        self.held_out = train.seen.images.new_full(shape, torch.nan)
        labels = train.seen.labels.tolist()
        self.parts = divide(labels, train.groups, self.folds, self.repeats, self.seed)

    def step(self, number: int) -> dict[str, float]:
        assert self.held_out is not None
        if number == self.steps - 1:
            self.chosen = self._best()
            self.fitted = self._fit(self.chosen, self.train.seen)
            return {}
        which, repeat, fold = next(itertools.islice(self._order(), number, None))
        part = torch.tensor(self.parts[repeat], device=self.train.seen.labels.device)
        tested = part == fold
        if not tested.any():  # fewer images than parts
            return {}
        learner = self._fit(which, self.train.seen.take(~tested))
        held_out = self.train.seen.take(tested)
        with torch.no_grad():
            logits = learner.logits(held_out, self.text)
        self.held_out[which, repeat, tested] = logits
        return {"accuracy": float((logits.argmax(1) == held_out.labels).float().mean())}

    def _order(self) -> Iterator[tuple[int, int, int]]:
        """Yield setting, repeat and part of every step."""
        return itertools.product(range(len(self.settings)), range(self.repeats), range(self.folds))

    def _fit(self, which: int, seen: Pictures) -> FewShotHead:
        learner = self.settings[which].build()
        # Only the test view: it is encoded anyway, and random views would take as long again, each.
        learner.begin(Support(seen, lambda number: seen, 1), None, self.text)
        for number in range(learner.steps):
            learner.step(number)
        learner.end()
        return learner

    def _best(self) -> int:
        """Return the setting to fit on all images; see above. Without a class of two images nothing was compared."""
        best, *others = self._candidates()
        if not self._compared:
            return best
        for other in others:
            ahead = self._right(other) - self._right(best)
            if float(ahead.mean()) > float(ahead.std()) / len(ahead) ** 0.5:
                best = other
        return best

    def _candidates(self) -> list[int]:
        """Return the best setting of each learner, in the order of the configuration."""
        groups = itertools.groupby(range(len(self.settings)), key=lambda which: self.settings[which].name)
        return [min(group, key=lambda which: self.measured(which)["nll"]) for _, group in groups]

    def _right(self, which: int) -> Tensor:
        """Return how often each image was answered rightly, as a share of the repeats. [images with predictions]."""
        logits, labels = self.predictions(which)
        return (logits.argmax(1) == labels).double().view(self.repeats, -1).mean(0)

    def measured(self, which: int) -> dict[str, float]:
        """Return the share of right answers, their number, and the cross entropy at the best temperature."""
        logits, labels = self.predictions(which)
        right = int((logits.argmax(1) == labels).sum())
        temperature = calibration.temperature(logits.double().numpy(), labels.numpy())
        nll = float(torch.nn.functional.cross_entropy(logits.double() / temperature, labels))
        # a fit that gave no numbers is the worst of all
        return {"accuracy": right / max(1, len(labels)), "right": right, "nll": nll if math.isfinite(nll) else math.inf}

    def predictions(self, which: int) -> tuple[Tensor, Tensor]:
        """Return the held-out logits of a setting, repeats one after the other, and their labels. [M, C], [M]."""
        assert self.held_out is not None
        logits = self.held_out[which].flatten(0, 1).cpu()
        labels = self.train.seen.labels.cpu().repeat(self.repeats)
        there = torch.tensor(self.parts[0]).repeat(self.repeats) != UNKNOWN  # the same images in every repeat
        return logits[there].float(), labels[there]

    @property
    def _compared(self) -> bool:
        """Return whether any image was classified by learners that had not seen it."""
        return any(part != UNKNOWN for part in self.parts[0])

    def out_of_fold(self) -> tuple[Sequence[int], Tensor] | None:
        if self.chosen is None or self.held_out is None or not self._compared:
            return None
        return self.parts[0], self.held_out[self.chosen]

    def end(self) -> dict[str, Any]:
        assert self.chosen is not None and self.fitted is not None
        chosen = self.settings[self.chosen]
        if not self._compared:
            return {"learner": chosen.name, **chosen.varied}
        rows = [
            {"learner": setting.name, **setting.varied, "accuracy": self.measured(which)["accuracy"]}
            for which in self._candidates()
            for setting in [self.settings[which]]
        ]
        return {
            "learner": chosen.name,
            **chosen.varied,
            "cross_validated": {
                "folds": self.folds,
                "repeats": self.repeats,
                "images": len(self.predictions(self.chosen)[1]) // self.repeats,
                "learners": rows,
            },
        }

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        return base_logits(pictures, text) if self.fitted is None else self.fitted.logits(pictures, text)

    def head(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "fitted": None if self.fitted is None else self.fitted.head()}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        super().ready(head, text)
        self.chosen = head["chosen"]
        if self.chosen is not None:
            self.fitted = self.settings[self.chosen].build()
            self.fitted.ready(head["fitted"], text)

    def state(self) -> dict[str, Any]:
        return {**self.head(), "held_out": self.held_out}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.held_out = state["held_out"]


class Setting:
    """A learner with one value of each argument of its grid.

    varied: Values of the grid's arguments.
    """

    def __init__(self, name: str, target: str, arguments: Mapping[str, Any], varied: Mapping[str, Any]) -> None:
        self.name, self.target, self.arguments, self.varied = name, target, dict(arguments), dict(varied)

    def build(self) -> FewShotHead:
        """Return the learner, not fitted."""
        learner: FewShotHead = locate(self.target, f"few_shot.learners.{self.name}._target_")(**self.arguments)
        return learner


def _settings(name: str, entry: Mapping[str, Any], seed: int) -> Iterator[Setting]:
    """Yield every combination of the values in a learner's grid."""
    key, grid = f"few_shot.learners.{name}", entry.get("grid") or {}
    if "_target_" not in entry:
        raise UserError(f"{key}._target_ is missing: the path of the learner's class")
    fixed = {word: value for word, value in entry.items() if word not in ("_target_", "grid")} | {"seed": seed}
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        check_call(entry["_target_"], f"{key}._target_", {**fixed, **varied})
        yield Setting(name, entry["_target_"], {**fixed, **varied}, varied)
