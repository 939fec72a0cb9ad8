"""Small encoders for tests: in CLIP's architectures, with random weights."""

from __future__ import annotations

from common.few_shot.encoders import tiny
from common.few_shot.encoders.clip import OpenClip, parameters_hash
from common.few_shot.encoders.encoder import Preprocessing
from common.few_shot.heads.base import SCALE

RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}


def model(vision, seed=0):
    import open_clip
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = open_clip.CLIP(
            tiny.EMBEDDING, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**tiny.TEXT), quick_gelu=True
        )
    return made


def clip(vision=None, seed=0):
    vision = vision or tiny.VISION
    made = model(vision, seed)
    return OpenClip(
        made, tiny.tokenize, Preprocessing(vision["image_size"]), f"test-{parameters_hash(made)[:8]}", "a test"
    )


def load(key, device, cache_dir, dtype):
    """As `clip.load` names it."""
    assert SCALE == 100
    return clip()
