"""Types of the configuration groups `learner`, `clip` and `visual`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from common.config.checks import one_of, positive
from common.types import UserError


@dataclass
class LearnerConfig:
    """What is trained and tested (common/learner.py). build: its class. check: a function that checks its
    configuration. needs_shots: it learns from the few-shot images without a `trainer`, too, so its classes are theirs.
    """

    name: str = MISSING
    build: str = MISSING
    check: str = MISSING
    needs_shots: bool = True


@dataclass
class EncoderConfig:
    """A frozen encoder of pictures, whose features few-shot learners are fitted on.

    load: the function that makes it, null: none; options: its arguments. dtype: that it computes in, and that features
    are kept in. views: random views of a training picture before a training repeats them, and as many others for keys;
    null: another one in every epoch. crop: shares of the picture that they cover, null: the learner's own. flip: the
    probability that one is mirrored.
    """

    name: str = MISSING
    load: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    batch: int = 64
    views: int | None = 10
    crop: list[float] | None = None
    flip: float = 0.5

    def __post_init__(self) -> None:
        one_of("clip.dtype, visual.dtype", self.dtype, ("float32", "float16"))
        positive("clip.batch, visual.batch", self.batch)
        if self.views is not None:
            positive("clip.views, visual.views", self.views)
        if self.crop is not None and (len(self.crop) != 2 or not 0 < self.crop[0] <= self.crop[1] <= 1):
            raise UserError(f"clip.crop={self.crop} must be two shares of a picture, such as [0.5,1]")
        if not 0 <= self.flip <= 1:
            raise UserError(f"clip.flip={self.flip} must be a probability")


@dataclass
class ClipConfig(EncoderConfig):
    """A CLIP, which also reads. templates: sentences with {} for a class name. prompts: a JSON file of sentences for
    every class instead.
    """

    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    prompts: str | None = None
