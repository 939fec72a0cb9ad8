"""Greedy replies to plain texts by the model as it was before training: a judge of its own.

Shapes: P prompt tokens.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from common.forward.packing import micro_batches
from common.models.encoder import Encoded
from common.models.vlm import VLM
from common.rollout.base import Decoding, Request
from common.rollout.hf import HFRollout

CUT = re.compile(r"\s*\S+\s*\Z")


class FrozenReplies:
    """The untrained model as a function from texts to replies; build it before the first update.

    With adapters that is the base model, without them a copy: so before anything is attached that it has no use for.
    """

    def __init__(self, vlm: VLM, batch: int) -> None:
        self.adapters = hasattr(vlm.model, "disable_adapter")
        self.vlm = vlm if self.adapters else replace(vlm, model=copy.deepcopy(vlm.model).eval().requires_grad_(False))
        self.rollout, self.batch = HFRollout(self.vlm), batch

    def __call__(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """One reply to each text, without the end of turn, or its last word if the limit may have cut that."""
        decoding = Decoding(temperature=0.0, top_k=0, top_p=1.0, max_tokens=max_tokens)
        replies: list[str] = []
        with self._base():
            for part in micro_batches(list(texts), self.batch):
                groups = self.rollout.generate([self._request(text) for text in part], 1, decoding)
                replies += [CUT.sub("", reply.text) if reply.truncated else reply.text for (reply,) in groups]
        return replies

    @contextmanager
    def _base(self) -> Iterator[None]:
        if not self.adapters:
            yield
            return
        with self.vlm.model.disable_adapter():
            yield

    def _request(self, text: str) -> Request:
        """A conversation without an image. Shape of its ids: [P]."""
        tokenizer, family = self.vlm.processor.tokenizer, self.vlm.family
        turns = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        rendered = self.vlm.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        config = self.vlm.model.config
        blocks = None if self.vlm.causal_images else family.blocks(ids, config)
        encoded = Encoded(ids, family.positions(ids, None, config), None, None, blocks)
        return Request(encoded, "", lambda: ids, list)
