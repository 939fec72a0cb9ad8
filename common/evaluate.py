"""Evaluation: greedy answers to every prompt of a split, matched strictly and as the authors' code does."""

from __future__ import annotations

from collections.abc import Sequence

from common import parsing
from common.distributed import gather, interleave, share_of
from common.engine import micro_batches
from common.models.vlm import Encoder
from common.progress import progress
from common.rollout.base import Completion, Decoding, Rollout
from common.types import Method, Prediction, Prompt


def evaluate(
    rollout: Rollout,
    encoder: Encoder,
    method: Method,
    prompts: Sequence[Prompt],
    max_tokens: int,
    batch: int,
    description: str,
) -> list[Prediction]:
    """Predictions in the order of `prompts`, on every rank; the work is shared between ranks."""
    decoding = greedy(max_tokens)
    mine = share_of(list(prompts))
    slices = list(micro_batches(mine, batch))
    found: list[Prediction] = []
    for part in progress(slices, description, len(slices)):
        for prompt, group in zip(part, rollout.generate(encoder(part), 1, decoding, [""] * len(part)), strict=True):
            found.append(predict(method, prompt, group[0]))
    return interleave(gather(found))


def greedy(max_tokens: int) -> Decoding:
    """The decoding of every evaluation; named in metrics.json."""
    return Decoding(temperature=0.0, top_k=0, top_p=1.0, max_tokens=max_tokens)


def predict(method: Method, prompt: Prompt, completion: Completion) -> Prediction:
    """Grade one completion."""
    text = completion.text
    strict = parsing.strict_answer(text)
    return Prediction(
        image=prompt.image,
        label=prompt.label,
        answer=parsing.first_answer(text) if strict is None else strict,
        completion=text,
        correct=parsing.matches_strictly(text, prompt.label),
        correct_official=parsing.matches_officially(text, prompt.label),
        formatted=method.well_formed(text),
        tokens=len(completion.ids),
        truncated=completion.truncated,
    )
