"""Reference results by the unchanged processor and forward of transformers.

Shapes: P prompt tokens, R tokens of a reply, A position axes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common.forward import attention
from common.forward.logprobs import token_logps
from common.models.adapters import without_adapters
from common.models.encoder import EncodedPrompt
from common.models.meter import messages
from common.models.vlm import VLM
from common.types import CATEGORY, Prompt


def stock_inputs(policy: VLM, prompt: Prompt, picture: Any) -> dict[str, torch.Tensor]:
    """Return the inputs that the processor of transformers makes of a prompt, in one call. One row."""
    conversation: list[dict[str, Any]] = copy.deepcopy(messages(prompt))
    for message in conversation:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = picture
            else:
                part["text"] = part["text"].replace(CATEGORY, policy.processor.tokenizer.pad_token)
    return dict(
        policy.processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    )


def stock_positions(policy: VLM, ids: torch.Tensor, stock: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the position ids of a prompt that the model of transformers computes. Shape: [P] -> [A, P]."""
    base = without_adapters(policy.model)
    # only models with M-RoPE have this method; the others count
    if not hasattr(base.model, "get_rope_index"):
        return torch.arange(len(ids))[None]
    kinds = (ids == base.config.image_token_id).int()[None]
    found: torch.Tensor = base.model.get_rope_index(
        input_ids=ids[None],
        mm_token_type_ids=kinds,
        image_grid_thw=stock["image_grid_thw"],
        attention_mask=torch.ones_like(kinds),
    )[0]
    return found[:, 0]


def without_categories(ids: torch.Tensor, policy: VLM) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Replace the ids of each category's embeddings by one padding token; also return the categories.

    A category is -1 if its ids are incomplete or out of order.
    """
    if policy.extra_embeddings is None:
        return ids, ()
    first, width = policy.extra_embeddings.first, policy.extra_embeddings.width
    kept, categories, place = [], [], 0
    while place < len(ids):
        number = int(ids[place]) - first
        if number < 0:
            kept.append(int(ids[place]))
            place += 1
            continue
        whole = torch.equal(ids[place : place + width], torch.arange(width) + ids[place]) and number % width == 0
        categories.append(number // width if whole else -1)
        kept.append(policy.pad)
        place += width
    return torch.tensor(kept), tuple(categories)


@contextmanager
def stock_attention(policy: VLM, kind: str = "sdpa") -> Iterator[None]:
    """Use the attention and masks of transformers in the language model for a while."""
    text = without_adapters(policy.model).config.get_text_config()
    text._attn_implementation = kind
    try:
        yield
    finally:
        text._attn_implementation = attention.NAME


@torch.no_grad()
def stock_logps(policy: VLM, prompt: EncodedPrompt, reply: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probabilities of a reply by the stock forward of the whole sequence. Shape: [R] -> [R]."""
    model, device = without_adapters(policy.model), policy.device
    row = torch.cat([prompt.ids, reply])[None].to(device)
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    image = (row == model.config.image_token_id).long()
    # Qwen2-VL and Gemma 3 have different names for this mask
    inputs["mm_token_type_ids" if prompt.grid is not None else "token_type_ids"] = image
    assert prompt.pixel_values is not None
    inputs |= policy.family.pixel_inputs([prompt.pixel_values], [] if prompt.grid is None else [prompt.grid])
    inputs = {name: value.to(device) for name, value in inputs.items()}
    was_training = model.training
    # the position before each token of the reply predicts it; the last position predicts nothing here
    logits = model.eval()(**inputs, logits_to_keep=len(reply) + 1).logits[0, :-1]
    model.train(was_training)
    banned = torch.tensor(sorted(policy.banned), device=device)
    return token_logps(logits, banned, temperature).gather(-1, reply.to(device)[:, None])[:, 0].cpu()
