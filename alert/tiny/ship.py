"""Build the three tiny models and put them into the repository: `make models`, after a recipe has changed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from alert.tiny import recipe as gemma3
from common.few_shot.encoders import tiny as clip
from common.models.tiny import recipe as qwen2_vl
from common.models.tiny.model_cache import build_once


def main() -> None:
    """Remove models of other code versions, and build and add the missing ones of this version."""
    for recipe in (qwen2_vl, gemma3, clip):
        with tempfile.TemporaryDirectory() as nowhere:
            built = build_once(recipe.cached_folder(Path(nowhere)), recipe._save)
            for old in recipe.SHIPPED.glob("*"):
                if old.name != built.name:
                    shutil.rmtree(old)
            if built.parent != recipe.SHIPPED:
                shutil.copytree(built, recipe.SHIPPED / built.name)
        print(recipe.SHIPPED / built.name)


if __name__ == "__main__":
    main()
