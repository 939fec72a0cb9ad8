"""FGVC-Aircraft by the official lists, which are also CoOp's split; there is no split file.

`variants.txt` has one class per line, `images_variant_{train,val,test}.txt` lines of image number and class.
"""

from __future__ import annotations

from pathlib import Path

from common.data.assemble import Parts, assemble
from common.data.listing import fields, lines
from common.data.location import Location
from common.types import Item, Source


def read(location: Location) -> Source:
    """The dataset with its own parts; a label is a class's line in `variants.txt`, counted from 0.

    Raises:
        UserError: A file is missing, or a line names an unknown class.
    """
    location.need("images")
    names = [name for _, name in lines(location, location.need("variants.txt"))]
    labels = {name: label for label, name in enumerate(names)}
    train, val, test = (
        _items(location, location.need(f"images_variant_{part}.txt"), labels) for part in ("train", "val", "test")
    )
    return assemble(location, names, Parts(train, val, test), "official lists")


def _items(location: Location, path: Path, labels: dict[str, int]) -> list[Item]:
    items = []
    for line in lines(location, path):
        image, name = fields(location, line, "image variant")
        if name not in labels:
            raise location.error(f"{line[0]}: '{name}' is not in variants.txt")
        items.append(Item(location.key(f"images/{image}.jpg"), labels[name], name))
    return items
