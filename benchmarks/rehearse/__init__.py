"""Rehearsals at real size: the published architectures through every step of a run (python -m benchmarks.rehearse)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hydra

from common.config import composition
from common.config.schema import Config
from common.types import Sample


def varied(samples: Sequence[Sample]) -> list[float]:
    """A reward in which completions differ, whatever they say: random weights earn no other. Length: N."""
    return [sum(sample.completion.encode()) % 97 / 97 for sample in samples]


def composed(overrides: Sequence[str]) -> Config:
    """The configuration that run.py would have."""
    composition.register()
    with hydra.initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        return composition.validate(hydra.compose("config", list(overrides)))
