"""Sample with the training model: prompt and image are computed once, the KV cache is copied for the whole group.

Randomness is a table of uniform numbers from each prompt's seed, turned into tokens by the inverse of the cumulative
distribution. So a completion depends only on weights, prompt and seed: not on the batch it is computed in, the number
of ranks, or restarts.

Shapes: N prompts, G completions each, B = N G rows, P padded prompt tokens, R completion tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from common.forward import attention
from common.forward.logprobs import spliced, token_logps
from common.forward.packing import images, micro_batches, pad_blocks
from common.judge.text import uncut
from common.models.adapters import without_adapters
from common.models.encoder import EncodedPrompt
from common.models.vlm import VLM, rendered, turns
from common.rollout.base import Completion, Decoding, Request


class HFRollout:
    """Rollout backend that samples with the training model itself and needs only transformers."""

    logprobs_untruncated = True

    def __init__(self, vlm: VLM) -> None:
        attention.install(vlm.model)
        self.vlm, self.version = vlm, 0

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], group_size: int, decoding: Decoding) -> list[list[Completion]]:
        """Sample completions, see `Rollout.generate`."""
        model = self.vlm.model
        was_training = model.training
        model.eval()
        seeds = [request.seed for request in requests]
        noise = uniform_table(seeds, group_size, decoding.max_tokens) if decoding.temperature > 0 else None
        try:
            rows = self._decode([request.encoded for request in requests], group_size, decoding, noise)
        finally:
            model.train(was_training)
        return [rows[start : start + group_size] for start in range(0, len(rows), group_size)]

    def refresh(self, version: int) -> None:
        """Note the version; the weights are those of the trainer."""
        self.version = version

    def rest(self) -> None:
        return

    def wake(self) -> None:
        return

    def close(self) -> None:
        return

    def _decode(
        self, prompts: Sequence[EncodedPrompt], group_size: int, decoding: Decoding, noise: torch.Tensor | None
    ) -> list[Completion]:
        device = self.vlm.device
        banned = torch.tensor(self.vlm.banned, device=device)
        ends = torch.tensor(self.vlm.eos, device=device)
        # prefill: left padding, so that every prompt ends in the last column
        ids, mask, positions = (x.to(device) for x in left_pad(prompts, self.vlm.pad))
        extra = images(prompts, self.vlm.family, device)
        blocks = pad_blocks(prompts, left=True)
        if blocks is not None:
            extra |= self.vlm.family.block_inputs(blocks.to(device))
        cache = DynamicCache(config=self.vlm.model.config.get_text_config())
        logits = self._forward(ids, mask, positions, cache, extra)  # [N, V]
        # one row per completion; it continues after the largest position of the prompt, as in the trainer's forward
        cache.batch_repeat_interleave(group_size)
        logits, mask = (x.repeat_interleave(group_size, 0) for x in (logits, mask))
        position = (positions.amax((0, 2)) + 1).repeat_interleave(group_size)  # [B]

        # decode token by token; `rows`: the completion that each remaining row belongs to
        rows = torch.arange(len(logits), device=device)
        tokens = torch.full((len(rows), decoding.max_tokens), -1, device=device)  # [B, R]
        logps = torch.zeros(tokens.shape, device=device)
        alive = torch.ones_like(rows, dtype=torch.bool)
        for step in range(decoding.max_tokens):
            distribution = token_logps(logits, banned, decoding.temperature or 1.0)  # [live, V]
            # indexed by completion and step, so that dropped rows do not shift the random numbers
            uniform = None if noise is None else noise[rows.cpu(), step].to(device)
            chosen = choose(distribution, decoding, uniform)  # [live]
            tokens[rows, step] = chosen
            logps[rows, step] = distribution.gather(-1, chosen[:, None])[:, 0].float()
            alive = alive & ~torch.isin(chosen, ends)  # finished rows go on sampling; `_completions` cuts that off
            if not alive.any() or step + 1 == decoding.max_tokens:
                break
            # Drop finished rows once they are half of the rows: selecting copies the whole cache.
            if 2 * int(alive.sum()) <= len(alive):
                kept = alive.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                rows, mask, position, chosen, alive = (x[kept] for x in (rows, mask, position, chosen, alive))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions_now = (position + step)[None, :, None].expand(len(positions), -1, -1)  # [A, live, 1]
            logits = self._forward(chosen[:, None], mask, positions_now, cache, {})
        return self._completions(tokens.cpu(), logps.cpu())

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: DynamicCache,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        """Return the logits of the next token. Shape: [B, V]."""
        # a prefill without padding needs no mask, which lets the faster kernels run
        full = ids.shape[1] > 1 and bool(mask.all())
        inputs = {
            "input_ids": ids,
            "attention_mask": None if full else mask,
            "position_ids": self.vlm.family.position_ids(positions),
            **extra,
        }
        inputs = spliced(without_adapters(self.vlm.model), inputs)
        out = self.vlm.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def _completions(self, tokens: torch.Tensor, logps: torch.Tensor) -> list[Completion]:
        """Cut the rows [B, R] after their first end-of-sequence id."""
        ends = torch.isin(tokens, torch.tensor(self.vlm.eos, dtype=tokens.dtype))
        ended = ends.any(1)
        # without one, a row ends before its first -1, which marks places that were not sampled
        lengths = torch.where(ended, ends.int().argmax(1) + 1, (tokens >= 0).sum(1)).tolist()
        completions = []
        for row, length in enumerate(lengths):
            ids, finished = tokens[row, :length].clone(), bool(ended[row])
            text = self.vlm.processor.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
            text = text.removeprefix(self.vlm.lead)
            completions.append(Completion(ids, logps[row, :length].clone(), text, not finished, self.version))
        return completions


def left_pad(prompts: Sequence[EncodedPrompt], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids [N, P], mask [N, P] and positions [A, N, P] with padding before each prompt."""
    width = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    positions = torch.zeros((len(prompts[0].positions), len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt.ids)
        ids[row, start:], mask[row, start:], positions[:, row, start:] = prompt.ids, 1, prompt.positions
    return ids, mask, positions


def uniform_table(seeds: Sequence[str], group_size: int, tokens: int) -> torch.Tensor:
    """Draw one uniform number per completion token, from the seed of each prompt. Shape: [N G, R], in [0, 1), fp64."""
    tables = []
    for seed in seeds:
        state = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little", signed=True)
        generator = torch.Generator().manual_seed(state)
        tables.append(torch.rand(group_size, tokens, generator=generator, dtype=torch.float64))
    return torch.cat(tables)


def choose(logps: torch.Tensor, decoding: Decoding, uniform: torch.Tensor | None) -> torch.Tensor:
    """Choose the next token of every row: the most probable one, or the inverse cumulative distribution at `uniform`.

    Shape: [B, V] -> [B].
    """
    if uniform is None:
        return logps.argmax(-1)
    # fp64, because near 1 a running sum in fp32 cannot resolve small probabilities
    mass = truncate(logps.double().exp(), decoding.top_k, decoding.top_p).cumsum(-1)  # [B, V]
    drawn = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)[:, 0]
    # by rounding, `drawn` may lie behind the last token with a probability above zero
    last = (mass < mass[:, -1:]).sum(-1)
    return torch.minimum(drawn, last)


def truncate(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set to zero all but the `top_k` most probable tokens (0: keep all), then all but the fewest that reach `top_p`.

    >>> truncate(torch.tensor([[0.5, 0.3, 0.2]]), 2, 1.0)
    tensor([[0.5000, 0.3000, 0.0000]])
    >>> truncate(torch.tensor([[0.5, 0.3, 0.2]]), 0, 0.6)
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    if 0 < top_k < probabilities.shape[-1]:
        threshold = probabilities.topk(top_k, -1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= threshold, 0.0)
    if top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # exclusive: the token that crosses top_p is kept
        kept = ordered.where(before < top_p * ordered.sum(-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, kept)
    return probabilities


# Greedy replies of the initial model to texts, for rewards that use it as a judge. Shapes: P prompt tokens.


class FrozenReplies:
    """Function from texts to replies of the initial model; create it before the first update.

    With adapters it uses the base model, without them a copy, which must be made before embeddings are attached.
    """

    def __init__(self, vlm: VLM, batch: int) -> None:
        self.adapters = hasattr(vlm.model, "disable_adapter")
        self.vlm = vlm if self.adapters else replace(vlm, model=copy.deepcopy(vlm.model).eval().requires_grad_(False))
        self.rollout, self.batch = HFRollout(self.vlm), batch

    def __call__(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """Return one reply to each text, without the end of turn; of truncated ones, without the last word."""
        decoding = Decoding(temperature=0.0, top_k=0, top_p=1.0, max_tokens=max_tokens)
        replies: list[str] = []
        with self._base():
            for part in micro_batches(list(texts), self.batch):
                groups = self.rollout.generate([self._request(text) for text in part], 1, decoding)
                replies += [uncut(reply.text) if reply.truncated else reply.text for (reply,) in groups]
        return replies

    @contextmanager
    def _base(self) -> Iterator[None]:
        if not self.adapters:
            yield
            return
        with self.vlm.model.disable_adapter():
            yield

    def _request(self, text: str) -> Request:
        """Return a request for a conversation without an image. Shape of its ids: [P]."""
        tokenizer, family = self.vlm.processor.tokenizer, self.vlm.family
        ids = torch.tensor(tokenizer(rendered(self.vlm.processor, turns(text)), add_special_tokens=False)["input_ids"])
        config = self.vlm.model.config
        blocks = None if self.vlm.causal_images else family.blocks(ids, config)
        encoded = EncodedPrompt(ids, family.positions(ids, None, config), None, None, blocks)
        return Request(encoded, "", lambda: ids, list)
