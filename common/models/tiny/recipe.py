"""Recipe of the default model: a tiny Qwen2-VL that a laptop pre-trains in about a minute.

A recipe is a module with `build` and `meter`, and with `knows` if it was pre-trained on certain classes only. This one
builds an ordinary model folder (config, safetensors, tokenizer, processor, chat template) for
`AutoModelForImageTextToText` and `AutoProcessor`. The model is part of the repository, in a folder named by a hash of
this code; after a change of the code it is built once, in the cache. `make models` updates the repository.
"""

from __future__ import annotations

from pathlib import Path

from common.models.meter import PromptMeter
from common.models.tiny import qwen2_vl
from common.models.tiny.model_cache import build_once, place
from common.models.tiny.wordings import CLASSES

PICTURES = ("garments", "pictures")
SOURCES = tuple(Path(__file__).with_name(f"{name}.py") for name in (*PICTURES, "qwen2_vl", "pretrain", "wordings"))
SHIPPED = Path(__file__).parent / "weights"
knows = frozenset(CLASSES)  # classes whose pictures it was pre-trained on


def meter() -> PromptMeter:
    """Return the prompt meter of this model, without building the model."""
    measure = qwen2_vl.meter()
    measure.config["text_config"] = qwen2_vl.ARCHITECTURE["text"]  # has the context length
    return measure


def cached_folder(cache_dir: Path) -> Path:
    """Return the folder of this recipe's model, which may not be built yet."""
    return place("tiny_qwen2_vl", SOURCES, SHIPPED, Path(cache_dir))


def build(cache_dir: Path) -> Path:
    """Return the model folder; the first call trains the model unless the repository has it."""
    return build_once(cached_folder(cache_dir), _save)


def _save(folder: Path) -> None:
    from common.models.tiny.pretrain import pretrain

    processor = qwen2_vl.build_processor()
    pretrain(qwen2_vl.build_model(processor.tokenizer, seed=0), processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
