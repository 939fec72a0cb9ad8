"""Read the images of a run's report: a test image with its replies before and after training, or a training image with
its group of completions.

Files are read in pieces: the replies of a whole test set, with a thousand probabilities each, may not fit in memory.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.parsing import normalize
from common.types import UserError

if TYPE_CHECKING:
    import pyarrow

LONGEST = 20_000  # characters of a text that are shown
MOST = 10  # probabilities of an image that are shown
GROUPS = 5_000  # most training images, each with its completions
PIECE = 500  # rows read at a time
TRAINING = "training"  # name for training images where tests have the name of their split
MALFORMED, DISAGREES, CUT = 1, 2, 4  # flags of a row
NEEDED = {
    "phase",
    "split",
    "image",
    "label",
    "label_index",
    "answer",
    "correct",
    "completion",
    "formatted",
    "truncated",
}
NEEDED |= {"choices", "probabilities"}
OWN = {
    "phase",
    "split",
    "image",
    "label",
    "label_index",
    "correct_alias",
    "choices",
    "probabilities_raw",
    "log_probabilities",
    "candidates",
}


@dataclass(frozen=True)
class Row:
    """An image in the report.

    answer: a class name of the report; None: not a class name.
    before, after: right or wrong; `after` is the end of the run, `before` is None without training or without an
        evaluation before it.
    confidence: probability of the most probable name.
    sureness: probability of the answer; 0 if it is not among the most probable names.
    detail: values for the page.
    """

    split: str
    image: str
    label: str
    detail: dict[str, Any]
    answer: str | None = None
    before: bool | None = None
    after: bool | None = None
    confidence: float | None = None
    sureness: float | None = None
    flags: int = 0

    @property
    def last(self) -> dict[str, Any]:
        """The reply at the end of the run."""
        reply: dict[str, Any] = self.detail["after"] if "after" in self.detail else self.detail["before"]
        return reply


def tests(folder: Path, pictures: Mapping[str, bytes]) -> Iterator[Row]:
    """Yield every tested image, in the order of the splits.

    Args:
        folder: Folder of a finished run.
        pictures: Thumbnail (WebP) by image.

    Raises:
        UserError: predictions.parquet is missing or damaged.
    """
    file = _predictions(folder)
    # every row group of the file holds one split in one phase
    parts: dict[str, dict[str, int]] = {}
    for number in range(file.num_row_groups):
        head = next(file.iter_batches(1, [number], ["phase", "split"]), None)
        if head is not None:
            phase = head["phase"][0].as_py()
            parts.setdefault(head["split"][0].as_py(), {})[phase] = number
    nothing: list[dict[str, Any]] = []
    for phases in parts.values():
        first, last = (_pieces(file, phases.get(phase)) for phase in ("before", "after"))
        for early, late in zip_longest(first, last, fillvalue=nothing):
            assert not early or not late or len(early) == len(late)
            for before, after in zip_longest(early, late):
                yield _tested(before, after, pictures)


def _predictions(folder: Path) -> pyarrow.parquet.ParquetFile:
    import pyarrow.parquet

    path = folder / "predictions.parquet"
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:100]})") from error
    if missing := NEEDED - set(file.schema_arrow.names):
        raise UserError(f"{path} has no column {min(missing)}, so no run wrote it; run it again")
    return file


def _pieces(file: pyarrow.parquet.ParquetFile, number: int | None) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of one phase and split (None: nothing), each with only its largest probabilities."""
    if number is None:
        return
    known = [name for name in file.schema_arrow.names if name not in ("probabilities_raw", "log_probabilities")]
    for batch in file.iter_batches(PIECE, [number], known):
        names = [name for name in known if name not in ("probabilities", "choices")]
        rows = batch.select(names).to_pylist()
        for row, top in zip(rows, _largest(batch), strict=True):
            row["top"] = top
        yield rows


def _largest(batch: pyarrow.RecordBatch) -> list[list[tuple[str, float]]]:
    choices, values = batch["choices"], batch["probabilities"]
    names, numbers = choices.flatten(), values.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    found = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        # stable sort: ties keep the order of the names
        order = start + np.argsort(-numbers[int(start) : int(end)], kind="stable")[:MOST]
        found.append([(names[int(place)].as_py(), float(numbers[place])) for place in order])
    return found


def _tested(before: dict[str, Any] | None, after: dict[str, Any] | None, pictures: Mapping[str, bytes]) -> Row:
    """Build the row of an image from its rows before and after training; one of them may be missing."""
    rows = {phase: row for phase, row in (("before", before), ("after", after)) if row is not None}
    final = list(rows.values())[-1]
    assert all(row["image"] == final["image"] for row in rows.values()), "both phases ask the same images in one order"
    detail: dict[str, Any] = {phase: _reply(row) for phase, row in rows.items()} | {"prompt": cut(final.get("prompt"))}
    if final.get("candidates") is not None:
        detail["candidates"] = final["candidates"]
    detail["picture"] = picture(pictures, final["image"])
    # flags come from the final reply; None means that the method does not report it
    flags = MALFORMED * (final["formatted"] is False) + CUT * bool(final["truncated"])
    flags += DISAGREES * (final.get("reasoning_agrees") is False)
    said = {normalize(name): share for name, share in final["top"]}
    return Row(
        split=final["split"],
        image=final["image"],
        label=final["label"],
        detail=detail,
        answer=final["answer"] or None,
        before=None if before is None or after is None else before["correct"],
        after=final["correct"],
        confidence=final["top"][0][1] if final["top"] else None,
        sureness=said.get(normalize(final["answer"] or ""), 0.0) if said else None,
        flags=flags,
    )


def _reply(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of one answer for the page, including the method's own columns."""
    known = {"answer", "completion", "correct", "top", "prompt", *OWN}
    facts = {name: value for name, value in row.items() if name not in known and value is not None}
    return {
        "answer": row["answer"],
        "text": cut(row["completion"]),
        "correct": row["correct"],
        "top": [(name, round(share, 4)) for name, share in row["top"]],
        "facts": facts,
    }


def training(folder: Path, pictures: Mapping[str, bytes], most: int = GROUPS) -> Iterator[Row]:
    """Yield the sampled completions, a row per image and update; if there are more than `most`, an even selection."""
    path = folder / "completions.parquet"
    if not path.is_file():
        return
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    # the file is read twice: grouped once to count, once for the rows
    count = sum(1 for _ in _groups(file, ["step", "image"]))
    wanted = {number * count // most for number in range(most)} if count > most else None
    for number, members in enumerate(_groups(file)):
        if wanted is None or number in wanted:
            yield _trained(members, pictures)


def _groups(file: pyarrow.parquet.ParquetFile, columns: list[str] | None = None) -> Iterator[list[dict[str, Any]]]:
    rows = (row for batch in file.iter_batches(PIECE, columns=columns) for row in batch.to_pylist())
    for _, members in groupby(rows, key=itemgetter("step", "image")):
        yield list(members)


def _trained(members: list[dict[str, Any]], pictures: Mapping[str, bytes]) -> Row:
    first = members[0]
    samples = [
        {
            "text": cut(row["completion"]),
            "reward": _short(row["reward"]),
            "advantage": _short(row["advantage"]),
            "tokens": row["tokens"],
            "rewards": {name.removeprefix("rewards/"): _short(v) for name, v in row.items() if name[:8] == "rewards/"},
            "said": {
                name.removeprefix("judge_reply/"): cut(v)
                for name, v in row.items()
                if name.startswith("judge_reply/") and v
            },
        }
        for row in members
    ]
    # all samples of a group share prompt and image
    detail = {
        "step": first["step"],
        "prompt": cut(first["prompt"]),
        "samples": samples,
        "picture": picture(pictures, first["image"]),
    }
    return Row(TRAINING, first["image"], first["label"], detail, flags=CUT * any(row["truncated"] for row in members))


def _short(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(value, 4)


def cut(text: str | None) -> str | None:
    """Shorten a text for the page."""
    if text is None or len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}\n[… {len(text) - LONGEST:,} more characters in the run folder]"


def picture(pictures: Mapping[str, bytes], image: str) -> str | None:
    """Return a thumbnail as a data URI."""
    content = pictures.get(image)
    return None if content is None else f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def class_names(folder: Path) -> dict[str, str]:
    """Return the class names as they are written, by normalised name."""
    import pyarrow.parquet

    rows = _predictions(folder).read(columns=["label_index", "label"])
    pairs = rows.group_by(["label_index", "label"]).aggregate([]).to_pylist()
    found = {normalize(row["label"]): row["label"] for row in sorted(pairs, key=lambda row: row["label_index"])}
    head = next(_predictions(folder).iter_batches(1, columns=["choices"]), None)
    for name in [] if head is None else head["choices"].flatten().to_pylist():  # classes may have no tested images
        found.setdefault(normalize(name), name)
    if (folder / "completions.parquet").is_file():
        trained = pyarrow.parquet.read_table(folder / "completions.parquet", columns=["label"])["label"].unique()
        for name in trained.to_pylist():
            found.setdefault(normalize(name), name)
    return found


@dataclass
class Tally:
    """Counts of tested images by split, taken while rows pass through.

    surest: probability of each image's most probable name, and whether that is right.
    pairs: normalised label and answer; an empty answer for none.
    wrong: number of wrong images.
    images: number of all images.
    """

    surest: dict[str, tuple[list[float], list[bool]]] = field(default_factory=dict)
    pairs: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    wrong: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Count the rows, and yield them unchanged."""
        for row in rows:
            label = normalize(row.label)
            self.images[row.split] += 1
            self.wrong[row.split] += not row.after
            self.pairs.setdefault(row.split, Counter())[label, normalize(row.answer or "")] += 1
            if row.confidence is not None:
                confidences, right = self.surest.setdefault(row.split, ([], []))
                confidences.append(row.confidence)
                right.append(normalize(row.last["top"][0][0]) == label)
            yield row


def tally(folder: Path) -> Tally:
    """Count all tested images of a finished run."""
    counted = Tally()
    for _ in counted(tests(folder, {})):
        pass
    return counted
