"""ImageNet's classes as WordNet has them, from the lists that the package timm ships. No download, no torch.

A class is a WordNet id such as `n01440764`; ImageNet's label order is that of the sorted ids.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from common.types import UserError

# Subsets of ImageNet by the name of their dataset: the file that lists their ids.
SUBSETS = {
    "imagenet": "imagenet_synsets.txt",
    "imagenet_a": "imagenet_a_synsets.txt",
    "imagenet_r": "imagenet_r_synsets.txt",
}


def _lines(name: str) -> list[str]:
    # The files that timm.data.ImageNetInfo reads, read directly: importing timm imports torch.
    package = find_spec("timm")
    if package is None or package.origin is None:
        raise UserError("ImageNet's classes come from the package timm, which is not installed: pip install timm")
    return (Path(package.origin).parent / "data" / "_info" / name).read_text(encoding="utf-8").splitlines()


@cache
def wnids(subset: str = "imagenet") -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1000 classes, or of the 200 of ImageNet-A or -R, in label order."""
    return tuple(_lines(SUBSETS[subset]))


@cache
def synonyms() -> dict[str, str]:
    """The words of each of the 1000 classes as one text, most common first: `n01440764` is `tench, Tinca tinca`."""
    known = set(wnids())
    rows = (line.split("\t") for line in _lines("imagenet_synset_to_lemma.txt"))
    return {wnid: words for wnid, words in rows if wnid in known}
