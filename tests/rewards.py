"""Rewards for tests."""

from __future__ import annotations

import os
import signal

from alert.contrastive import ContrastiveReasoning

calls = 0


def shorter(samples):
    """An untrained model earns this one too."""
    return [1.0 / (1 + len(sample.completion)) for sample in samples]


def not_a_number_in_the_third_update(samples):
    """A reward with a bug that shows late."""
    global calls
    calls += 1
    return [float("nan") if calls == 3 else value for value in shorter(samples)]


def rank_1_dies_in_the_second_update(samples):
    """As if the machine had run out of memory."""
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return shorter(samples)


class JudgedByLetters(ContrastiveReasoning):
    """The judge is asked; as an untrained one never states a score, its reply's letters make one from 0 to 1."""

    def _value(self, reply):
        return sum(map(ord, reply)) % 11 / 10
