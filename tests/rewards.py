"""Rewards for tests."""

from __future__ import annotations


def shorter(samples):
    """An untrained model earns this one too."""
    return [1.0 / (1 + len(sample.completion)) for sample in samples]
