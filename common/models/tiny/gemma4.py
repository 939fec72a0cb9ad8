"""Untrained tiny model in the Gemma 4 architecture, for tests: embeddings per layer, shared keys, capped logits, audio.

Words are those of the tiny Gemma 3. Cells of 4 pixels give a 32x32 image 64 tokens, the processor's smallest number.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from common.models.meter import PromptMeter
from common.models.tiny import gemma3, wordings
from common.models.tiny.gemma3 import BEGIN, PAD
from common.models.tiny.qwen2_vl import TAGS, plain_token

END = "<turn|>"
MARKS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
PATCH, POOL, BUDGET = 2, 2, 280  # the budget is transformers' default; images of 32 pixels need one of 70

# same layout as Gemma 4's template, without tools and thoughts
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)

TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest that vLLM's attention on CPUs supports
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,  # the third layer uses the first one's keys, the fourth the second one's
    "use_double_wide_mlp": True,
    "max_position_embeddings": 2048,
    "sliding_window": 64,  # shorter than most prompts, so that windows matter in tests
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "final_logit_softcapping": 6.0,  # small as the logits are, so that it matters in tests
    "initializer_range": 0.045,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "patch_size": PATCH,
    "pooling_kernel_size": POOL,
    "position_embedding_size": 128,
    "use_clipped_linears": True,
    "initializer_range": 0.04,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [4, 4],
    "output_proj_dims": 16,
}


@cache
def build_tokenizer() -> Any:
    """Return the `GemmaTokenizer` of the tiny model."""
    from transformers import GemmaTokenizer

    vocabulary, merges = gemma3.train_tokenizer_model(wordings.corpus)
    options: dict[str, Any] = {"vocab": vocabulary, "merges": merges, "extra_special_tokens": MARKS}
    tokenizer = GemmaTokenizer(**options, add_bos_token=True, model_max_length=2048)
    tokenizer.add_tokens(["<|turn>", END, "<|video|>"], special_tokens=True)
    tokenizer.add_tokens([plain_token(tag) for tag in TAGS])
    return tokenizer


def build_processor() -> Any:
    """Return the `Gemma4Processor` of the tiny model; like the published one it enlarges images to fill its budget."""
    from transformers import Gemma4AudioFeatureExtractor, Gemma4Processor, Gemma4VideoProcessor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    patches: dict[str, Any] = {"patch_size": PATCH, "pooling_kernel_size": POOL, "max_soft_tokens": BUDGET}
    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessorPil(**patches),
        video_processor=Gemma4VideoProcessor(**patches),
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
        image_seq_length=BUDGET,
    )


def build_model(tokenizer: Any, seed: int) -> Any:
    """Return an untrained `Gemma4ForConditionalGeneration` (fp32)."""
    import torch
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, GenerationConfig

    token = tokenizer.convert_tokens_to_ids
    rows = -(-len(tokenizer) // 64) * 64  # rounded up
    ends = [token("<eos>"), token(END)]
    ids = {"bos_token_id": token(BEGIN), "eos_token_id": ends[0], "pad_token_id": token(PAD)}
    torch.manual_seed(seed)
    config = Gemma4Config(
        text_config={**TEXT, "vocab_size": rows, "vocab_size_per_layer_input": rows, **ids},
        vision_config=VISION,
        audio_config=AUDIO,
        video_token_id=token("<|video|>"),
        eoa_token_index=token(MARKS["eoa_token"]),
        **{f"{name}_id": token(mark) for name, mark in MARKS.items() if name != "eoa_token"},
        tie_word_embeddings=True,
    )
    model = Gemma4ForConditionalGeneration(config)
    # transformers initialises all of these to one, so that equal patches would be equal tokens
    torch.nn.init.normal_(model.model.vision_tower.patch_embedder.position_embedding_table, std=0.2)
    # queries are normalised and their products not scaled: with weights of one nearly all attention goes to one token
    for layer in model.model.language_model.layers:
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, 0.25)
    # buffers that are saved with the weights: without values of their own nobody would miss them
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.9)
        elif "vision_tower" in name and name.endswith(("put_min", "put_max")):
            buffer.fill_(2.0 if name.endswith("max") else -2.0)
    model.generation_config = GenerationConfig(do_sample=True, top_k=64, top_p=0.95, **{**ids, "eos_token_id": ends})
    return model


def meter() -> PromptMeter:
    """Return the prompt meter of this model, without building the model."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(build_tokenizer()._tokenizer.to_str())
    return PromptMeter("gemma4", {"vision_config": VISION, "text_config": TEXT}, tokenizer, CHAT_TEMPLATE, BEGIN, PAD)
