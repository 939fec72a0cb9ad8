"""What the classes of few-shot learners share. `few_shot.<name>._target_` names a class of this folder, and the other
keys of the entry are its arguments.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alert.draft.fit.data import Pictures, Support, Text
from alert.draft.learners import zero_shot
from common.types import UserError

TEXT = frozenset({"text"})
DASSL_CROP = (0.08, 1.0)  # of Dassl, whose trainer CoOp and CLIP-Adapter use
RECONSTRUCTION = "a reconstruction: the authors published no code"


def base_logits(pictures: Pictures, text: Text) -> Tensor:
    """Zero-shot CLIP's logits, or zeros where there is no CLIP. Shape: [N, C]."""
    if text.weights is None:
        return pictures.images.new_zeros(len(pictures), len(text.names))
    return zero_shot.logits(pictures.images, text.weights)


class Unfitted:
    """What all learners share; a learner without a fit needs no more than `logits`."""

    needs: frozenset[str] = TEXT
    fixed_classes = False
    steps = 0
    remark = ""
    crop = (0.5, 1.0)  # of Tip-Adapter's and CaFo's code
    generated: str | None = None
    generated_per_class = 0

    def __init__(self, *, seed: int) -> None:
        """`seed`: of whatever is random in the fit."""
        self.seed = seed

    def begin(self, train: Support, val: Pictures | None, text: Text, test: Pictures | None = None) -> None:
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
        return False

    def check_val(self, there: bool) -> None:
        pass

    def step(self, number: int) -> dict[str, float]:
        return {}

    def end(self) -> dict[str, Any]:
        return {}

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        return base_logits(pictures, text)

    def head(self) -> dict[str, Any]:
        return {}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        self.text = text

    def state(self) -> dict[str, Any]:
        return self.head()

    def restore(self, state: dict[str, Any]) -> None:
        self.ready(state, self.text)


def maps_of(pictures: Pictures) -> Tensor:
    """The maps of a learner that needs them."""
    assert pictures.maps is not None, "learners that need maps get them"
    return pictures.maps


def three(betas: list[float]) -> tuple[float, float, float]:
    """The weights of CALIP's terms."""
    if len(betas) != 3:
        raise UserError(f"few_shot: betas={betas} must be three numbers, one for each term")
    return betas[0], betas[1], betas[2]
