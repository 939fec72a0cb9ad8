"""Train and load `clip=tiny`: a CLIP of 0.4 M parameters, trained on rendered digits and garments.

It stands in for a real CLIP where there is no network: open_clip's architecture, a vision transformer on images of
32 x 32 pixels, a text tower with its own tokenizer. It has never seen a photograph. Like a real one it knows pictures
better than names: few of its pictures have captions, from all of them it learns to recognise a picture in another view
(SLIP, Mu et al. 2022, arXiv 2112.12750).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.few_shot.encoders.clip import OpenClip, parameters_hash
from common.few_shot.encoders.encoder import CLIP_MEAN, CLIP_STD, Preprocessing
from common.few_shot.heads.base import SCALE
from common.models.tiny import garments, pictures
from common.models.tiny.model_cache import build_once, place
from common.models.tiny.recipe import PICTURES
from common.models.tiny.wordings import CLASSES, DIGITS, GARMENTS, KINDS
from common.runtime.progress import progress
from common.types import UserError

SOURCES = (Path(__file__), *(Path(pictures.__file__).with_name(f"{name}.py") for name in (*PICTURES, "wordings")))
SHIPPED = Path(__file__).parent / "weights"
CONTEXT, SIZE, PATCH, EMBEDDING = 77, 32, 8, 128
START, END = 512, 513  # after 256 byte tokens and 256 tokens of a byte that ends a word
PIECES = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")
VISION = {"image_size": SIZE, "patch_size": PATCH, "width": 96, "layers": 3, "head_width": 32, "mlp_ratio": 2.0}
TEXT = {"context_length": CONTEXT, "vocab_size": END + 1, "width": 64, "heads": 2, "layers": 2}
STEPS, RATE, WARM_UP = 1000, 2e-3, 40
CAPTIONED, PLAIN, NAMELESS = 32, 96, 64  # pictures in a step: with captions, of the same classes without, of no class
KNOWN = 4  # drawings of each class that have captions; with all of them names would tell more than a photograph does
VIEWS, TEMPERATURE = 4.0, 0.1  # weight and temperature of the loss over views
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
    return open_clip.CLIP(EMBEDDING, open_clip.CLIPVisionCfg(**VISION), open_clip.CLIPTextCfg(**TEXT))


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


def train(seed: int = 1) -> Any:
    """Train the model by two losses: CLIP's own over pictures with captions, and SLIP's over two views of all pictures.

    Every step draws one wording per class. A caption is right for all pictures of its class in the batch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, generator = make(), torch.Generator().manual_seed(seed)
        model.logit_scale.requires_grad_(False)
        head = nn.Sequential(nn.Linear(EMBEDDING, 256), nn.GELU(), nn.Linear(256, EMBEDDING))
        draw = Drawings(generator)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (CLIP_MEAN, CLIP_STD))
        weights = [*model.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
        model.train()
        for step in progress(range(STEPS), "training the tiny CLIP", STEPS):
            # Learning rate: linear warm-up, constant, then linear decay over about the last 40 % of the steps, to 2 %.
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP, 0.02 + (STEPS - step) / (0.4 * STEPS))
            # The scale grows from CLIP's initial value to its final one, SCALE, which the few-shot learners assume.
            grown = FIRST_SCALE * (SCALE / FIRST_SCALE) ** min(1.0, step / (GROWTH * STEPS))
            model.logit_scale.fill_(math.log(grown))
            labels, pixels = draw()
            both = torch.cat([pixels, moved(pixels, generator)]).expand(-1, 3, -1, -1)
            features = model.encode_image((both - mean) / std)
            images = F.normalize(features[:CAPTIONED], dim=1)
            captions = F.normalize(model.encode_text(tokenize(captions_of_all(generator))), dim=1)
            named = caption_loss(model.logit_scale.exp() * images @ captions.T, labels)
            loss = named + VIEWS * view_loss(*F.normalize(head(features), dim=1).chunk(2))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return model.eval()


def caption_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return CLIP's loss, images over captions plus captions over images, when several images share a caption.

    Shapes: logits [B, captions], labels [B].

    >>> round(caption_loss(torch.zeros(3, 2), torch.tensor([0, 0, 1])).item() / (math.log(2) + math.log(3)), 6)
    1.0
    """
    # Text-to-image direction: several images of a batch share a class, so the target of a caption is uniform over them.
    # A class without an image in the batch has no target.
    right = F.one_hot(labels, logits.shape[1]).float()
    shares = right / right.sum(0).clamp(min=1)
    over_images = -(shares * logits.log_softmax(0)).sum() / (right.sum(0) > 0).sum()
    return F.cross_entropy(logits, labels) + over_images


def view_loss(first: Tensor, second: Tensor) -> Tensor:
    """Return SimCLR's loss (NT-Xent, Chen et al. 2020, equation 1): which of all other views shows the same picture?

    Shapes: first, second [N, D], normalised, row by row two views of one picture.

    >>> apart = torch.eye(2)
    >>> right = math.exp(1 / TEMPERATURE)
    >>> round(view_loss(apart, apart).item(), 6) == round(-math.log(right / (right + 2)), 6)
    True
    """
    views = torch.cat([first, second])
    logits = views @ views.T / TEMPERATURE
    logits.fill_diagonal_(-math.inf)  # a view is not compared with itself
    return F.cross_entropy(logits, torch.arange(len(views)).roll(len(first)))


class Drawings:
    """Source of training pictures: digits and garments, a few of them with captions, and shapes that have no name."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        more = [garments.silhouette_bank(seed) for seed in range(4)]
        self.digits, self.garments = pictures.glyph_bank(), torch.cat(more, 1)  # [classes, variants, side, side]
        self.shapes = shape_bank()

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return the classes of the pictures with captions, which come first, and all pictures.

        Shapes: [CAPTIONED], [CAPTIONED + PLAIN + NAMELESS, 1, SIZE, SIZE], in [0, 1].
        """
        labels = self._random(len(CLASSES), CAPTIONED + PLAIN)
        pixels = torch.empty(len(labels), 1, SIZE, SIZE)
        banks = ((self.digits, pictures.render_glyphs, 0), (self.garments, garments.render_garments, len(DIGITS)))
        for bank, render, first in banks:
            chosen = ((labels >= first) & (labels < first + len(bank))).nonzero()[:, 0]
            variants = self._random(bank.shape[1], len(chosen))
            variants = torch.where(chosen < CAPTIONED, variants % KNOWN, variants)
            pixels[chosen] = self._render(render, bank[labels[chosen] - first, variants])
        shapes = self._render(garments.render_garments, self.shapes[self._random(len(self.shapes), NAMELESS)])
        return labels[:CAPTIONED], torch.cat([pixels, shapes])

    def _random(self, below: int, n: int) -> Tensor:
        return torch.randint(below, (n,), generator=self.generator)

    def _render(self, render: Callable[[Tensor, Tensor, int, torch.Generator], Tensor], drawings: Tensor) -> Tensor:
        """Render each of the drawings once; to `render` every one is a class with a single variant."""
        return render(drawings[:, None], torch.arange(len(drawings)), SIZE, self.generator)


def shape_bank(shapes: int = 2000, seed: int = 5) -> Tensor:
    """Draw shapes that are no garment, with random lines and holes. Shape: [shapes, 56, 56], in [0, 1]."""
    rng = random.Random(seed)
    return torch.stack([garments._variant(_shape, rng) for _ in range(shapes)])


def _shape(pencil: garments.Pencil) -> None:
    rng, between = pencil.rng, pencil.between
    if pencil.often(0.6):  # symmetric, as clothes are
        heights = sorted(between(0, 1) for _ in range(rng.randint(1, 5)))
        pencil.both([(between(0.03, 0.48), y) for y in (between(0, 0.3), *heights, between(0.7, 1))])
    else:  # flat below, as shoes and bags are
        base, tops = between(0.6, 0.95), [(x, between(0.05, 0.6)) for x in (0.02, 0.2, 0.4, 0.6, 0.8, 0.98)]
        pencil.area([*tops, (0.98, base + between(-0.05, 0.05)), (0.02, base)])
    for _ in range(rng.randint(0, 3)):
        brightness, kind = rng.choice((0, 0, *garments.DARK, 255)), rng.random()
        if kind < 0.35:
            pencil.both([(between(0, 0.3), between(0, 1)) for _ in range(3)], brightness)
        elif kind < 0.7:
            pencil.line([(between(0, 1), between(0, 1)) for _ in range(2)], between(0.01, 0.1), brightness)
        else:
            left, top = between(0, 0.8), between(0, 0.8)
            pencil.oval(left, top, left + between(0.05, 0.4), top + between(0.05, 0.4), brightness)


def moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return another view of each picture: turned, scaled, shifted, in other light, with noise. Shape: [N, 1, S, S]."""
    n = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    angle, scale, stretch = uniform(-12, 12) * math.pi / 180, uniform(0.8, 1.2), uniform(0.85, 1.18)
    across = torch.stack([angle.cos() / scale / stretch, -angle.sin() / scale, uniform(-0.15, 0.15)], 1)
    down = torch.stack([angle.sin() / scale, angle.cos() / scale, uniform(-0.15, 0.15)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(pixels.shape), align_corners=False)
    view = F.grid_sample(pixels, grid, align_corners=False).clamp(1e-4, 1)
    view = view ** uniform(0.6, 1.6).view(-1, 1, 1, 1) * uniform(0.6, 1.3).view(-1, 1, 1, 1)
    blurred = uniform(0, 1).view(-1, 1, 1, 1) < 0.3
    view = torch.where(blurred, F.avg_pool2d(view, 3, 1, 1), view)
    return (view + 0.04 * torch.randn(view.shape, generator=generator)).clamp(0, 1)


def captions_of_all(generator: torch.Generator) -> list[str]:
    """Return one caption per class, in random wordings."""
    wordings = torch.randint(len(TEMPLATES), (len(CLASSES),), generator=generator).tolist()
    nouns = {kind: NOUNS[kind][int(torch.randint(2, (1,), generator=generator))] for kind in KINDS}
    names = [(name, nouns[kind]) for kind in KINDS for name in kind]
    return [TEMPLATES[w].format(name, noun=noun) for w, (name, noun) in zip(wordings, names, strict=True)]
