"""Convert evaluated images to and from tables, and keep thumbnails of some images."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import numpy.typing

from common.evaluation.evaluate import Evaluation, evenly_spaced
from common.types import Answers, Images, Prediction, Probabilities, Reply

if TYPE_CHECKING:
    import pyarrow
    from PIL.Image import Image


# Predictions: one row per image, one file per split and phase.
#
# Columns: phase (`before` or `after` training), split, the fields of `Prediction`; for replies `completion`, `tokens`,
# `truncated`, `formatted` and `correct_official`; for probabilities `choices` (the offered names), `probabilities`,
# `probabilities_raw` and `log_probabilities`; then the method's own (see `Prompting.extra_columns`) and the text of the
# prompt (`prompt`).


REPLY = {"completion": "text", "tokens": "tokens", "truncated": "truncated", "formatted": "well_formed"}
OFFERED = ("choices", "probabilities", "probabilities_raw", "log_probabilities")
PROMPT = "prompt"  # name of a column
NOTES = ("seconds", "scoring_seconds", "names")  # keys of the file's metadata


def to_table(phase: str, split: str, answers: Answers) -> pyarrow.Table:
    """Return the rows of a split as a table, the method's own columns last."""
    import pyarrow as pa

    predictions = answers.predictions
    replies = [prediction.reply for prediction in predictions]
    strings, flags, counts = pa.string(), pa.bool_(), pa.int64()
    columns = {
        "phase": pa.array([phase] * len(predictions), strings),
        "split": pa.array([split] * len(predictions), strings),
        "image": pa.array([p.image for p in predictions], strings),
        "label": pa.array([p.label for p in predictions], strings),
        "label_index": pa.array([p.label_index for p in predictions], counts),
        "answer": pa.array([p.answer for p in predictions], strings),
        "completion": pa.array([r and r.text for r in replies], strings),
        "correct": pa.array([p.correct for p in predictions], flags),
        "correct_official": pa.array([r and r.correct_official for r in replies], flags),
        "correct_alias": pa.array([p.correct_alias for p in predictions], flags),
        "formatted": pa.array([r and r.well_formed for r in replies], flags),
        "tokens": pa.array([r and r.tokens for r in replies], counts),
        "truncated": pa.array([r and r.truncated for r in replies], flags),
        **_offered(answers.probabilities, len(predictions)),
        **{name: _column(name, values) for name, values in answers.columns.items()},
    }
    # the order of the class names is kept in the metadata: the rows hold only the offered names
    names = [] if answers.probabilities is None else list(answers.probabilities.names)
    notes = (str(answers.seconds), str(answers.scoring_seconds), json.dumps(names))
    return pa.table(columns).replace_schema_metadata(dict(zip(NOTES, notes, strict=True)))


def _column(name: str, values: list[Any]) -> pyarrow.Array:
    """Return a column; prompts, which are long and often equal, are stored once each."""
    import pyarrow as pa

    if name != PROMPT:
        return pa.array(values)
    places = {text: number for number, text in enumerate(dict.fromkeys(values))}
    return pa.DictionaryArray.from_arrays(pa.array([places[text] for text in values], pa.int32()), pa.array([*places]))


def _offered(table: Probabilities | None, rows: int) -> dict[str, pyarrow.Array]:
    """Return lists of the offered names and their probabilities, each as long as its prompt's own list."""
    import pyarrow as pa

    kinds = (pa.list_(pa.string()), *[pa.list_(pa.float32())] * 3)
    if table is None:
        return {name: pa.nulls(rows, kind) for name, kind in zip(OFFERED, kinds, strict=True)}
    shown = table.classes >= 0  # [N, K]; -1 pads shorter lists
    offsets = pa.array(numpy.concatenate([[0], shown.sum(1).cumsum()]), pa.int32())
    lists = [
        pa.array(table.names, pa.string()).take(pa.array(table.classes[shown])),
        pa.array(table.values[shown]),
        *(
            pa.nulls(int(shown.sum()), pa.float32()) if each is None else pa.array(each[shown])
            for each in (table.raw, table.logs)
        ),
    ]
    return {name: pa.ListArray.from_arrays(offsets, values) for name, values in zip(OFFERED, lists, strict=True)}


def from_table(table: pyarrow.Table) -> Answers:
    """Convert a table back to `Answers`, without the prompts, which only readers of the file need."""
    own = {"phase", "split", PROMPT, *Prediction.__dataclass_fields__, *REPLY, "correct_official", *OFFERED}
    columns = {name: table.column(name).to_pylist() for name in table.column_names if name not in own}
    seconds, scoring, names = (table.schema.metadata[note.encode()].decode() for note in NOTES)
    fields = [name for name in Prediction.__dataclass_fields__ if name != "reply"]
    rows = table.select([*fields, *REPLY, "correct_official"]).to_pylist()
    predictions = [Prediction(**{name: row[name] for name in fields}, reply=_reply(row)) for row in rows]
    return Answers(predictions, float(seconds), _probabilities(table, json.loads(names)), float(scoring), columns)


def _reply(row: dict[str, Any]) -> Reply | None:
    if row["completion"] is None:
        return None
    return Reply(**{field: row[name] for name, field in REPLY.items()}, correct_official=row["correct_official"])


def _probabilities(table: pyarrow.Table, names: Sequence[str]) -> Probabilities | None:
    if not names:
        return None
    import pyarrow as pa
    import pyarrow.compute as pc

    choices, values, raw, logs = (table.column(name).combine_chunks() for name in OFFERED)
    lengths = numpy.diff(choices.offsets.to_numpy())
    shown = numpy.arange(int(lengths.max(initial=0))) < lengths[:, None]  # [N, K]
    classes = numpy.full(shown.shape, -1, numpy.int32)
    classes[shown] = pc.index_in(choices.flatten(), pa.array(names)).to_numpy()

    def filled(part: pyarrow.ListArray, padding: float = 0.0) -> numpy.typing.NDArray[numpy.float32]:
        numbers = numpy.full(shown.shape, padding, numpy.float32)
        numbers[shown] = part.flatten().to_numpy(zero_copy_only=False)
        return numbers

    has_raw, has_logs = (part.flatten().null_count == 0 for part in (raw, logs))
    return Probabilities(
        tuple(names),
        classes,
        filled(values),
        filled(raw) if has_raw else None,
        filled(logs, -numpy.inf) if has_logs else None,
    )


# Thumbnails in the run folder, so that its report shows images without the dataset.
#
# One file, thumbnails.parquet: `image` (the key) and `webp` (the bytes).

THUMBNAILS = "thumbnails.parquet"
THUMBNAIL_SIDE = 128  # longest side in pixels; a smaller image keeps its size
TINY = 32  # longest side up to which compression is lossless


def choose_thumbnails(before: Evaluation, after: Evaluation, trained_on: Sequence[str], limit: int) -> list[str]:
    """Choose at most `limit` images of each split and `limit` training images.

    Images that are wrong before or after training come first, then others, evenly spaced over their split.
    """
    chosen = dict.fromkeys(evenly_spaced(trained_on, limit))
    for split, answers in after.answers.items():
        wrong = {p.image for each in (before, after) for p in each.answers[split].predictions if not p.correct}
        images = [prediction.image for prediction in answers.predictions]
        unusable = evenly_spaced([image for image in images if image in wrong], limit)
        chosen |= dict.fromkeys(unusable)
        chosen |= dict.fromkeys(evenly_spaced([image for image in images if image not in wrong], limit - len(unusable)))
    return list(chosen)


def write_thumbnails(folder: Path, images: Images, keys: Iterable[str]) -> None:
    """Write thumbnails of the images with these keys, atomically."""
    import pyarrow
    import pyarrow.parquet

    keys = list(keys)
    table = pyarrow.table({"image": keys, "webp": [shrink(images.open(key)) for key in keys]})
    unfinished = (folder / THUMBNAILS).with_suffix(".unfinished")
    pyarrow.parquet.write_table(table, unfinished)
    unfinished.replace(folder / THUMBNAILS)


def shrink(picture: Image) -> bytes:
    """Return an image as WebP, at most THUMBNAIL_SIDE pixels wide and high; lossless if it is tiny."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    content = io.BytesIO()
    small.save(content, "WEBP", quality=75, lossless=max(small.size) <= TINY)
    return content.getvalue()


def read_thumbnails(folder: Path) -> dict[str, bytes]:
    """Read the thumbnails by key; empty if the run kept none."""
    import pyarrow.parquet

    path = folder / THUMBNAILS
    if not path.is_file():
        return {}
    table = pyarrow.parquet.read_table(path, columns=["image", "webp"]).to_pydict()
    return dict(zip(table["image"], table["webp"], strict=True))
