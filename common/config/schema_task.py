"""Types of the configuration groups that say what is asked: dataset, setting, protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from common.config.checks import one_of, positive
from common.types import UserError

# What common/data/sampling.py can draw; see `Sampling` there.
SAMPLERS = ("coop", "clsrl")
VALIDATIONS = ("few", "full", "none", "held_out")
TEST_ROWS = ("test", "val_and_test")


@dataclass
class DataConfig:
    """A dataset: where it lies, who reads it, what is asked about it.

    reader: `_target_` and keyword arguments of the function that finds images and labels. hub: the same for
    `source=hub`, where such an id is known. root: the folder of all datasets. folder: this one's, inside root or
    absolute. cache_gb: disk space for decoded images. aliases: JSON file, class name to other words for it. published:
    the sizes to expect. duplicates: what to do about pictures that are there twice (`warn`, `refuse`, `ignore`).
    near_duplicates: look for pictures that look alike, too; null: among up to 20,000 pictures. background: colour
    behind what is transparent, as a name (black) or in hexadecimal ('#80a0ff'). own_photos: nobody else's picks are to
    be met, so unusable images are replaced, and the folder may also be inside the working directory. licence: of the
    pictures, for model cards.
    """

    name: str = MISSING
    folder: str = MISSING
    reader: dict[str, Any] = field(default_factory=dict)
    question: str = MISSING
    open_question: str = "What type of object is in the photo?"
    root: str | None = "${oc.env:DATA,null}"
    source: str = "local"
    hub: dict[str, Any] = field(default_factory=dict)
    allow_fallback_split: bool = False
    skip_bad: bool = False
    cache_gb: float = 10.0
    aliases: str | None = None
    published: dict[str, int] = field(default_factory=dict)
    duplicates: str = "warn"
    near_duplicates: bool | None = False
    background: str = "white"
    own_photos: bool = False
    licence: str | None = None

    def __post_init__(self) -> None:
        one_of("data.source", self.source, ("local", "hub"))
        one_of("data.duplicates", self.duplicates, ("warn", "refuse", "ignore"))
        if self.near_duplicates and self.duplicates == "ignore":
            raise UserError("data.near_duplicates=true needs data.duplicates=warn or refuse, not ignore")
        if self.background != "white":
            _check_colour("data.background", self.background)
        if self.cache_gb < 0:
            raise UserError(f"data.cache_gb={self.cache_gb} must be 0 (no cache) or a size in GiB")
        if self.source == "hub" and not self.hub:
            raise UserError(
                f"data={self.name}: no hub id with this dataset's images and names is known; docs/datasets.md"
            )


def _check_colour(key: str, value: str) -> None:
    from PIL import ImageColor

    try:
        opaque = len(ImageColor.getrgb(value)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        raise UserError(f"{key}={value} is no colour: give a name such as white, black or grey, or one like '#80a0ff'")


@dataclass
class SettingConfig:
    """What the model is tested on relative to what it was trained on.

    build: the function that assembles the splits. list_share: share of the class names that a question lists; 0: the
    question is open. targets: datasets to test on besides; test_on: their names, null: all of them. test_per_class:
    test on so many images of each class, the same ones for all seeds but what these train on; null: on all.
    """

    name: str = MISSING
    build: str = MISSING
    list_share: float = 0.4
    targets: dict[str, DataConfig] = field(default_factory=dict)
    test_on: list[str] | None = None
    test_per_class: int | None = None

    def __post_init__(self) -> None:
        if self.test_per_class is not None:
            positive("setting.test_per_class", self.test_per_class)
        if not 0 <= self.list_share <= 1:
            raise UserError(f"setting.list_share={self.list_share} must be between 0 (open question) and 1")


@dataclass
class ProtocolConfig:
    """Choices in which the CLS-RL authors' code and a sound evaluation differ, each a switch of its own.

    articles: an answer may begin with a, an or the; in the evaluation's strict match alone, never in a reward.
    """

    name: str = MISSING
    accuracy_match: str = MISSING
    format_match: str = MISSING
    evaluation_prompt: str = MISSING
    sampler: str = MISSING
    test_rows: str = MISSING
    sft_loss: str = MISSING
    sft_system_prompt: str = MISSING
    sft_question: str = MISSING
    sft_image: str = MISSING
    sft_target: str = MISSING
    articles: bool = False

    def __post_init__(self) -> None:
        for key in ("accuracy_match", "format_match"):
            one_of(f"protocol.{key}", getattr(self, key), ("strict", "official"))
        one_of("protocol.evaluation_prompt", self.evaluation_prompt, ("train", "official"))
        one_of("protocol.sampler", self.sampler, SAMPLERS)
        one_of("protocol.test_rows", self.test_rows, TEST_ROWS)
        one_of("protocol.sft_loss", self.sft_loss, ("answer", "everything"))
        one_of("protocol.sft_system_prompt", self.sft_system_prompt, ("default", "think"))
        one_of("protocol.sft_question", self.sft_question, ("instructed", "bare"))
        one_of("protocol.sft_image", self.sft_image, ("first", "last"))
        one_of("protocol.sft_target", self.sft_target, ("label", "tagged"))
