"""Types of the configuration groups that say what is asked: dataset, setting, protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from common.checks import one_of
from common.data.sampling import SAMPLERS, TEST_ROWS
from common.types import UserError


@dataclass
class Data:
    """A dataset: where it lies, who reads it, what is asked about it.

    reader: `_target_` and keyword arguments of the function that finds images and labels. hub: the same for
    `source=hub`, where such an id is known. root: the folder of all datasets. folder: this one's, inside root or
    absolute. cache_gb: disk space for decoded images. aliases: JSON file, class name to other words for it. published:
    the sizes to expect.
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

    def __post_init__(self) -> None:
        one_of("data.source", self.source, ("local", "hub"))
        if self.cache_gb < 0:
            raise UserError(f"data.cache_gb={self.cache_gb} must be 0 (no cache) or a size in GiB")
        if self.source == "hub" and not self.hub:
            raise UserError(
                f"data={self.name}: no hub id with this dataset's images and names is known; docs/datasets.md"
            )


@dataclass
class Setting:
    """What the model is tested on relative to what it was trained on.

    build: the function that assembles the splits. list_share: share of the class names that a question lists; 0: the
    question is open. targets: datasets to test on besides; test_on: their names, null: all of them.
    """

    name: str = MISSING
    build: str = MISSING
    list_share: float = 0.4
    targets: dict[str, Data] = field(default_factory=dict)
    test_on: list[str] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.list_share <= 1:
            raise UserError(f"setting.list_share={self.list_share} must be between 0 (open question) and 1")


@dataclass
class Protocol:
    """Choices in which the CLS-RL authors' code and a sound evaluation differ, each a switch of its own."""

    name: str = MISSING
    accuracy_match: str = MISSING
    format_match: str = MISSING
    evaluation_prompt: str = MISSING
    sampler: str = MISSING
    test_rows: str = MISSING
    sft_loss: str = MISSING
    sft_system_prompt: str = MISSING

    def __post_init__(self) -> None:
        for key in ("accuracy_match", "format_match"):
            one_of(f"protocol.{key}", getattr(self, key), ("strict", "official"))
        one_of("protocol.evaluation_prompt", self.evaluation_prompt, ("train", "official"))
        one_of("protocol.sampler", self.sampler, SAMPLERS)
        one_of("protocol.test_rows", self.test_rows, TEST_ROWS)
        one_of("protocol.sft_loss", self.sft_loss, ("answer", "everything"))
        one_of("protocol.sft_system_prompt", self.sft_system_prompt, ("default", "think"))
