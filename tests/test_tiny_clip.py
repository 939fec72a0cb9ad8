"""The recipe of the tiny CLIP: its two losses against plain sums, and the pictures that it learns from."""

from __future__ import annotations

import math

import pytest
import torch

from common.few_shot.encoders import tiny
from common.few_shot.encoders.encoder import View, preprocess
from common.models.tiny import garments, pictures
from common.models.tiny.wordings import CLASSES


def test_the_loss_over_views_is_simclrs():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.nn.functional.normalize(torch.randn(3, 4, generator=generator), dim=1) for _ in range(2))
    views, losses = [*first, *second], []
    for i, view in enumerate(views):
        others = {j: math.exp(float(view @ other) / 0.1) for j, other in enumerate(views) if j != i}
        losses.append(-math.log(others[(i + 3) % 6] / sum(others.values())))
    assert tiny.view_loss(first, second).item() == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_the_loss_over_captions_gives_a_caption_to_all_images_of_its_class():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = [0, 2, 0, 0]  # no image of class 1
    rows = [
        -math.log(math.exp(row[c]) / sum(map(math.exp, row))) for row, c in zip(logits.tolist(), labels, strict=True)
    ]
    columns = []
    for c, column in enumerate(logits.T.tolist()):
        shares = [math.exp(value) / sum(map(math.exp, column)) for value in column]
        own = [-math.log(share) for share, label in zip(shares, labels, strict=True) if label == c]
        columns += [sum(own) / len(own)] if own else []
    expected = sum(rows) / 4 + sum(columns) / 2
    assert tiny.caption_loss(logits, torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-5)


def test_captions_belong_to_few_drawings(monkeypatch):
    """The first pictures of a batch are of the first drawings of their class, the others of any."""
    monkeypatch.setattr(tiny, "KNOWN", 1)
    rendered: list[torch.Tensor] = []

    def render(bank, labels, size, generator):
        rendered.extend(bank[labels, 0])
        return bank[labels][:, :, :size, :size]

    monkeypatch.setattr(pictures, "render_glyphs", render)
    monkeypatch.setattr(garments, "render_garments", render)
    monkeypatch.setattr(garments, "silhouette_bank", lambda seed, make=garments.silhouette_bank: make(0)[:, :4] + seed)
    monkeypatch.setattr(tiny, "shape_bank", lambda: torch.full((2, 56, 56), 9.0))
    draw = tiny.Drawings(torch.Generator().manual_seed(0))
    labels, pixels = draw()
    assert pixels.shape == (tiny.CAPTIONED + tiny.PLAIN + tiny.NAMELESS, 1, tiny.SIZE, tiny.SIZE)
    banks = (*draw.digits, *draw.garments)
    firsts = [bank[0, : tiny.SIZE, : tiny.SIZE] for bank in banks]
    assert len(banks) == len(CLASSES) and len(labels) == tiny.CAPTIONED
    for label, picture in zip(labels.tolist(), pixels, strict=False):
        assert torch.equal(picture[0], firsts[label])
    plain = pixels[tiny.CAPTIONED : -tiny.NAMELESS, 0]
    assert sum(any(torch.equal(picture, first) for first in firsts) for picture in plain) < len(plain) / 2
    assert bool((pixels[-tiny.NAMELESS :] == 9).all()) and len(rendered) == len(pixels)


def test_another_view_shows_the_same_picture():
    generator = torch.Generator().manual_seed(0)
    drawn = pictures.Pictures(tiny.SIZE, generator)(torch.arange(len(CLASSES)))
    views = [tiny.moved(drawn, generator).flatten(1) for _ in range(20)]
    assert views[0].shape == (len(CLASSES), tiny.SIZE**2) and not torch.equal(views[0], views[1])
    assert all(float(view.min()) >= 0 and float(view.max()) <= 1 for view in views)
    mean = torch.stack(views).mean(0)  # blurred by the movement, but nearest to its own picture
    likeness = torch.nn.functional.normalize(mean, dim=1) @ torch.nn.functional.normalize(drawn.flatten(1), dim=1).T
    assert (likeness.argmax(1) == torch.arange(len(CLASSES))).float().mean() > 0.7
    assert torch.equal(tiny.shape_bank(5), tiny.shape_bank(5))


@pytest.mark.slow
def test_the_tiny_clip_reads_digits_that_it_has_never_seen(digits_task):
    from common.few_shot.heads.base import cosine_logits
    from common.few_shot.heads.zero_shot import text_weights
    from tests.conftest import CACHE

    encoder = tiny.load("clip", torch.device("cpu"), CACHE, torch.float32)
    asked = digits_task.evaluation["test"]
    items = asked.items[::4]
    pixels = torch.stack([preprocess(digits_task.images.open(i.image), i.image, View(), encoder.look) for i in items])
    text = text_weights([encoder.texts([f"a photo of a {name}."]) for name in asked.names])
    right = cosine_logits(encoder.images(pixels), text).argmax(1) == torch.tensor([i.label for i in items])
    assert right.float().mean() > 0.4
