"""Untrained tiny model in the SmolVLM2 architecture, for tests: words of the tiny Qwen2-VL, four tokens an image."""

from __future__ import annotations

from functools import cache
from typing import Any

from common.models.families import SmolVLM
from common.models.meter import PromptMeter
from common.models.tiny import qwen2_vl
from common.models.tiny.qwen2_vl import IMAGE_SIZE, PATCH

BEGIN, END, PAD, IMAGE = "<|im_start|>", "<end_of_utterance>", "<|im_end|>", "<image>"
MARKS = (END, IMAGE, "<fake_token_around_image>", "<global-img>")
SCALE = 2  # cells of 2 x 2 patches

# same layout as SmolVLM2's template: a space before what is said, unless an image begins the turn
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}<image>{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
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
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "initializer_range": 0.04,
}


@cache
def train_tokenizer() -> Any:
    """Return the words of the tiny Qwen2-VL and SmolVLM2's own marks, as a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(qwen2_vl.train_tokenizer().to_str())
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return tokenizer


def build_processor() -> Any:
    """Return the `SmolVLMProcessor` of the tiny model; like the published one it cuts pictures into tiles."""
    from transformers import SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    SmolVLM.prepare()
    tokenizer = qwen2_vl.build_processor().tokenizer
    tokenizer.add_tokens([*MARKS], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = BEGIN, END, PAD
    tile: dict[str, Any] = {"longest_edge": IMAGE_SIZE}
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessorPil(size={"longest_edge": 4 * IMAGE_SIZE}, max_image_size=tile),
        video_processor=SmolVLMVideoProcessor(size=tile, max_image_size=tile),
        tokenizer=tokenizer,
        image_seq_len=(IMAGE_SIZE // PATCH // SCALE) ** 2,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any, seed: int) -> Any:
    """Return an untrained `SmolVLMForConditionalGeneration` (fp32)."""
    import torch
    from transformers import GenerationConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    begin, end, pad, image = tokenizer.convert_tokens_to_ids([BEGIN, END, PAD, IMAGE])
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
    torch.manual_seed(seed)
    config = SmolVLMConfig(
        text_config={**TEXT, "vocab_size": -(-len(tokenizer) // 64) * 64, **ids},  # rounded up
        vision_config=VISION,
        scale_factor=SCALE,
        image_token_id=image,
        pad_token_id=pad,
        tie_word_embeddings=True,
    )
    model = SmolVLMForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=True, top_k=20, **ids)
    return model


def meter() -> PromptMeter:
    """Return the prompt meter of this model, without building the model."""
    config = {"vision_config": VISION, "scale_factor": SCALE}
    return PromptMeter("smolvlm", config, train_tokenizer(), CHAT_TEMPLATE)
