"""Random weights in a published architecture and in the hub's own format: old names of weights, shards, bf16, a tied
output projection that is absent, and the configuration files as their authors wrote them.

    python -m benchmarks.rehearse.checkpoint qwen2_vl_2b /tmp/qwen --layers 2 --vision-layers 1

The final norm is raised so that logits spread as in a trained model; with flat logits no fault would show in a
log-probability. The tokenizer is the real one where its files are given. Else it is the tiny model's, which knows the
words of our prompts, with the special tokens at their published ids.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SHARD = 2_000_000_000  # bytes of a file, at most; one larger weight gets a file of its own
SPREAD = 0.02  # standard deviation of random weights, both authors' initializer_range


@dataclass(frozen=True)
class Published:
    """What the hub has of a model beside its weights.

    config, generation, preprocessor, others: JSON files, the last by name. special: ids of the tokenizer that the
    configuration names. renames: from the names of weights in memory to those on the hub, as regular expressions.
    last_norm: see the module. tokenizer: fields of tokenizer_config.json. template: the chat template; None: that of
    the given tokenizer.
    """

    config: dict[str, Any]
    generation: dict[str, Any]
    preprocessor: dict[str, Any]
    others: dict[str, Any]
    special: dict[int, str]
    renames: tuple[tuple[str, str], ...]
    last_norm: float
    tokenizer: dict[str, Any]

    @property
    def gemma(self) -> bool:
        """Whether norms multiply by one plus their weight, and the given tokenizer brings the hub's own template."""
        return bool(self.config["model_type"] == "gemma3")


QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
HALF = [0.5, 0.5, 0.5]
PUBLISHED = {
    "qwen2_vl_2b": Published(
        config={
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "vision_token_id": 151654,
            "image_token_id": 151655,
            "video_token_id": 151656,
            "hidden_act": "silu",
            "hidden_size": 1536,
            "initializer_range": SPREAD,
            "intermediate_size": 8960,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "model_type": "qwen2_vl",
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.41.2",
            "use_cache": True,
            "use_sliding_window": False,
            "vision_config": {
                "depth": 32,
                "embed_dim": 1280,
                "mlp_ratio": 4,
                "num_heads": 16,
                "in_chans": 3,
                "hidden_size": 1536,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "temporal_patch_size": 2,
            },
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vocab_size": 151936,
        },
        generation={
            "bos_token_id": 151643,
            "pad_token_id": 151643,
            "do_sample": True,
            "eos_token_id": [151645, 151643],
            "repetition_penalty": 1.0,
            "temperature": 0.01,
            "top_p": 0.001,
            "top_k": 1,
            "transformers_version": "4.37.0",
        },
        preprocessor={
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        },
        others={},
        special={
            151643: "<|endoftext|>",
            151644: "<|im_start|>",
            151645: "<|im_end|>",
            151652: "<|vision_start|>",
            151653: "<|vision_end|>",
            151654: "<|vision_pad|>",
            151655: "<|image_pad|>",
            151656: "<|video_pad|>",
        },
        renames=((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
        last_norm=7.0,
        tokenizer={
            "chat_template": QWEN_TEMPLATE,
            "padding_side": "left",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": 32768,
            "errors": "replace",
            "unk_token": None,
        },
    ),
    "gemma3_4b": Published(
        config={
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "eos_token_id": [1, 106],
            "image_token_index": 262144,
            "initializer_range": SPREAD,
            "mm_tokens_per_image": 256,
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "vision_config": {
                "hidden_size": 1152,
                "image_size": 896,
                "intermediate_size": 4304,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        generation={
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "do_sample": True,
            "eos_token_id": [1, 106],
            "pad_token_id": 0,
            "top_k": 64,
            "top_p": 0.95,
            "transformers_version": "4.50.0.dev0",
        },
        preprocessor={
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": HALF,
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": 256,
            "image_std": HALF,
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": 896, "width": 896},
        },
        others={
            "processor_config.json": {"image_seq_length": 256, "processor_class": "Gemma3Processor"},
            "added_tokens.json": {"<image_soft_token>": 262144},
        },
        special={
            0: "<pad>",
            1: "<eos>",
            2: "<bos>",
            3: "<unk>",
            105: "<start_of_turn>",
            106: "<end_of_turn>",
            255999: "<start_of_image>",
            256000: "<end_of_image>",
            262144: "<image_soft_token>",
        },
        renames=(
            (r"^model\.language_model\.", "language_model.model."),
            (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
            (r"^model\.multi_modal_projector", "multi_modal_projector"),
        ),
        last_norm=5.0,
        tokenizer={
            "chat_template": GEMMA_TEMPLATE,
            "tokenizer_class": "GemmaTokenizer",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
            "add_bos_token": True,
            "add_eos_token": False,
            "extra_special_tokens": {
                "image_token": "<image_soft_token>",
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
            },
        },
    ),
}


# Widths for tests in which only the vocabulary has to be real. Qwen2-VL's rotary sections need heads of 128.
NARROW: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text": {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
        "vision": {"embed_dim": 64, "num_heads": 2, "hidden_size": 256},
    },
    "gemma3": {
        "text": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
        },
        "vision": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
    },
}


def shrunk(
    config: dict[str, Any], layers: int | None, vision_layers: int | None, narrow: bool = False
) -> dict[str, Any]:
    """A published config.json with fewer layers; Gemma keeps layers of both kinds, from two layers on.

    `narrow`: and with widths that make no sense but for tests.
    """
    config = json.loads(json.dumps(config))
    text, vision = config.get("text_config", config), config["vision_config"]
    if narrow:
        text |= NARROW[config["model_type"]]["text"]
        vision |= NARROW[config["model_type"]]["vision"]
    if layers is not None:
        text["num_hidden_layers"] = layers
        if "text_config" in config and layers < 6:
            text["sliding_window_pattern"] = 2  # else no layer of the first five attends to everything
    if vision_layers is not None:
        vision["num_hidden_layers" if "num_hidden_layers" in vision else "depth"] = vision_layers
    return config


def write(
    model: str,
    folder: Path,
    layers: int | None = None,
    vision_layers: int | None = None,
    tokenizer: Path | None = None,
    seed: int = 0,
    narrow: bool = False,
) -> Path:
    """Write a whole checkpoint.

    Args:
        model: A key of PUBLISHED.
        folder: Where it is written; made if need be.
        layers: Of the language model; None: all.
        vision_layers: Of the vision tower; None: all.
        tokenizer: Folder with the real tokenizer.json (or tokenizer.json.gz) and tokenizer_config.json.
        seed: Of the weights.
        narrow: See `shrunk`.
    """
    published = PUBLISHED[model]
    folder.mkdir(parents=True, exist_ok=True)
    config = shrunk(published.config, layers, vision_layers, narrow)
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": published.generation,
        "preprocessor_config.json": published.preprocessor,
        **published.others,
        **tokenizer_files(published, tokenizer),
    }
    files["chat_template.json"] = {"chat_template": files["tokenizer_config.json"]["chat_template"]}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    write_weights(published, folder, seed)
    return folder


def tokenizer_files(published: Published, given: Path | None) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json, from a folder or made of the tiny model's."""
    if given is None:
        return {"tokenizer.json": stretched(published), "tokenizer_config.json": published.tokenizer}
    plain = given / "tokenizer.json"
    text = plain.read_text("utf-8") if plain.is_file() else gzip.decompress((given / "tokenizer.json.gz").read_bytes())
    tokens = json.loads(text)
    last = max(published.special)  # Qwen2.5's tokenizer has a few more than Qwen2-VL's
    tokens["added_tokens"] = [added for added in tokens["added_tokens"] if added["id"] <= last]
    settings = json.loads((given / "tokenizer_config.json").read_text("utf-8"))
    decoder = settings.get("added_tokens_decoder", {})
    settings["added_tokens_decoder"] = {number: each for number, each in decoder.items() if int(number) <= last}
    kept = published.tokenizer
    if "chat_template" in settings and published.gemma:
        kept = {key: value for key, value in kept.items() if key != "chat_template"}  # its own is the hub's
    return {"tokenizer.json": tokens, "tokenizer_config.json": settings | kept}


def stretched(published: Published) -> dict[str, Any]:
    """The tiny model's tokenizer with the special tokens at their published ids, and unused words between."""
    from common.models.tiny import gemma3, qwen2_vl

    tiny = gemma3.build_tokenizer().backend_tokenizer if published.gemma else qwen2_vl.train_tokenizer()
    tokens: dict[str, Any] = json.loads(tiny.to_str())
    special = set(published.special.values())
    words = iter(
        word for word, _ in sorted(tokens["model"]["vocab"].items(), key=lambda pair: pair[1]) if word not in special
    )
    size = max(published.special) + 1
    vocabulary = {}
    for number in range(size):
        name = published.special.get(number) or next(words, None) or f"<unused{number}>"
        vocabulary[name] = number
    if left := list(words):
        raise ValueError(f"{len(left)} words of the tiny tokenizer have no place below id {size}")
    tokens["model"]["vocab"] = vocabulary
    tokens["added_tokens"] = [
        {
            "id": number,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, name in published.special.items()
    ]
    tokens["post_processor"] = None
    return tokens


def write_weights(published: Published, folder: Path, seed: int) -> None:
    """Random weights as bf16 shards with an index, under the names that the hub's files have."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    shapes = {name: p.shape for name, p in empty.named_parameters() if "lm_head" not in name}
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, shape in shapes.items():
        count = 2 * shape.numel()
        if shards[-1] and size + count > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = shape, size + count
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        weights = {hub_name(published, name): drawn(published, name, shape, generator) for name, shape in shard.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(weights, file)
    total = 2 * sum(shape.numel() for shape in shapes.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def hub_name(published: Published, name: str) -> str:
    """The name that a weight has on the hub."""
    for pattern, replacement in published.renames:
        name = re.sub(pattern, replacement, name)
    return name


def drawn(published: Published, name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A weight in bf16: norms near the identity, biases of Qwen's attention and all matrices random."""
    norm = "norm" in name or "ln_q" in name
    if name == "model.language_model.norm.weight":
        value = torch.full(shape, published.last_norm)
    elif norm and not (published.gemma and "vision" not in name):
        value = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    elif norm or (published.gemma and name.endswith("bias")):
        value = torch.zeros(shape)  # Gemma's norms multiply by one plus their weight
    else:
        value = torch.empty(shape).normal_(0, SPREAD, generator=generator)
    return value.to(torch.bfloat16)


def main() -> None:
    """Write one from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(PUBLISHED))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vision-layers", type=int)
    parser.add_argument("--tokenizer", type=Path, help="folder of the real tokenizer")
    arguments = parser.parse_args()
    print(write(arguments.model, arguments.folder, arguments.layers, arguments.vision_layers, arguments.tokenizer))


if __name__ == "__main__":
    main()
