"""Rank the classes of every image by a few-shot learner's logits, keep the best on disk, and measure recall@k.

A few-shot learner writes its candidates into its run folder; a method such as ALERT, for which the learner is a draft,
offers the first k of them to a language model.

Shapes: N images, C classes, k candidates per image that are shown, K >= k candidates that are kept. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.config.schema import one_of
from common.counted import agree, counted
from common.data.manifest import digest
from common.parsing import normalize
from common.types import UserError

DEPTH = 16  # K, the classes kept per image; the paper shows up to 8 (Table 5)
CHUNK = 4096  # images that are sorted together, which bounds the memory
ORDERS = ("rank", "shuffle")
RECALL_AT = (1, 2, 3, 4, 5, 8)


@dataclass(frozen=True)
class Origin:
    """Describe the learner that made a ranking: method, dataset, shots and seed.

    `uses_labels`: the true class was inserted into the candidates, so results that use them are an upper bound.
    """

    method: str
    dataset: str
    shots: int | str
    seed: int
    uses_labels: bool = False


@dataclass(frozen=True)
class Candidates:
    """The best classes of every image.

    Args: images: Image keys, without duplicates. Length: N.
    indices: Class indices, best first, without two classes of one name. Shape: [N, K].
    logits: Logits of these classes, not increasing along a row. Shape: [N, K].
    origin: Description of the learner that made the ranking.

    Raises: ValueError: Shapes do not fit, or an image occurs twice.
    """

    images: tuple[str, ...]
    indices: NDArray[np.int64]
    logits: NDArray[np.float64]
    origin: Origin

    def __post_init__(self) -> None:
        if self.indices.shape != self.logits.shape or self.indices.shape[:-1] != (len(self.images),):
            raise ValueError(
                f"{len(self.images)} images, indices of shape {self.indices.shape}, logits of shape {self.logits.shape}"
            )
        if len(self._row) != len(self.images):
            raise ValueError("an image occurs twice")

    @cached_property
    def _row(self) -> dict[str, int]:
        return {image: row for row, image in enumerate(self.images)}

    def ranking(self, image: str) -> tuple[int, ...]:
        """Return all K kept classes of an image, best first."""
        return tuple(self.indices[self._row[image]].tolist())

    def scores(self, image: str) -> tuple[float, ...]:
        """Return the logits of `ranking(image)`."""
        return tuple(self.logits[self._row[image]].tolist())

    def shown(self, image: str, k: int, order: str = "rank") -> tuple[int, ...]:
        """Return the k best classes of an image in the order of the prompt (the paper gives no order: our choice).

        Args:
            image: Key of the image.
            k: Number of classes; the paper's default is 2.
            order: `rank` (best first, which shows the model what the draft prefers) or `shuffle` (a random order that
                depends on the image alone).

        Raises:
            UserError: `k` or `order` is not possible.
        """
        one_of("method.order", order, ORDERS)
        _check_k(k, self.indices.shape[1], "are kept of each image")
        best = list(self.ranking(image)[:k])
        if order == "shuffle":
            # Seeded by the image key alone: the same order before and after training, in every run and on every rank.
            random.Random(f"candidates-{image}").shuffle(best)
        return tuple(best)


@lru_cache(maxsize=16)
def name_groups(names: tuple[str, ...]) -> tuple[int, ...]:
    """Return for every class the first class of its name: classes that cannot be told apart share a number.

    Names are compared like answers (`common.parsing.normalize`).

    >>> name_groups(("missile", "crane", "Missile"))
    (0, 1, 0)
    """
    first: dict[str, int] = {}
    return tuple(first.setdefault(normalize(name), label) for label, name in enumerate(names))


def select(logits: ArrayLike, k: int, names: Sequence[str] | None = None) -> NDArray[np.int64]:
    """Return the k classes with the highest logits, best first; ties go to the lower class index (section 3.1).

    No label is used. Of several classes with one name only the best is kept: a prompt must not list a name twice.

    Args:
        logits: One number per class; higher is more likely. Shape: [N, C].
        k: Number of classes.
        names: Class names as the prompt shows them. Length: C. None: all names differ.

    Returns:
        Class indices. Shape: [N, k].

    Raises:
        UserError: There are fewer than k names.
        ValueError: The logits do not fit the names, or one is not a number.

    >>> select([[0.1, 0.7, 0.7], [0.5, 0.2, 0.3]], k=2).tolist()
    [[1, 2], [0, 2]]
    >>> select([[0.1, 0.7, 0.7], [0.5, 0.2, 0.3]], k=2, names=("a", "b", "B")).tolist()
    [[1, 0], [0, 2]]
    """
    rows = np.asarray(logits)
    if rows.ndim != 2 or np.isnan(rows).any():
        raise ValueError(f"logits of shape {rows.shape}; expected [N, C] without NaN")
    if names is not None and len(names) != rows.shape[1]:
        raise ValueError(f"{rows.shape[1]} logits per image, but {len(names)} names")
    groups = tuple(range(rows.shape[1])) if names is None else name_groups(tuple(names))
    _check_k(k, len(set(groups)), "class names are different")
    chosen = np.empty((len(rows), k), np.int64)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        chosen[part] = _order(rows[part].astype(np.float64), groups)[:, :k]
    return chosen


def _order(rows: NDArray[np.float64], groups: Sequence[int]) -> NDArray[np.int64]:
    """Return all classes of each row, best first; a class that is beaten by another one of its name goes to the end."""
    behind = np.zeros(rows.shape, bool)
    # Only groups with several members matter: all of them are moved behind, then the best one is moved back to the
    # front.
    for first in sorted({first for label, first in enumerate(groups) if label != first}):
        same = np.array([label for label, group in enumerate(groups) if group == first])
        best = same[rows[:, same].argmax(1)]  # of equal ones the lowest index
        behind[:, same] = True
        behind[np.arange(len(rows)), best] = False
    # lexsort sorts by its last key first: `behind`, then the negated logit.
    return np.lexsort((-rows, behind))  # stable, unlike torch.topk: ties keep the order of the classes


def _check_k(k: int, available: int, what: str) -> None:
    if k < 1:
        raise UserError(f"method.k={k} must be 1 or more")
    if k > available:
        raise UserError(f"method.k={k}, but only {available} {what}; use method.k={available} or less")


def rank(images: Sequence[str], logits: ArrayLike, names: Sequence[str], origin: Origin) -> Candidates:
    """Turn a draft's logits into candidates: the best DEPTH classes of each image, or all if there are fewer names.

    Args:
        images: Image keys. Length: N.
        logits: Logits of the draft. Shape: [N, C].
        names: Class names. Length: C.
        origin: Description of the draft.
    """
    indices = select(logits, min(DEPTH, len(set(name_groups(tuple(names))))), names)
    return Candidates(tuple(images), indices, logits_of(logits, indices), origin)


def join(parts: Sequence[Candidates], images: Sequence[str]) -> Candidates:
    """Join the candidates that one draft gave for several sets of images.

    Args:
        parts: Candidates of each set; at least one.
        images: Image keys in the order of the result. Length: N.
    """
    # row of an image in the concatenation of all parts
    row_of = {image: row for row, image in enumerate(image for part in parts for image in part.images)}
    rows = [row_of[image] for image in images]
    indices, logits = (np.concatenate(each)[rows] for each in zip(*((p.indices, p.logits) for p in parts), strict=True))
    return Candidates(tuple(images), indices, logits, parts[0].origin)


def logits_of(logits: ArrayLike, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Gather the logits of given classes per image. Shapes: [N, C] and [N, k] -> [N, k]."""
    return np.take_along_axis(np.asarray(logits), indices, axis=1).astype(np.float64)


def place_of(name: str, names: Sequence[str]) -> int | None:
    """Return the position of a name in a list, counted from 1; None if it is missing."""
    return names.index(name) + 1 if name in names else None


def recall(ranks: Sequence[int | None], depth: int, at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Return recall@k: the share of images whose true class is among the first k, for every k of `at`.

    Args:
        ranks: Rank of the true class per image, from 1; None: not among the first `depth`.
        depth: Number of known candidates per image.
        at: Values of k. Those beyond `depth` are left out, unless every true class was found within `depth`.

    >>> recall([1, 3, None, 1], depth=4)
    {'recall@1': 0.5, 'recall@2': 0.5, 'recall@3': 0.75, 'recall@4': 0.75}
    """
    # beyond `depth` a missing rank could be anything, so recall is known there only if no rank is missing
    known = [k for k in at if k <= depth or None not in ranks]
    return {f"recall@{k}": sum(rank is not None and rank <= k for rank in ranks) / len(ranks) for k in known}


def recall_at(candidates: Candidates, names: Sequence[str], truths: Sequence[int]) -> dict[str, float]:
    """Return recall@k of a ranking for k of 1, 2, 3, 4, 5, 8 and 16, as far as the kept candidates tell.

    A class with the same name as the true class counts as the true class.
    """
    ranks = truth_ranks(candidates, names, truths)
    return recall(ranks, candidates.indices.shape[1], (*RECALL_AT, DEPTH))


def truth_ranks(candidates: Candidates, names: Sequence[str], truths: Sequence[int]) -> list[int | None]:
    """Return the rank of every image's true class, from 1; None: not among the kept ones. Arguments as `recall_at`."""
    groups = np.array(name_groups(tuple(names)))
    shown = groups[candidates.indices].tolist()
    return [place_of(groups[truth], row) for truth, row in zip(truths, shown, strict=True)]


# Candidates on disk: `method.draft=file` reads them, so the few-shot learner and ALERT can run at different times and
# in different environments. Both files are needed; the layout is our choice.
#
# <name>.npz    image_id (N), topk_idx (N, K), topk_logit (N, K); K is 16, or the number of names if that is less
# <name>.json   origin of the ranking, class names with their hash, recall@k, hash of the arrays

FOLDER = "candidates"  # sub-folder of a few-shot learner's run folder, with one pair of files per split
ARRAYS = ("image_id", "topk_idx", "topk_logit")
DAMAGED = "was not written whole; write it again"


def write_candidates(
    path: Path,
    candidates: Candidates,
    names: Sequence[str],
    truths: Sequence[int],
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `<path>.npz` and `<path>.json`, each completely or not at all.

    Args:
        path: Path without suffix; its folder is created.
        candidates: Candidates of the whole split.
        names: Class names. Length: C.
        truths: True classes, used only for the recall in the JSON file. Length: N.
        about: Further entries of the JSON file, such as the hash of the manifest.

    Returns:
        The content of the JSON file.

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
        # Write under temporary names, then rename. A kill between the two renames leaves a pair that does not match;
        # the hash of the arrays in the JSON file reveals it.
        with _unfinished(data).open("wb") as file:
            np.savez(file, image_id=arrays[0], topk_idx=arrays[1], topk_logit=arrays[2])
        _unfinished(text).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        os.replace(_unfinished(data), data)
        os.replace(_unfinished(text), text)
    except OSError as error:
        raise UserError(f"candidates cannot be written to {data} ({error.strerror}); choose another folder") from error
    return facts


def read_candidates(path: Path, images: Sequence[str], names: Sequence[str], dataset: str, split: str) -> Candidates:
    """Read the candidates of some images from files that `write_candidates` made.

    Shots and seed are not compared, since a draft without training has none; they are reported from `origin`.

    Args:
        path: Path of either file, or without suffix.
        images: Image keys. The files may hold more.
        names: Class names. Length: C.
        dataset: Name of the dataset that is tested on.
        split: Name of the images' split, for errors.

    Returns:
        The candidates in the order of `images`.

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
    """Return a hash that changes with the ranking, the class names or the origin. `path`: as in `read_candidates`.

    Raises:
        UserError: The JSON file is missing or damaged.
    """
    return digest(_read_json(_paths(path)[1]))


def _paths(path: Path) -> tuple[Path, Path]:
    """Map `s1/test`, `s1/test.npz` or `s1/test.json` to both files; other dots belong to the name."""
    stem = path.with_suffix("") if path.suffix in (".npz", ".json") else path
    return stem.with_name(f"{stem.name}.npz"), stem.with_name(f"{stem.name}.json")


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def _arrays(candidates: Candidates) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Convert candidates to the types of the file, little-endian on every machine."""
    return np.array(candidates.images, str), candidates.indices.astype("<i4"), candidates.logits.astype("<f4")


def _sha256(*arrays: NDArray[Any]) -> str:
    """Hash the content of arrays; the bytes of an .npz file would not do, since it also stores the time of writing."""
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
