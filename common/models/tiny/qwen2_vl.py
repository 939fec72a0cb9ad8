"""Untrained tiny model in the Qwen2-VL architecture: 0.5 M parameters, 32x32 images, its own tokenizer.

The head size is 32, the smallest that vLLM's attention on CPUs supports.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, cast

from common.models.meter import PromptMeter
from common.models.tiny import wordings

SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # one token each, so that a 0.5 M model can learn the format
VOCABULARY = 768  # rows of the embedding; the tokenizer may use fewer
IMAGE_SIZE, PATCH, MERGE = 32, 8, 2  # 16 patches, 4 image tokens

# same layout as Qwen2-VL's template: default system prompt, image before text
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ARCHITECTURE: dict[str, Any] = {
    "text": {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "use_sliding_window": False,
        "initializer_range": 0.04,
        # the three sections (time, height, width) add up to half the head size
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    },
    "vision": {
        "depth": 2,
        "embed_dim": 64,
        "num_heads": 2,
        "mlp_ratio": 2,
        "hidden_size": 96,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "initializer_range": 0.04,
    },
}


@cache
def train_tokenizer() -> Any:
    """Train a byte-level BPE tokenizer as in Qwen2 on the prompt texts: common words become one token.

    Returns a `tokenizers.Tokenizer`; needs neither torch nor transformers, so prompt lengths can be checked at once.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    # the pre-tokenization of Qwen2: contractions, words, single digits, punctuation, white space
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = wordings.corpus()
    for tag in TAGS:  # tags are added tokens, so the BPE need not learn their pieces
        text = [line.replace(tag, " ") for line in text]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TAGS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def build_processor() -> Any:
    """Return the `Qwen2VLProcessor` of the tiny model: 32x32 images, its own tokenizer and chat template."""
    from transformers import Qwen2Tokenizer, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    state = json.loads(train_tokenizer().to_str())
    tokenizer = Qwen2Tokenizer(
        vocab=state["model"]["vocab"],
        merges=cast(Any, [tuple(pair) for pair in state["model"]["merges"]]),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=2048,
    )
    tokenizer.add_tokens([plain_token(tag) for tag in TAGS])
    size = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2}  # despite the names, numbers of pixels
    patches = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=size, **patches),
        video_processor=Qwen2VLVideoProcessor(size=size, **patches),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def plain_token(text: str) -> Any:
    """Return an added token that is not special, so that decoding keeps it."""
    from tokenizers import AddedToken

    return AddedToken(text, special=False, normalized=False)


def build_model(tokenizer: Any, seed: int) -> Any:
    """Return an untrained `Qwen2VLForConditionalGeneration` (0.5 M parameters, fp32)."""
    import torch
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    eos, pad = token("<|im_end|>"), token("<|endoftext|>")
    rows = -(-len(tokenizer) // 64) * 64  # rounded up
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        text_config={
            **ARCHITECTURE["text"],
            "vocab_size": rows,
            "bos_token_id": pad,
            "eos_token_id": eos,
            "pad_token_id": pad,
        },
        vision_config=ARCHITECTURE["vision"],
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    # top_k=1 as in the published Qwen2-VL models: samplers must set temperature, top_k and top_p themselves
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=True, top_k=1)
    return model


def meter() -> PromptMeter:
    """Return the prompt meter of this model, without building the model."""
    return PromptMeter("qwen2_vl", {"vision_config": ARCHITECTURE["vision"]}, train_tokenizer(), CHAT_TEMPLATE)
