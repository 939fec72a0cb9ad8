"""Rehearsals at real size: every step of a run with a published architecture (python -m benchmarks.rehearse)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hydra

from common.config import composition
from common.config.schema import Config
from common.types import Sample


def varied(samples: Sequence[Sample]) -> list[float]:
    """Return rewards that differ between any completions: random weights would earn no real reward. Length: N."""
    return [sum(sample.completion.encode()) % 97 / 97 for sample in samples]


def composed(overrides: Sequence[str]) -> Config:
    """Return the configuration that run.py composes from these overrides."""
    composition.register()
    with hydra.initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        return composition.validate(hydra.compose("config", list(overrides)))
