"""Untrained tiny model in the Gemma 3 architecture: SigLIP tower, sliding windows, bidirectional image blocks.

The tokenizer is like Gemma's (byte fallback, `▁` for a space), trained on the prompt texts of
common/models/tiny/wordings.py or on another corpus.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any, cast

from common.models.meter import PromptMeter
from common.models.tiny import wordings
from common.models.tiny.qwen2_vl import IMAGE_SIZE, PATCH, TAGS, plain_token

BEGIN, END, PAD = "<bos>", "<end_of_turn>", "<pad>"
CONTROL = (PAD, "<eos>", BEGIN, "<unk>", "<mask>")
IMAGE = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
VOCABULARY = 960
IMAGE_TOKENS = 4
Corpus = Callable[[], list[str]]  # returns the texts that the tokenizer is trained on

# same layout as Gemma 3's template: a system message becomes the beginning of the user's turn
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set before = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set before = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ before if loop.first else '' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest that vLLM's attention on CPUs supports
    "query_pre_attn_scalar": 32,
    "max_position_embeddings": 2048,
    "sliding_window": 64,  # shorter than most prompts, so that windows matter in tests
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "initializer_range": 0.04,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "vision_use_head": False,
}


@cache
def train_tokenizer_model(corpus: Corpus = wordings.corpus) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train a byte-fallback BPE on the prompt texts; return its vocabulary and merges."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    text = corpus()
    for tag in (*TAGS, "\n"):  # both become tokens below or in build_tokenizer, without the BPE
        text = [line.replace(tag, " ") for line in text]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 320, special_tokens=list(CONTROL), show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(state["vocab"])
    newlines = ["\n" * count for count in range(1, 5)]  # vLLM's Gemma 3 processor needs all four as tokens
    for piece in [*newlines, *(f"<0x{byte:02X}>" for byte in range(256))]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("\n", "\n"), ("\n\n", "\n\n"), ("\n\n", "\n"), *(tuple(pair) for pair in state["merges"])]
    return vocabulary, cast(Any, merges)


@cache
def build_tokenizer(corpus: Corpus = wordings.corpus) -> Any:
    """Return the `GemmaTokenizer` of the tiny model."""
    from transformers import GemmaTokenizer

    vocabulary, merges = train_tokenizer_model(corpus)
    tokenizer = GemmaTokenizer(
        vocab=cast(Any, vocabulary),
        merges=cast(Any, merges),
        add_bos_token=True,
        extra_special_tokens=cast(Any, IMAGE),
        model_max_length=2048,
    )
    tokenizer.add_tokens(["<start_of_turn>", END], special_tokens=True)
    tokenizer.add_tokens([plain_token(tag) for tag in TAGS])
    return tokenizer


def build_processor(corpus: Corpus = wordings.corpus) -> Any:
    """Return the `Gemma3Processor` of the tiny model: 32x32 images, four tokens each."""
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=build_tokenizer(corpus),
        chat_template=CHAT_TEMPLATE,
        image_seq_length=IMAGE_TOKENS,
    )


def build_model(tokenizer: Any, seed: int) -> Any:
    """Return an untrained `Gemma3ForConditionalGeneration` (0.5 M parameters, fp32)."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig

    token = tokenizer.convert_tokens_to_ids
    ends = [token("<eos>"), token(END)]
    torch.manual_seed(seed)
    options: dict[str, Any] = {"eos_token_id": ends}
    config = Gemma3Config(
        text_config={
            **TEXT,
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "bos_token_id": token(BEGIN),
            "eos_token_id": ends[0],
            "pad_token_id": token(PAD),
        },
        vision_config=VISION,
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=token(IMAGE["boi_token"]),
        eoi_token_index=token(IMAGE["eoi_token"]),
        image_token_index=token(IMAGE["image_token"]),
        **options,
    )
    model = Gemma3ForConditionalGeneration(config)
    # transformers initialises this projection to zero, so the image would have no effect before training
    torch.nn.init.normal_(
        model.model.multi_modal_projector.mm_input_projection_weight, std=VISION["hidden_size"] ** -0.5
    )
    model.generation_config = GenerationConfig(
        bos_token_id=token(BEGIN), eos_token_id=ends, pad_token_id=token(PAD), do_sample=True, top_k=64, top_p=0.95
    )
    return model


def meter(corpus: Corpus = wordings.corpus) -> PromptMeter:
    """Return the prompt meter of this model, without building the model."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(build_tokenizer(corpus)._tokenizer.to_str())
    return PromptMeter("gemma3", {"mm_tokens_per_image": IMAGE_TOKENS}, tokenizer, CHAT_TEMPLATE, BEGIN, PAD)
