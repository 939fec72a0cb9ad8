"""The embedded default model: a real Qwen2-VL, small enough to pre-train on a laptop in about a minute.

A recipe is a module with `build` and `meter`, and with `knows` if it was taught certain classes only. What this one
builds is an ordinary model folder (config, safetensors, tokenizer, processor, chat template) that
`AutoModelForImageTextToText` and `AutoProcessor` load. It is built once from a fixed seed and kept under a name that
holds a hash of the code, so a changed recipe builds anew.
"""

from __future__ import annotations

from pathlib import Path

from common.models.meter import PromptMeter
from common.models.tiny import qwen2_vl
from common.models.tiny.cached import build_once, syntax_hash
from common.models.tiny.wordings import DIGITS

SOURCES = tuple(Path(__file__).with_name(f"{name}.py") for name in ("qwen2_vl", "pretrain", "glyphs", "wordings"))
knows = frozenset(DIGITS)  # classes whose pictures it was pre-trained on


def meter() -> PromptMeter:
    """Measures prompts for this model without building it."""
    return qwen2_vl.meter()


def cached_folder(cache_dir: Path) -> Path:
    """Where this recipe's model lies once it is built."""
    return Path(cache_dir) / f"tiny_qwen2_vl-{syntax_hash(SOURCES)}"


def build(cache_dir: Path) -> Path:
    """Return the model folder; the first call trains the model."""
    return build_once(cached_folder(cache_dir), _save)


def _save(folder: Path) -> None:
    from common.models.tiny.pretrain import pretrain

    processor = qwen2_vl.build_processor()
    pretrain(qwen2_vl.build_model(processor.tokenizer, seed=0), processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
