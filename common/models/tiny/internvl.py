"""Untrained tiny model in the InternVL3.5 architecture, for tests: words of the tiny Qwen2-VL, four tokens an image."""

from __future__ import annotations

from functools import cache
from typing import Any

from common.models.meter import PromptMeter
from common.models.tiny import qwen2_vl
from common.models.tiny.qwen2_vl import IMAGE_SIZE, MERGE, PATCH

MARKS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
IMAGE_TOKENS = (IMAGE_SIZE // PATCH // MERGE) ** 2

# same layout as InternVL3.5's template: no default system prompt, a new line after an image
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest that vLLM's attention on CPUs supports
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_bias": True,
    "image_size": [IMAGE_SIZE, IMAGE_SIZE],
    "patch_size": [PATCH, PATCH],
    "layer_scale_init_value": 0.5,
    "initializer_range": 0.04,
}


@cache
def train_tokenizer() -> Any:
    """Return the words of the tiny Qwen2-VL and InternVL's own marks, as a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(qwen2_vl.train_tokenizer().to_str())
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS.values()])
    return tokenizer


def build_processor() -> Any:
    """Return the `InternVLProcessor` of the tiny model; like the published one it cuts large pictures into tiles."""
    from transformers import InternVLProcessor, InternVLVideoProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tokenizer = qwen2_vl.build_processor().tokenizer
    tokenizer.add_tokens([*MARKS.values()], special_tokens=True)
    tokenizer._set_model_specific_special_tokens(MARKS)
    size: dict[str, Any] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=size, crop_to_patches=True),
        video_processor=InternVLVideoProcessor(size=size),
        tokenizer=tokenizer,
        image_seq_length=IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any, seed: int) -> Any:
    """Return an untrained `InternVLForConditionalGeneration` (fp32)."""
    import torch
    from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration

    end, pad, image = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<IMG_CONTEXT>"])
    ids = {"eos_token_id": end, "pad_token_id": pad}
    torch.manual_seed(seed)
    config = InternVLConfig(
        text_config={**TEXT, "vocab_size": -(-len(tokenizer) // 64) * 64, **ids},  # rounded up
        vision_config=VISION,
        image_token_id=image,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    # transformers initialises these to zero, so that equal patches would be equal tokens
    embeddings = model.model.vision_tower.embeddings
    for parameter in (embeddings.cls_token, embeddings.position_embeddings):
        torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config = GenerationConfig(do_sample=True, top_k=20, **ids)
    return model


def meter() -> PromptMeter:
    """Return the prompt meter of this model, without building the model."""
    config = {"vision_config": VISION, "image_seq_length": IMAGE_TOKENS}
    return PromptMeter("internvl", config, train_tokenizer(), CHAT_TEMPLATE)
