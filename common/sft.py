"""Supervised fine-tuning on the labels: the baseline of CLS-RL, on the same engine and the same forward as GRPO.

Loss: mean cross-entropy per token over the update. `answer` counts the label's tokens and the end of sequence;
`everything` is the authors' quirk, which also counts the prompt, image tokens excepted.

Shapes: T scored tokens of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from common.distributed import gather, share_of, world
from common.engine import Engine, micro_batches, zero_stage
from common.grpo.logprobs import PolicyScorer
from common.grpo.packing import Group, pack_shared, score_prompts
from common.models.vlm import VLM, Encoder
from common.schedule import Epochs, batch
from common.schema import Trainer
from common.types import Step


class SFTTrainer:
    """One `step` per update over `prompts_per_update` labelled images."""

    def __init__(
        self,
        *,
        vlm: VLM,
        encoder: Encoder,
        prompts: Epochs,
        loss: str,
        config: Trainer,
        deepspeed: dict[str, Any],
        updates: int,
        seed: int,
        resume: Path | None = None,
        reply: Callable[[str], str] = str,
    ) -> None:
        """`reply`: from a label to the text that answers it; the rest as for GRPO."""
        self.reply, self.vocabulary = reply, vlm.model.get_output_embeddings().weight.shape[0]
        self.vlm, self.encoder, self.prompts = vlm, encoder, prompts
        self.loss, self.config, self.seed = loss, config, seed
        self.tokens = 0.0
        in_step = zero_stage(deepspeed) == 3
        scorer = PolicyScorer(vlm.model, vlm.banned, temperature=1.0, chunk=1024, in_step=in_step).to(vlm.device)
        self.engine = Engine(scorer, config, deepspeed, updates, resume)

    def step(self, update: int) -> Step:
        """One update."""
        start = time.perf_counter()
        chosen = batch(update, self.config.prompts_per_update, len(self.prompts), self.seed)
        prompts = share_of([self.prompts(epoch)[i] for epoch, i in chosen])
        with self.engine.whole_weights():  # image features may have to be computed
            encoded = self.encoder(prompts)
        groups = [Group(e, (self._target(p.label),)) for p, e in zip(prompts, encoded, strict=True)]
        packs = [
            pack_shared(part, self.vlm.family, self.vlm.device)
            for part in micro_batches(groups, self.config.prompts_per_forward)
        ]
        if self.loss == "everything":
            packs = [score_prompts(packed, self.vlm.banned, self.vocabulary) for packed in packs]
        tokens = sum(gather(sum(len(packed.targets) for packed in packs)))
        self.tokens += float(sum(gather(sum(packed.tokens for packed in packs))))
        total, entropy, right = 0.0, 0.0, 0.0
        for number, packed in enumerate(packs):
            logps, entropies = self.engine(packed)
            loss = -logps.sum() / tokens
            self.engine.backward(loss * world(), last=number + 1 == len(packs))
            total, entropy = total + float(loss.detach()), entropy + float(entropies.sum()) / tokens
            right += float((logps.detach().exp()).sum()) / tokens
        sums = gather((total, entropy, right))
        metrics = {
            "loss": sum(s[0] for s in sums),
            "entropy": sum(s[1] for s in sums),
            "mean_token_probability": sum(s[2] for s in sums),
            "num_tokens": self.tokens,
            "epoch": (update + 1) * self.config.prompts_per_update / len(self.prompts),
            **self.engine.step(update),
        }
        return Step(metrics, {"update": time.perf_counter() - start}, [])

    def _target(self, label: str) -> torch.Tensor:
        ids = self.vlm.processor.tokenizer(self.reply(label), add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.vlm.end_of_turn])

    def whole_weights(self) -> AbstractContextManager[None]:
        return self.engine.whole_weights()

    def save(self, folder: Path) -> None:
        self.engine.save(folder)

    def close(self) -> None:
        self.engine.close()
