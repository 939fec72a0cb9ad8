"""Samplers for tests."""

from __future__ import annotations

from dataclasses import replace

from common.rollout.base import Request
from common.rollout.hf import HFRollout


def requests(prompts, seeds):
    """Encoded prompts as a sampler inside the trainer takes them."""
    return [
        Request(encoded, seed, lambda ids=encoded.ids: ids, list) for encoded, seed in zip(prompts, seeds, strict=True)
    ]


class Thinking(HFRollout):
    """Some of an untrained model's completions (those that begin with an even id) as reasonings, to have judged."""

    def generate(self, *arguments):
        return [[_thought(completion) for completion in group] for group in super().generate(*arguments)]


def _thought(completion):
    if completion.ids[0] % 2:
        return completion
    return replace(completion, text=f"<think>{completion.text}</think><answer>six</answer>")
