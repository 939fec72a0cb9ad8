"""Initialise the category embeddings bank (section 3.2), and measure its drift and the similarity of categories.

Shapes: C categories, m tokens of an image, D width of the language model, P patches, V width of the vision tower.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from common.data.sampling import by_label
from common.models.vision import VisionTower
from common.runtime.distributed import gather, share_of
from common.types import Item, UserError

CHUNK = 64  # number of categories that ranks exchange at a time
STANDARD_DEVIATION = 0.02  # for `random`, our choice: the paper says "random values"


def see(
    vision: VisionTower, items: Sequence[Item], categories: int, how: str | None, seed: int, patches: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encode every few-shot image once, and return mean features and initial embeddings of the categories.

    Ranks share the categories.

    Args:
        vision: Tower and projector of the model.
        items: Few-shot images.
        categories: C.
        how: `proposed` (section 3.2: the mean of the tower's outputs, projected), `averaging` (appendix D.2, "combines
            embeddings after the image encoder layer and the multimodal projector layer"; our reading: the mean of the
            projected mean and the mean of the projections), `random` (normal) or `one_shot` (section 4.1.3: the
            features of one image drawn at random). None: the embeddings exist already, only the means are needed.
        seed: Seed of `random` and `one_shot`.
        patches: Mean features keep all patches, concatenated; False: their mean.

    Returns:
        Mean features of the categories, [C, V] or [C, P V], and the embeddings, [C, m, D]. fp32 on the CPU.

    Raises:
        UserError: A category has no image.
    """
    groups = by_label(items)
    if missing := sorted(set(range(categories)) - groups.keys()):
        raise UserError(f"category {missing[0]} has no training image to begin its embedding from; use more shots")
    means: list[torch.Tensor] = []
    begun = torch.empty(0)
    for start in range(0, categories, CHUNK):  # in chunks, so that no second copy of a large bank is held
        labels = share_of(list(range(start, min(start + CHUNK, categories))))
        own = {}
        for label in labels:
            mean, embedding = _category(vision, [item.image for item in groups[label]], how, seed)
            own[label] = (mean.flatten() if patches else mean.mean(0)).cpu(), embedding
        for label, (mean, embedding) in sorted(each for part in gather(own) for each in part.items()):
            means.append(mean)
            if embedding is not None:
                begun = begun if len(begun) else torch.empty(categories, *embedding.shape)
                begun[label] = embedding
    if how == "random":
        generator = torch.Generator().manual_seed(seed)
        begun = torch.randn((categories, *shape_of(vision, items[0].image)), generator=generator)
        begun *= STANDARD_DEVIATION
    return torch.stack(means), begun if len(begun) else None


def shape_of(vision: VisionTower, image: str) -> tuple[int, int]:
    """Return m and D of a model, measured on one image."""
    tokens, width = vision.project(vision.hidden([image])).shape[1:]
    return tokens, width


def _category(
    vision: VisionTower, images: list[str], how: str | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the mean of the tower's outputs, [P, V] on its device, and the embedding, [m, D] on the CPU."""
    outputs, projections = torch.tensor(0.0), torch.tensor(0.0)
    # Running sums over batches: the outputs of all images of a category need not fit into memory.
    for start in range(0, len(images), vision.batch):
        hidden = vision.hidden(images[start : start + vision.batch])
        outputs = outputs.to(hidden.device) + hidden.float().sum(0)
        if how == "averaging":
            projections = projections.to(hidden.device) + vision.project(hidden).float().sum(0)
    mean = outputs / len(images)
    if how is None or how == "random":
        return mean, None
    if how == "one_shot":
        chosen = vision.hidden([random.Random(f"one-shot-{seed}-{images[0]}").choice(images)])
        return mean, vision.project(chosen).float()[0].cpu()
    embedding = vision.project(mean[None].to(hidden.dtype)).float()[0]
    if how == "averaging":
        embedding = (embedding + projections / len(images)) / 2
    return mean, embedding.cpu()


def drift(now: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
    """Return how far each category has moved, as a share of its initial norm. Shape: [C].

    >>> drift(torch.tensor([[[3.0, 5.0]]]), torch.tensor([[[3.0, 4.0]]])).tolist()
    [0.20000000298023224]
    """
    return (now - begun).flatten(1).norm(dim=1) / begun.flatten(1).norm(dim=1).clamp(min=1e-12)


def nearest(entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most similar other category of each, by the cosine of the flattened embeddings.

    Returns:
        Indices [C] and cosines [C].
    """
    flat = torch.nn.functional.normalize(entries.flatten(1).float(), dim=1)
    cosines = flat @ flat.T
    cosines.fill_diagonal_(-torch.inf)
    best = cosines.max(1)
    return best.indices, best.values
