"""Candidates on disk, so that a few-shot learner and ALERT over it may run at different times and in different
environments. No torch.

    <name>.npz    image_id (N), topk_idx (N, K), topk_logit (N, K); K is 16, or the number of names if that is less
    <name>.json   whose ranking it is, the class names with their hash, recall@k, and a hash of the arrays

Both are needed; the layout is our choice. `method.draft=file` reads them.

Shapes: N images, C classes, K candidates per image.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.counted import agree, counted
from common.data.manifest import digest
from common.few_shot.candidates import Candidates, Origin, recall_at
from common.types import UserError

FOLDER = "candidates"  # in the folder of a few-shot learner's run, a pair of files for each split
ARRAYS = ("image_id", "topk_idx", "topk_logit")
DAMAGED = "was not written whole; write it again"


def write(
    path: Path,
    candidates: Candidates,
    names: Sequence[str],
    truths: Sequence[int],
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `<path>.npz` and `<path>.json`, each whole or not at all.

    Args:
        path: Without suffix; its folder is made.
        candidates: Candidates of the whole split.
        names: Class names. Length: C.
        truths: True classes, for the recall in the JSON file alone. Length: N.
        about: What else the JSON file says, such as the hash of the manifest.

    Returns:
        What the JSON file holds.

    Raises:
        UserError: The files cannot be written.
    """
    arrays = _arrays(candidates)
    facts = {
        **(about or {}),
        **asdict(candidates.origin),
        "images": len(candidates.images),
        **recall_at(candidates, names, truths),
        "names_sha256": digest(list(names)),
        "arrays_sha256": _sha256(*arrays),
        "names": list(names),
    }
    data, text = _paths(path)
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        with _unfinished(data).open("wb") as file:
            np.savez(file, image_id=arrays[0], topk_idx=arrays[1], topk_logit=arrays[2])
        _unfinished(text).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        os.replace(_unfinished(data), data)
        os.replace(_unfinished(text), text)
    except OSError as error:
        raise UserError(f"candidates cannot be written to {data} ({error.strerror}); choose another folder") from error
    return facts


def read(path: Path, images: Sequence[str], names: Sequence[str], dataset: str, split: str) -> Candidates:
    """The candidates of some images, from files that `write` made.

    Shots and seed are not compared, since a draft without training has none; they are in `origin`, to be reported.

    Args:
        path: Path of either file, or without suffix.
        images: Keys. The files may hold more.
        names: Class names. Length: C.
        dataset: Name of the dataset that is tested on.
        split: The images' split, for errors.

    Returns:
        In the order of `images`.

    Raises:
        UserError: A file is missing or damaged, or belongs to another dataset, other classes or other images.
    """
    data, text = _paths(path)
    if split == "val" and not text.is_file():
        raise UserError(
            f"method.draft_file: {text} is missing; write it for the images to watch too, or watch none with"
            " validation=none"
        )
    facts = _read_json(text)
    image_id, indices, logits = _read_arrays(data)
    try:
        origin = Origin(*(facts[key] for key in ("method", "dataset", "shots", "seed", "uses_labels")))
        written, expected = list(facts["names"]), facts["arrays_sha256"]
    except (KeyError, TypeError) as error:
        raise UserError(f"method.draft_file: {text} lacks {error}; write it again") from error
    if origin.dataset != dataset:
        raise UserError(f"method.draft_file: {text} is for data={origin.dataset}, not {dataset}; give the right file")
    _check_names(text, written, list(names))
    if _sha256(image_id, indices, logits) != expected:
        raise UserError(f"method.draft_file: {data} and {text.name} do not belong together; write both again")
    rows = _rows(data, image_id.tolist(), images, split)
    return Candidates(tuple(images), indices[rows].astype(np.int64), logits[rows].astype(np.float64), origin)


def identity(path: Path) -> str:
    """A hash that changes with the ranking, the names, or whose ranking it is. `path`: as for `read`.

    Raises:
        UserError: The JSON file is missing or damaged.
    """
    return digest(_read_json(_paths(path)[1]))


def _paths(path: Path) -> tuple[Path, Path]:
    """`s1/test`, `s1/test.npz` or `s1/test.json` to both files; other dots belong to the name."""
    stem = path.with_suffix("") if path.suffix in (".npz", ".json") else path
    return stem.with_name(f"{stem.name}.npz"), stem.with_name(f"{stem.name}.json")


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def _arrays(candidates: Candidates) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """In the types of the file, least significant byte first on every machine."""
    return np.array(candidates.images, str), candidates.indices.astype("<i4"), candidates.logits.astype("<f4")


def _sha256(*arrays: NDArray[Any]) -> str:
    """A hash of the content, since an .npz file also holds the time at which it was written."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype.str}{array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"method.draft_file: {path} cannot be read ({error.strerror}); write it first") from error
    except ValueError as error:
        raise UserError(f"method.draft_file: {path} is not JSON; {DAMAGED}") from error
    if not isinstance(facts, dict):
        raise UserError(f"method.draft_file: {path} must hold an object, not a {type(facts).__name__}; write it again")
    return facts


def _read_arrays(path: Path) -> list[NDArray[Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return [archive[key] for key in ARRAYS]
    except OSError as error:
        raise UserError(f"method.draft_file: {path} cannot be read ({error.strerror}); write it first") from error
    except KeyError as error:
        raise UserError(f"method.draft_file: {path} lacks one of {', '.join(ARRAYS)}; write it again") from error
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"method.draft_file: {path} is no .npz file or {DAMAGED}") from error


def _check_names(path: Path, written: list[str], names: list[str]) -> None:
    if len(written) != len(names):
        raise UserError(
            f"method.draft_file: {path} has {counted(len(written), 'class')}, the run {len(names)}; give the right file"
        )
    for label, (there, here) in enumerate(zip(written, names, strict=True)):
        if there != here:
            raise UserError(f"method.draft_file: {path} calls class {label} '{there}', the run '{here}'; redo it")


def _rows(path: Path, known: list[str], images: Sequence[str], split: str) -> list[int]:
    rows = {image: row for row, image in enumerate(known)}
    if missing := [image for image in images if image not in rows]:
        instead = ", or watch no images with validation=none" if split == "val" else ""
        raise UserError(
            f"method.draft_file: {path} has no candidates for {missing[0]} ({len(missing):,} of"
            f" {counted(len(images), 'image')} of '{split}' {agree(len(missing), 'is', 'are')} missing); write it for"
            " all of them, or give each split a file of its own: SPLIT in"
            f" method.draft_file stands for its name{instead}"
        )
    return [rows[image] for image in images]
