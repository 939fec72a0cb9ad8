"""Untrained tiny model in the Qwen3-VL architecture, for tests: tokenizer of the tiny Qwen2-VL, 32x32 images.

Two of the three layers of its vision tower feed DeepStack, behind the first two of three layers of the language model.
"""

from __future__ import annotations

from typing import Any

from common.models.meter import PromptMeter
from common.models.tiny import qwen2_vl
from common.models.tiny.qwen2_5_vl import special_ids
from common.models.tiny.qwen2_vl import IMAGE_SIZE, MERGE, PATCH

# same layout as Qwen3-VL's template: no default system prompt, image before text
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest that vLLM's attention on CPUs supports
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": TEXT["hidden_size"],
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "num_position_embeddings": 64,  # 8 x 8, resampled to the grid of an image
    "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.04,
}


def build_processor() -> Any:
    """Return the `Qwen3VLProcessor` of the tiny model: 32x32 images, four tokens each."""
    from transformers import Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    size = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2}  # despite the names, numbers of pixels
    patches = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    values: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=size, **patches, **values),
        video_processor=Qwen3VLVideoProcessor(size=size, **patches, **values),
        tokenizer=qwen2_vl.build_processor().tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any, seed: int) -> Any:
    """Return an untrained `Qwen3VLForConditionalGeneration` (fp32)."""
    import torch
    from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text, whole = special_ids(tokenizer)
    torch.manual_seed(seed)
    config = Qwen3VLConfig(text_config={**TEXT, **text}, vision_config=VISION, tie_word_embeddings=True, **whole)
    model = Qwen3VLForConditionalGeneration(config)
    ends = {"eos_token_id": text["eos_token_id"], "pad_token_id": text["pad_token_id"]}
    model.generation_config = GenerationConfig(do_sample=True, top_k=20, top_p=0.8, temperature=0.7, **ends)
    return model


def meter() -> PromptMeter:
    """Return the prompt meter of this model, without building the model."""
    return PromptMeter("qwen3_vl", {"vision_config": VISION}, qwen2_vl.train_tokenizer(), CHAT_TEMPLATE)
