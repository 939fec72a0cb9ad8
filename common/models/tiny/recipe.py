"""The embedded default model: a real Qwen2-VL, small enough to pre-train on a laptop in about a minute.

A recipe is a module with `build` and `meter`, and with `knows` if it was taught certain classes only. What this one
builds is an ordinary model folder (config, safetensors, tokenizer, processor, chat template) that
`AutoModelForImageTextToText` and `AutoProcessor` load. The repository holds it under a name with a hash of this code;
a changed recipe builds anew, once, in the cache. `make models` puts what it builds into the repository.
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
    """Measures prompts for this model without building it."""
    measure = qwen2_vl.meter()
    measure.config["text_config"] = qwen2_vl.ARCHITECTURE["text"]  # how much it reads
    return measure


def cached_folder(cache_dir: Path) -> Path:
    """Where this recipe's model lies: in the repository, or once it is built."""
    return place("tiny_qwen2_vl", SOURCES, SHIPPED, Path(cache_dir))


def build(cache_dir: Path) -> Path:
    """Return the model folder; the first call trains the model."""
    return build_once(cached_folder(cache_dir), _save)


def _save(folder: Path) -> None:
    from common.models.tiny.pretrain import pretrain

    processor = qwen2_vl.build_processor()
    pretrain(qwen2_vl.build_model(processor.tokenizer, seed=0), processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
