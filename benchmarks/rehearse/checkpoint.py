"""Write random weights of a published architecture in the format of the hub.

    python -m benchmarks.rehearse.checkpoint qwen2_vl_2b /tmp/qwen --layers 2 --vision-layers 1

As on the hub: old names of weights, shards, bf16, no entry for a tied output projection, and the authors' own
configuration files (hub/). The final norm is scaled so that logits spread as in a trained model: errors would not show
in log-probabilities that are all equal, or where one token has all the probability. The tokenizer is the real one if
its files are given, else that of the tiny model with the special tokens at their published ids.
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

HUB = Path(__file__).parent / "hub"  # from the hub, except for special_ids.json and narrow.json (see `shrunk`)
COPIED = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "added_tokens.json")
SHARD = 2_000_000_000  # largest size of a file in bytes; a larger weight gets its own file
SPREAD = 0.02  # standard deviation of random weights: initializer_range of both models


@dataclass(frozen=True)
class Published:
    """Files of a published model, without its weights, and parameters of random weights.

    folder: its JSON files. renames: regular expressions from names of weights in memory to those on the hub. embedding:
    standard deviation of the vocabulary's rows. Gemma multiplies them by the square root of the width, so with SPREAD a
    few layers would hardly change them, and every token would predict itself. last_norm: weight of the final norm, see
    the module docstring.
    """

    folder: Path
    renames: tuple[tuple[str, str], ...]
    embedding: float
    last_norm: float

    def read(self, name: str) -> dict[str, Any]:
        """Read one of its JSON files."""
        content: dict[str, Any] = json.loads((self.folder / name).read_text("utf-8"))
        return content

    @property
    def gemma(self) -> bool:
        """Return whether it is a Gemma: norms multiply by 1 + weight, and the real tokenizer has the chat template."""
        return bool(self.read("config.json")["model_type"] == "gemma3")

    @property
    def special(self) -> dict[int, str]:
        """Return the special tokens by their ids."""
        return {int(number): name for number, name in self.read("special_ids.json").items()}


PUBLISHED = {
    "qwen2_vl_2b": Published(
        HUB / "qwen2_vl_2b",
        ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
        SPREAD,
        last_norm=7.0,
    ),
    "gemma3_4b": Published(
        HUB / "gemma3_4b",
        (
            (r"^model\.language_model\.", "language_model.model."),
            (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
            (r"^model\.multi_modal_projector", "multi_modal_projector"),
        ),
        SPREAD / 50,
        last_norm=270.0,
    ),
}


def shrunk(published: Published, layers: int | None, vision_layers: int | None, narrow: bool = False) -> dict[str, Any]:
    """Return config.json with fewer layers; from two layers on, Gemma keeps both kinds of attention.

    `narrow`: also with small widths, for tests that need only the vocabulary at its real size.
    """
    config = published.read("config.json")
    text, vision = config.get("text_config", config), config["vision_config"]
    if narrow:
        text |= published.read("narrow.json")["text"]
        vision |= published.read("narrow.json")["vision"]
    if layers is not None:
        text["num_hidden_layers"] = layers
        if "text_config" in config and layers < 6:
            text["sliding_window_pattern"] = 2  # otherwise the first five layers would all have sliding windows
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
    weights: bool = True,
) -> Path:
    """Write a complete model folder.

    Args:
        model: Key of PUBLISHED.
        folder: Folder to write, created if it is missing.
        layers: Number of layers of the language model; None: all.
        vision_layers: Number of layers of the vision tower; None: all.
        tokenizer: Folder with the real tokenizer.json (or tokenizer.json.gz) and tokenizer_config.json.
        seed: Seed of the weights.
        narrow: Use small widths, see `shrunk`.
        weights: Write weights and their index.
    """
    published = PUBLISHED[model]
    folder.mkdir(parents=True, exist_ok=True)
    tokens, settings = tokenizer_files(published, tokenizer)
    files = {name: published.read(name) for name in COPIED if (published.folder / name).is_file()} | {
        "config.json": shrunk(published, layers, vision_layers, narrow),
        "tokenizer.json": tokens,
        "tokenizer_config.json": settings,
        "chat_template.json": {"chat_template": settings["chat_template"]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    if weights:
        write_weights(published, folder, seed)
    return folder


def tokenizer_files(published: Published, given: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return tokenizer.json and tokenizer_config.json, from a folder or made from those of the tiny model."""
    template = {"chat_template": (published.folder / "chat_template.jinja").read_text("utf-8")}
    kept = published.read("tokenizer_config.json")
    if given is None:
        return stretched(published), kept | template
    plain = given / "tokenizer.json"
    text = plain.read_text("utf-8") if plain.is_file() else gzip.decompress((given / "tokenizer.json.gz").read_bytes())
    tokens = json.loads(text)
    last = max(published.special)  # a tokenizer of Qwen2.5 may be given, which has a few more
    tokens["added_tokens"] = [added for added in tokens["added_tokens"] if added["id"] <= last]
    settings = json.loads((given / "tokenizer_config.json").read_text("utf-8"))
    decoder = settings.get("added_tokens_decoder", {})
    settings["added_tokens_decoder"] = {number: each for number, each in decoder.items() if int(number) <= last}
    own = {"chat_template": settings["chat_template"]} if published.gemma and "chat_template" in settings else {}
    return tokens, settings | kept | template | own


def stretched(published: Published) -> dict[str, Any]:
    """Return the tiny model's tokenizer with special tokens at their published ids, filled up with unused words."""
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
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens["added_tokens"] = [
        {"id": number, "content": name, **plain, "special": True} for number, name in published.special.items()
    ]
    tokens["post_processor"] = None
    return tokens


def write_weights(published: Published, folder: Path, seed: int) -> None:
    """Write random weights as bf16 shards with an index, under their names on the hub."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    # shapes, without allocating memory
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    shapes = {name: p.shape for name, p in empty.named_parameters() if "lm_head" not in name}
    # shards of limited size, two bytes per number
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
    """Return the name of a weight on the hub."""
    for pattern, replacement in published.renames:
        name = re.sub(pattern, replacement, name)
    return name


def drawn(published: Published, name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return a weight in bf16: norms near the identity, biases of Qwen and all matrices random."""
    norm = "norm" in name or "ln_q" in name
    if name == "model.language_model.norm.weight":
        value = torch.full(shape, published.last_norm)
    elif norm and not (published.gemma and "vision" not in name):
        value = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    elif norm or (published.gemma and name.endswith("bias")):
        value = torch.zeros(shape)  # Gemma's norms multiply by 1 + weight
    else:
        spread = published.embedding if "embed_tokens" in name else SPREAD
        value = torch.empty(shape).normal_(0, spread, generator=generator)
    return value.to(torch.bfloat16)


def main() -> None:
    """Write a model folder from the command line."""
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
