"""Untrained tiny model in the Qwen2.5-VL architecture, for tests: tokenizer and template of the tiny Qwen2-VL.

Cells of 8 pixels give a 32x32 image 4x4 tokens, and windows 2x2 of them, so that the vision tower reorders its patches.
"""

from __future__ import annotations

from typing import Any

from common.models.meter import PromptMeter
from common.models.tiny import qwen2_vl
from common.models.tiny.qwen2_vl import CHAT_TEMPLATE, IMAGE_SIZE, MERGE

PATCH = 4
WINDOW = 16  # pixels: two cells

TEXT: dict[str, Any] = {**qwen2_vl.ARCHITECTURE["text"], "num_hidden_layers": 2, "initializer_range": 0.05}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": TEXT["hidden_size"],
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "window_size": WINDOW,
    "fullatt_block_indexes": [1],  # the first block attends within windows
    "initializer_range": 0.04,
}


def build_processor() -> Any:
    """Return the `Qwen2_5_VLProcessor` of the tiny model: 32x32 images, 16 tokens each."""
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    size = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2}  # despite the names, numbers of pixels
    patches = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=size, **patches),
        video_processor=Qwen2VLVideoProcessor(size=size, **patches),
        tokenizer=qwen2_vl.build_processor().tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def special_ids(tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ids that a text configuration of Qwen names, and those of the whole model."""
    token = tokenizer.convert_tokens_to_ids
    pad, eos = token("<|endoftext|>"), token("<|im_end|>")
    rows = -(-len(tokenizer) // 64) * 64  # rounded up
    text = {"vocab_size": rows, "bos_token_id": pad, "eos_token_id": eos, "pad_token_id": pad}
    whole = {f"{kind}_token_id": token(f"<|{kind}_pad|>") for kind in ("image", "video")}
    return text, whole | {f"vision_{end}_token_id": token(f"<|vision_{end}|>") for end in ("start", "end")}


def build_model(tokenizer: Any, seed: int) -> Any:
    """Return an untrained `Qwen2_5_VLForConditionalGeneration` (fp32)."""
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text, whole = special_ids(tokenizer)
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(text_config={**TEXT, **text}, vision_config=VISION, tie_word_embeddings=True, **whole)
    model = Qwen2_5_VLForConditionalGeneration(config)
    ends = {"eos_token_id": text["eos_token_id"], "pad_token_id": text["pad_token_id"]}
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, **ends)
    return model


def meter() -> PromptMeter:
    """Return the prompt meter of this model, without building the model."""
    return PromptMeter("qwen2_5_vl", {"vision_config": VISION}, qwen2_vl.train_tokenizer(), CHAT_TEMPLATE)
