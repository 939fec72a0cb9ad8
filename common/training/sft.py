"""Supervised fine-tuning on the labels: the baseline of CLS-RL, on the same engine and the same forward as GRPO.

Loss: mean cross-entropy per token over the update. `answer` counts the label's tokens and the end of sequence.
`everything` is what the CLS-RL authors' code does: it also counts the prompt without image tokens, and after the label
the header of one more, empty reply.

Shapes: T scored tokens of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.config.schema import TrainerConfig
from common.forward.logprobs import PolicyScorer, head_rows
from common.forward.packing import PromptGroup, micro_batches, pack_shared, score_prompts
from common.models.encoder import PromptEncoder
from common.models.vlm import VLM, after_reply
from common.rollout.base import Rollout
from common.runtime.distributed import gather, share_of, world
from common.training.base import Epochs, Step, batch
from common.training.engine import Engine, EngineTrainer, zero_stage


class SFTTrainer(EngineTrainer):
    """Trainer whose `step` makes one update over `prompts_per_update` labelled images."""

    def __init__(
        self,
        *,
        vlm: VLM,
        encoder: PromptEncoder,
        rollout: Rollout,
        prompts: Epochs,
        loss: str,
        config: TrainerConfig,
        deepspeed: dict[str, Any],
        updates: int,
        seed: int,
        resume: Path | None = None,
        done: int = 0,
        reply: Callable[[str], str] = str,
    ) -> None:
        """Build the engine. `reply`: from a label to the reply text. `rollout`: for evaluations. Others as for GRPO."""
        self.rollout, self.version = rollout, done
        self.reply, self.vocabulary = reply, vlm.model.get_output_embeddings().weight.shape[0]
        self.vlm, self.encoder, self.prompts = vlm, encoder, prompts
        self.loss, self.config, self.seed = loss, config, seed
        self.tokens = 0.0
        in_step = zero_stage(deepspeed) == 3
        chunk = head_rows(vlm.model)
        scorer = PolicyScorer(vlm, temperature=1.0, chunk=chunk, in_step=in_step).to(vlm.device)
        self.engine = Engine(scorer, config, deepspeed, updates, resume)

    def step(self, update: int) -> Step:
        """Make one update."""
        start = time.perf_counter()
        # This rank's share of the update's prompts, packed into micro-batches.
        chosen = batch(update, self.config.prompts_per_update, len(self.prompts), self.seed)
        prompts = share_of([self.prompts(epoch)[i] for epoch, i in chosen])
        with self.engine.whole_weights():  # encoding may run the vision tower
            encoded = self.encoder(prompts)
        targets = [target(self.vlm, self.reply(prompt.label), self.loss) for prompt in prompts]
        # a group of one completion: the target
        groups = [PromptGroup(e, (ids,)) for e, ids in zip(encoded, targets, strict=True)]
        packs = [
            pack_shared(part, self.vlm.family, self.vlm.device)
            for part in micro_batches(groups, self.config.prompts_per_forward)
        ]
        if self.loss == "everything":
            packs = [score_prompts(packed, self.vlm.banned, self.vocabulary) for packed in packs]
        # Number of target tokens over all ranks: the loss is a mean over all of them, not a mean of means.
        tokens = sum(gather(sum(len(packed.targets) for packed in packs)))
        self.tokens += float(sum(gather(sum(packed.tokens for packed in packs))))
        total, entropy, right = 0.0, 0.0, 0.0
        for number, packed in enumerate(packs):
            logps, entropies = self.engine(packed)
            loss = -logps.sum() / tokens
            # DeepSpeed averages gradients over ranks; the loss is a sum over them.
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
        self.version = update + 1
        return Step(metrics, {"update": time.perf_counter() - start}, [])


def target(vlm: VLM, reply: str, loss: str) -> torch.Tensor:
    """Return the token ids of a reply, of what leads to it and of its end. Shape: [T].

    With `everything` the header of another reply is appended: the CLS-RL authors' code applies the chat template with
    `add_generation_prompt=True` to the finished conversation.
    """
    tokenizer, reply = vlm.processor.tokenizer, vlm.lead + reply
    if loss == "everything":
        reply += after_reply(vlm.processor, header=True)
        return torch.tensor(tokenizer(reply, add_special_tokens=False)["input_ids"])
    return torch.tensor([*tokenizer(reply, add_special_tokens=False)["input_ids"], vlm.end_of_turn])
