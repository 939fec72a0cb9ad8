"""The category embeddings bank (section 3.2): where it begins, how far it has moved, and the bank as a folder.

Shapes: C categories, m tokens of an image, D width of the language model, P patches, V width of the vision tower.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.data.sampling import by_label
from common.distributed import gather, share_of
from common.models.vision import Vision
from common.types import Item, UserError

INITIALISATIONS = ("proposed", "averaging", "random", "one_shot")
STANDARD_DEVIATION = 0.02  # of `random`, our choice: the paper says "random values"


def initial(vision: Vision, items: Sequence[Item], categories: int, how: str, seed: int) -> torch.Tensor:
    """The embeddings that training starts from. Shape: [C, m, D], fp32 on the CPU. Ranks share the categories.

    Args:
        vision: Tower and projector of the model.
        items: The few-shot images.
        categories: C.
        how: `proposed` (section 3.2: the mean of the tower's outputs, projected), `averaging` (appendix D.2, "combines
            embeddings after the image encoder layer and the multimodal projector layer"; our reading: the mean of the
            projected mean and the mean of the projections), `random` (normal) or `one_shot` (section 4.1.3: the
            features of one image drawn at random).
        seed: Of `random` and `one_shot`.

    Raises:
        UserError: A category has no image.
    """
    groups = by_label(items)
    if missing := sorted(set(range(categories)) - groups.keys()):
        raise UserError(f"category {missing[0]} has no training image to begin its embedding from; use more shots")
    own = {
        label: _begin(vision, [item.image for item in groups[label]], how, seed) for label in share_of(sorted(groups))
    }
    found = {label: embedding for part in gather(own) for label, embedding in part.items()}
    bank = torch.stack([found[label] for label in range(categories)])
    if how != "random":
        return bank
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(bank.shape, generator=generator) * STANDARD_DEVIATION


def _begin(vision: Vision, images: list[str], how: str, seed: int) -> torch.Tensor:
    if how == "one_shot":
        images = [random.Random(f"one-shot-{seed}-{images[0]}").choice(images)]
    hidden = torch.cat(
        [vision.hidden(images[start : start + vision.batch]) for start in range(0, len(images), vision.batch)]
    )
    embedding = vision.project(hidden.float().mean(0, keepdim=True).to(hidden.dtype)).float()[0]
    if how == "averaging":
        embedding = (embedding + vision.project(hidden).float().mean(0)) / 2
    return embedding.cpu()


def drift(now: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
    """How far each category has moved, as a share of its norm at the beginning. Shape: [C].

    >>> drift(torch.tensor([[[3.0, 5.0]]]), torch.tensor([[[3.0, 4.0]]])).tolist()
    [0.20000000298023224]
    """
    return (now - begun).flatten(1).norm(dim=1) / begun.flatten(1).norm(dim=1).clamp(min=1e-12)


def nearest(entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most similar other category of each, by the cosine of the flattened embeddings.

    Returns:
        Indices [C] and cosines [C].
    """
    flat = torch.nn.functional.normalize(entries.flatten(1).float(), dim=1)
    cosines = flat @ flat.T
    cosines.fill_diagonal_(-torch.inf)
    best = cosines.max(1)
    return best.indices, best.values


def export(folder: Path, entries: torch.Tensor, begun: torch.Tensor, names: Sequence[str]) -> None:
    """Write a bank as a folder: the embeddings, those that it began from, the names, a hash of all.

    Args:
        folder: Is made.
        entries: Shape: [C, m, D].
        begun: The same before training.
        names: Of the categories.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"entries": entries.float().clone(), "begun": begun.float().clone()}  # they may be one
    save_file(tensors, folder / "bank.safetensors")
    facts = {"names": list(names), "sha256": _hash(folder / "bank.safetensors", names), "shape": list(entries.shape)}
    (folder / "bank.json").write_text(json.dumps(facts, indent=2) + "\n")


def read(folder: Path, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A bank that `export` wrote: its embeddings and those that it began from, both [C, m, D].

    Raises:
        UserError: It is missing or damaged, or belongs to other categories.
    """
    try:
        facts = json.loads((folder / "bank.json").read_text())
        tensors = load_file(folder / "bank.safetensors")
    except (OSError, ValueError) as error:
        raise UserError(f"method.bank={folder} is no bank that a run has exported ({error})") from error
    if facts["names"] != list(names):
        known = set(facts["names"])
        strange = next((name for name in names if name not in known), None)
        what = f"it has no '{strange}'" if strange else "their number or order differs"
        raise UserError(f"method.bank={folder} is a bank of other categories: {what}; train one for this dataset")
    if facts["sha256"] != _hash(folder / "bank.safetensors", names):
        raise UserError(f"method.bank={folder} is damaged: its content does not match its hash; export it again")
    return tensors["entries"], tensors["begun"]


def _hash(path: Path, names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode() + path.read_bytes()).hexdigest()
