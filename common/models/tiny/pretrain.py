"""Pre-train the tiny model from scratch, in some minutes on one core: captions first, then instructions.

Stage 1 trains the vision tower on captions ("<image> -> three"; short rows, so many images per second). Stage 2 trains
the papers' prompt formats in many wordings, half with thinking and half without. AdamW, learning rate warm-up, plateau,
then linear decay over the last 40 % of the steps (a cosine over all steps ended at a higher loss).

Shapes: B rows, L tokens of the longest row, D width.
"""

from __future__ import annotations

import random
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from common.models.families import Qwen2VL
from common.models.tiny import wordings
from common.models.tiny.pictures import Pictures
from common.models.tiny.qwen2_vl import IMAGE_SIZE, MERGE, PATCH
from common.runtime.progress import progress

CAPTION_STEPS, CAPTION_BATCH = 600, 64
INSTRUCTION_STEPS, INSTRUCTION_BATCH = 1400, 32
LEARNING_RATE, WARMUP_STEPS, DECAY_SHARE = 2e-3, 50, 0.4
SLOPPY = 0.3  # share of replies that ignore the requested format
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def pretrain(model: Any, tokenizer: Any, seed: int = 0) -> Any:
    """Train `model` in place on rendered digits and garments and return it in evaluation mode."""
    images = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    draw = Pictures(IMAGE_SIZE, images)
    _batch_vision_attention(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    total = CAPTION_STEPS + INSTRUCTION_STEPS
    model.train()
    for step in progress(range(total), "pre-training the tiny model", total):
        # warm-up, plateau, linear decay to 2 %: whichever is lowest
        rate = min(1.0, (step + 1) / WARMUP_STEPS, 0.02 + (total - step) / (DECAY_SHARE * total))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        # a new batch: images are drawn anew in every step
        captions = step < CAPTION_STEPS
        rows = CAPTION_BATCH if captions else INSTRUCTION_BATCH
        labels = torch.randint(len(wordings.CLASSES), (rows,), generator=images)
        pixels = draw(labels)
        names = [wordings.CLASSES[label] for label in labels]
        pairs = [("", name) for name in names] if captions else _instructions(names, rng)
        loss = _reply_loss(model, tokenizer, pairs, patches(pixels))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def _instructions(names: list[str], rng: random.Random) -> list[tuple[str, str]]:
    think = rng.random() < 0.5  # one kind per batch: rows of similar length
    return [(wordings.question(n, think, rng), wordings.reply(n, think, SLOPPY, rng)) for n in names]


def _reply_loss(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the reply tokens. Rows are right-padded, so causal attention needs no mask."""
    # token ids, with the chat template written out
    side = IMAGE_SIZE // (PATCH * MERGE)  # image tokens per side
    image = "<|vision_start|>" + "<|image_pad|>" * side**2 + "<|vision_end|>"
    head = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{image}"
    prompts = tokenizer([f"{head}{text}<|im_end|>\n<|im_start|>assistant\n" for text, _ in pairs])["input_ids"]
    replies = tokenizer([f"{reply}<|im_end|>" for _, reply in pairs])["input_ids"]
    rows = [torch.tensor(prompt + reply) for prompt, reply in zip(prompts, replies, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)  # [B, L]
    target = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        target[row, len(prompt) : len(prompt) + len(reply)] = True
    grid = torch.tensor([[1, MERGE * side, MERGE * side]])
    # the image starts at the same token in every row, so the positions of the longest row serve all rows
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    positions = Qwen2VL.positions(rows[longest], grid, model.config)[:, None].expand(3, len(rows), -1)
    hidden = model.model(
        input_ids=ids,
        pixel_values=pixel_values,
        image_grid_thw=grid.expand(len(rows), 3),
        position_ids=positions,
        attention_mask={"full_attention": None},
        use_cache=False,
    ).last_hidden_state  # [B, L, D]
    predictor = torch.roll(target, -1, dims=1)  # the position before each reply token
    return F.cross_entropy(model.lm_head(hidden[predictor]), ids[target])


def patches(pixels: torch.Tensor) -> torch.Tensor:
    """Return flattened patches as `Qwen2VLImageProcessor` makes them, from images [B, 1, S, S] in [0, 1].

    Shape: [B * (S / patch)^2, 3 * 2 * patch^2].
    """
    mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    x = (pixels.expand(-1, 3, -1, -1) - mean) / std
    grid = IMAGE_SIZE // PATCH
    # order of patches: blocks of MERGE x MERGE neighbours that become one token; in a patch: channel, y, x
    x = x.reshape(len(x), 3, grid // MERGE, MERGE, PATCH, grid // MERGE, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(*x.shape[:6], 2, PATCH, PATCH)  # a still image is two equal frames
    return x.reshape(len(x) * grid * grid, -1)


def _batch_vision_attention(model: Any) -> None:
    """Replace the vision tower's loop over images by one batched attention call; all images have one size here."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    def forward(
        self: Any, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, position_embeddings: Any = None, **unused: Any
    ) -> torch.Tensor:
        tokens, images = len(hidden_states), len(cu_seqlens) - 1
        q, k, v = self.qkv(hidden_states).reshape(tokens, 3, self.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (x.reshape(images, tokens // images, self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(tokens, -1))

    for block in model.model.visual.blocks:
        block.attn.forward = MethodType(forward, block.attn)
