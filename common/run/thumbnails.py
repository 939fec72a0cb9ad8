"""Small copies of a run's pictures in its folder, so that its report shows them without the dataset.

One file, thumbnails.parquet: `image` (the key) and `webp` (the bytes).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.evaluation.evaluate import Evaluation, evenly_spaced
from common.types import Images

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = "thumbnails.parquet"
SIDE = 128  # pixels of the longer side at most; a smaller picture stays as it is
TINY = 32  # pixels up to which every one is kept


def choose(before: Evaluation, after: Evaluation, trained_on: Sequence[str], limit: int) -> list[str]:
    """Keys of at most `limit` pictures of each split and `limit` trained ones.

    First those that are wrong before or after training, then others, evenly spaced over their split.
    """
    chosen = dict.fromkeys(evenly_spaced(trained_on, limit))
    for split, answers in after.answers.items():
        wrong = {p.image for each in (before, after) for p in each.answers[split].predictions if not p.correct}
        images = [prediction.image for prediction in answers.predictions]
        troubled = evenly_spaced([image for image in images if image in wrong], limit)
        chosen |= dict.fromkeys(troubled)
        chosen |= dict.fromkeys(evenly_spaced([image for image in images if image not in wrong], limit - len(troubled)))
    return list(chosen)


def write(folder: Path, images: Images, keys: Iterable[str]) -> None:
    """Decode and keep the pictures with these keys; the file is there whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    keys = list(keys)
    table = pyarrow.table({"image": keys, "webp": [shrink(images.open(key)) for key in keys]})
    unfinished = (folder / FILE).with_suffix(".unfinished")
    pyarrow.parquet.write_table(table, unfinished)
    unfinished.replace(folder / FILE)


def shrink(picture: Image) -> bytes:
    """As WebP, at most SIDE pixels wide and high; exact where the picture is tiny."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "WEBP", quality=75, lossless=max(small.size) <= TINY)
    return content.getvalue()


def read(folder: Path) -> dict[str, bytes]:
    """WebP by key; none of a run that kept none."""
    import pyarrow.parquet

    path = folder / FILE
    if not path.is_file():
        return {}
    table = pyarrow.parquet.read_table(path, columns=["image", "webp"]).to_pydict()
    return dict(zip(table["image"], table["webp"], strict=True))
