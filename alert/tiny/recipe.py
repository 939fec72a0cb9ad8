"""Recipe of the tiny Gemma 3 that runs ALERT on a laptop, like common/models/tiny/recipe.py.

The model of common/models/tiny/gemma3.py with a tokenizer of its own, pre-trained by alert/tiny/pretrain.py.
"""

from __future__ import annotations

from pathlib import Path

from alert.tiny.episodes import corpus
from common.models.meter import PromptMeter
from common.models.tiny import gemma3 as tiny_gemma3
from common.models.tiny.model_cache import build_once, place
from common.models.tiny.recipe import PICTURES
from common.models.tiny.wordings import CLASSES

HERE, MODELS = Path(__file__).parent, Path(tiny_gemma3.__file__).parent
SOURCES = (
    *(HERE / f"{name}.py" for name in ("episodes", "layout", "pretrain")),
    HERE.parent / "prompt.py",
    *(MODELS / f"{name}.py" for name in (*PICTURES, "qwen2_vl", "gemma3", "wordings")),
)
SHIPPED = HERE / "weights"
knows = frozenset(CLASSES)  # classes of its pre-training images


def meter() -> PromptMeter:
    """Return a meter that measures prompts for this model without building it."""
    measure = tiny_gemma3.meter(corpus)
    measure.config["text_config"] = tiny_gemma3.TEXT  # has the model's maximum length
    return measure


def cached_folder(cache_dir: Path) -> Path:
    """Return the folder of this recipe's model: in the repository, or in the cache once it is built."""
    return place("tiny_gemma3", SOURCES, SHIPPED, Path(cache_dir))


def build(cache_dir: Path) -> Path:
    """Return the model folder, pre-training the model first if this recipe was not built yet."""
    return build_once(cached_folder(cache_dir), _save)


def _save(folder: Path) -> None:
    from alert.tiny.pretrain import pretrain

    processor = tiny_gemma3.build_processor(corpus)
    pretrain(tiny_gemma3.build_model(processor.tokenizer, seed=0), processor).save_pretrained(folder)
    processor.save_pretrained(folder)
