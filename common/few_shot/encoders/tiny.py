"""Train and load `clip=tiny`: a CLIP of 0.2 M parameters, trained on rendered digits and garments.

It stands in for a real CLIP where there is no network: open_clip's architecture, a vision transformer on images of
32 x 32 pixels, a text tower with its own tokenizer. It has never seen a photograph.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.few_shot.encoders.clip import OpenClip, parameters_hash
from common.few_shot.encoders.encoder import CLIP_MEAN, CLIP_STD, Preprocessing
from common.few_shot.heads.base import SCALE
from common.models.tiny import pictures
from common.models.tiny.model_cache import build_once, place
from common.models.tiny.pictures import Pictures
from common.models.tiny.recipe import PICTURES
from common.models.tiny.wordings import CLASSES, DIGITS, GARMENTS, KINDS
from common.runtime.progress import progress
from common.types import UserError

SOURCES = (Path(__file__), *(Path(pictures.__file__).with_name(f"{name}.py") for name in (*PICTURES, "wordings")))
SHIPPED = Path(__file__).parent / "weights"
CONTEXT, SIZE, PATCH, WIDTH = 77, 32, 8, 64
START, END = 512, 513  # after 256 byte tokens and 256 tokens of a byte that ends a word
PIECES = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")
VISION = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": 2, "head_width": 32, "mlp_ratio": 2.0}
TEXT = {"context_length": CONTEXT, "vocab_size": END + 1, "width": WIDTH, "heads": 2, "layers": 2}
STEPS, BATCH, RATE, WARM_UP = 1000, 128, 2e-3, 40
FIRST_SCALE, GROWTH = 1 / 0.07, 0.7  # logit scale at the start, and the share of the steps over which it grows
TEMPLATES = (
    *("a photo of a {}.", "itap of a {}.", "a bad photo of the {}.", "a drawing of a {}.", "{}."),
    *("a photo of the large {}.", "a photo of the small {}.", "a photo of a {}, a type of {noun}."),
    *("a photo of the {noun} {}.", "the {noun} {}."),
)
NOUNS = {DIGITS: ("digit", "number"), GARMENTS: ("clothing", "garment")}


def encode(text: str) -> list[int]:
    """Encode lower-case words as bytes; the last byte of a word is another token, as in CLIP's own vocabulary.

    >>> encode("A one.") == [256 + ord("a"), ord("o"), ord("n"), 256 + ord("e"), 256 + ord(".")]
    True
    """
    ids: list[int] = []
    for word in PIECES.findall(text.lower()):
        *first, last = word.encode()
        ids += [*first, 256 + last]
    return ids


def tokenize(texts: Sequence[str]) -> Tensor:
    """Encode texts as start token, bytes, end token and zeros; a long text is truncated. Shape: [T, CONTEXT]."""
    table = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in zip(table, texts, strict=True):
        ids = [START, *encode(text)[: CONTEXT - 2], END]
        row[: len(ids)] = torch.tensor(ids)
    return table


def make() -> Any:
    """Build the model, not trained."""
    try:
        import open_clip
    except ImportError as error:
        raise UserError("clip=tiny needs open_clip: uv pip install 'open_clip_torch>=3.3,<3.4'") from error
    return open_clip.CLIP(WIDTH, open_clip.CLIPVisionCfg(**VISION), open_clip.CLIPTextCfg(**TEXT))


def load(key: str, device: torch.device, cache_dir: Path, dtype: torch.dtype) -> OpenClip:
    """Load the tiny CLIP; implements `Load`. It is trained first if neither repository nor cache holds it."""
    folder = build_once(cached_folder(cache_dir), _save)
    model = make()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model = model.to(device=device, dtype=dtype)
    look = Preprocessing(SIZE, CLIP_MEAN, CLIP_STD)
    return OpenClip(model, tokenize, look, f"tiny-{parameters_hash(model)[:16]}", str(folder))


def cached_folder(cache_dir: Path) -> Path:
    """Return the folder of the model: in the repository, or in the cache once it is built."""
    return place("tiny_clip", SOURCES, SHIPPED, Path(cache_dir).resolve())


def _save(folder: Path) -> None:
    save_file({name: value.contiguous() for name, value in train().state_dict().items()}, folder / "model.safetensors")


def train(seed: int = 0) -> Any:
    """Train the model with CLIP's loss, except that a caption is right for all images of its class in the batch.

    Every step draws one wording per class. Images are classified over captions, and captions over images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, generator = make(), torch.Generator().manual_seed(seed)
        model.logit_scale.requires_grad_(False)
        draw = Pictures(SIZE, generator)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (CLIP_MEAN, CLIP_STD))
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
        model.train()
        for step in progress(range(STEPS), "training the tiny CLIP", STEPS):
            # Learning rate: linear warm-up, constant, then linear decay over about the last 40 % of the steps, to 2 %.
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP, 0.02 + (STEPS - step) / (0.4 * STEPS))
            # The scale grows from CLIP's initial value to its final one, SCALE, which the few-shot learners assume.
            grown = FIRST_SCALE * (SCALE / FIRST_SCALE) ** min(1.0, step / (GROWTH * STEPS))
            model.logit_scale.fill_(math.log(grown))
            labels = torch.randint(len(CLASSES), (BATCH,), generator=generator)
            pixels = draw(labels).expand(-1, 3, -1, -1)
            texts = tokenize(captions_of_all(generator))
            images = F.normalize(model.encode_image((pixels - mean) / std), dim=1)
            captions = F.normalize(model.encode_text(texts), dim=1)
            logits = model.logit_scale.exp() * images @ captions.T  # [B, classes]
            # Text-to-image direction: several images of a batch share a class, so the target of a caption is uniform
            # over them.
            right = F.one_hot(labels, len(CLASSES)).float()
            of_texts = right / right.sum(0).clamp(min=1)
            loss = F.cross_entropy(logits, labels) - (of_texts * logits.log_softmax(0)).sum(0).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return model.eval()


def captions_of_all(generator: torch.Generator) -> list[str]:
    """Return one caption per class, in random wordings."""
    wordings = torch.randint(len(TEMPLATES), (len(CLASSES),), generator=generator).tolist()
    nouns = {kind: NOUNS[kind][int(torch.randint(2, (1,), generator=generator))] for kind in KINDS}
    names = [(name, nouns[kind]) for kind in KINDS for name in kind]
    return [TEMPLATES[w].format(name, noun=noun) for w, (name, noun) in zip(wordings, names, strict=True)]
