"""What a photo run says about stronger encoders: the words compose, and name models that the libraries have."""

from __future__ import annotations

import open_clip
import pytest
import timm

from common import preflight
from common.config.composition import validate

CLIPS, VISUALS = ("siglip2_b16", "pe_core_b16", "metaclip2_h14", "dfn_b16"), ("dinov3_b16", "dinov2_b14", "tipsv2_b14")


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_clip_presets_are_models_of_open_clip(compose, name):
    options = validate(compose("method=tip_adapter", f"clip={name}")).clip.options
    assert options["pretrained"] in open_clip.list_pretrained_tags_by_model(options["model"])


@pytest.mark.slow
@pytest.mark.parametrize("name", VISUALS)
def test_visual_presets_are_models_of_timm(compose, name):
    model = validate(compose("method=linear_probe", "clip=none", f"visual={name}")).visual.options["model"]
    assert timm.is_model(model) and timm.models.get_pretrained_cfg(model).hf_hub_id


def words_of(line):
    return [word for word in line.replace(",", " ").split() if "=" in word]


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [0, 1])
def test_every_command_that_is_named_composes(compose, monkeypatch, gpus):
    monkeypatch.setattr(preflight, "visible_gpus", lambda: gpus)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    photos = ("experiment=photos", "data.folder=birds")
    lines = preflight.stronger(validate(compose(*photos)))
    assert len(lines) == 1 + gpus
    (looks, *reads) = words_of(lines[0])
    assert validate(compose(*photos, looks)).visual.name == "dinov3_b16"
    config = validate(compose(*photos, *reads))
    assert config.clip.name == "siglip2_b16" and not preflight.stronger(config)
    if gpus:
        config = validate(compose(*words_of(lines[1])))
        assert config.method["name"] == "clsrl" and config.data.folder == "birds" and config.model.lora.wraps
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(preflight.stronger(validate(compose(*photos)))) == gpus
    assert preflight.stronger(validate(compose())) == []
