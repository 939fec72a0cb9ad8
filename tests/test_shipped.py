"""The tiny models in the repository, and the pictures that they were taught with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from alert.tiny import recipe as gemma3
from common.few_shot.encoders import tiny as clip
from common.models.tiny import garments, model_cache, pictures, wordings
from common.models.tiny import recipe as qwen2_vl
from tests.conftest import REPOSITORY


def test_the_repository_holds_the_models_of_its_code(tmp_path):
    """Otherwise `make models` is to be called."""
    for recipe in (qwen2_vl, gemma3, clip):
        folder = recipe.cached_folder(tmp_path)
        assert folder.parent == recipe.SHIPPED and [path.name for path in recipe.SHIPPED.iterdir()] == [folder.name]
        assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6


def test_a_changed_recipe_is_built_in_the_cache(tmp_path):
    (tmp_path / "code.py").write_text("a = 1\n")
    sources = [tmp_path / "code.py"]
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    first = model_cache.place("m", sources, shipped, cache)
    assert first.parent == cache
    (shipped / first.name).mkdir(parents=True)
    assert model_cache.place("m", sources, shipped, cache) == shipped / first.name
    (tmp_path / "code.py").write_text('"""What it is."""\n\nimport os  # moved\n\na = 1\n')
    assert model_cache.place("m", sources, shipped, cache) == shipped / first.name, "nothing that decides a weight"
    (tmp_path / "code.py").write_text("a = 2\n")
    assert model_cache.place("m", sources, shipped, cache).parent == cache


@pytest.mark.faults
def test_a_model_built_anew_reads_as_well(tmp_path):
    """Another processor rounds in its own way, and so has another model; it knows as much."""
    model_cache.build_once(tmp_path / "rebuilt", qwen2_vl._save)
    found = {}
    for name, path in (("shipped", qwen2_vl.cached_folder(tmp_path)), ("rebuilt", tmp_path / "rebuilt")):
        for data in ("digits", "fashion"):
            folder = tmp_path / name / data
            values = [f"data={data}", f"model.path={path}", f"hydra.run.dir={folder}", "label_scoring=false"]
            command = [sys.executable, "run.py", "method=zeroshot", "tracking=none", "tracking.report=false", *values]
            subprocess.run(command, cwd=REPOSITORY, check=True, timeout=300)
            found[name, data] = json.loads((folder / "metrics.json").read_text())["before"]["test"]["accuracy"]
    for data, least in (("digits", 0.45), ("fashion", 0.4)):
        assert found["shipped", data] >= least and found["rebuilt", data] >= found["shipped", data] - 0.1, found


def test_garments_are_those_of_the_dataset(compose):
    assert tuple(garments.SHAPES) == wordings.GARMENTS == tuple(compose("data=fashion").data.reader.names)


def test_pictures_are_of_their_labels():
    """Digits and garments in one batch are what they are alone, and fill their picture."""
    labels = torch.tensor([13, 2, 19, 7, 11])
    draw = pictures.Pictures(32, torch.Generator().manual_seed(0))
    drawn = draw(labels)
    generator = torch.Generator().manual_seed(0)
    digits = pictures.render_glyphs(pictures.glyph_bank(), torch.tensor([2, 7]), 32, generator)
    clothes = garments.render_garments(garments.silhouette_bank(), torch.tensor([3, 9, 1]), 32, generator)
    assert torch.equal(drawn[[1, 3]], digits) and torch.equal(drawn[[0, 2, 4]], clothes)
    assert drawn.shape == (5, 1, 32, 32) and drawn.min() >= 0 and drawn.max() <= 1
    assert all(0.05 < float(picture.mean()) < 0.95 for picture in drawn)


def test_every_garment_is_another():
    """The nearest mean drawing tells most drawings apart; chance is a tenth."""
    bank = garments.silhouette_bank()
    means, others = bank[:, ::2].mean(1).flatten(1), bank[:, 1::2].flatten(2)
    nearest = torch.cdist(others.flatten(0, 1), means).argmin(1)
    right = (nearest == torch.arange(10).repeat_interleave(others.shape[1])).float().mean()
    assert right > 0.6
    assert torch.equal(bank, garments.silhouette_bank()), "the same drawings every time"
