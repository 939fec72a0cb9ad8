"""Read and write a category embeddings bank as a folder. No torch until embeddings are read or written.

    bank.json           names of the categories, shape, architecture, a hash of names and embeddings
    bank.safetensors    `entries`: the embeddings
    begun.safetensors   `begun`: the initial embeddings of the training; only beside a run's final weights
    similarities.npy    the initial similarities of the categories; likewise

Only architecture and shape tie a bank to a model. A hash of the weights would refuse the most common pair, a bank with
the fine-tuned weights that were trained with it. So a bank for other weights of the same architecture and size does
load, and it is up to the user that this makes sense.

Shapes: C categories, m tokens of an image, D width of the language model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.counted import counted
from common.types import UserError

if TYPE_CHECKING:
    import torch

FACTS, ENTRIES, BEGUN = "bank.json", "bank.safetensors", "begun.safetensors"
SIMILARITIES = "similarities.npy"
AGAIN = "copy the bank again from the run that trained it"
BEGIN_AGAIN = "of an unfinished run, delete it: continuing computes it again; of a finished run, copy it again"


@contextmanager
def asked_by(key: str) -> Iterator[None]:
    """Prefix errors with the configuration key that gave the folder."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def export(folder: Path, entries: torch.Tensor, names: Sequence[str], architecture: str) -> None:
    """Write a bank.

    Args:
        folder: Folder to create.
        entries: Category embeddings. Shape: [C, m, D].
        names: Names of the categories. Length: C.
        architecture: Architecture of the model, as in its config.json.
    """
    entries = entries.float().contiguous()
    _save(folder / ENTRIES, "entries", entries)
    facts = {
        "names": list(names),
        "shape": list(entries.shape),
        "architecture": architecture,
        "sha256": bank_hash(entries, names),
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def export_begun(folder: Path, begun: torch.Tensor) -> None:
    """Write the initial embeddings of a training, completely or not at all. Shape: [C, m, D]."""
    unfinished = folder / f"{BEGUN}.unfinished"
    _save(unfinished, "begun", begun.float().contiguous())
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())  # else a power cut could leave the new name with half a file
    os.replace(unfinished, folder / BEGUN)


def save_similarities(folder: Path, similarities: NDArray[np.float64]) -> None:
    """Write the similarities of the categories, completely or not at all. Shape: [C, C].

    References are drawn by them. A resumed run must draw the same ones, although encoding the images again on a GPU may
    round differently.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{SIMILARITIES}.unfinished"
    with unfinished.open("wb") as file:
        np.save(file, similarities)
    os.replace(unfinished, folder / SIMILARITIES)


def read_similarities(folder: Path) -> NDArray[np.float64] | None:
    """Read what `save_similarities` wrote, or return None if there is no file.

    Raises:
        UserError: It is damaged.
    """
    path = folder / SIMILARITIES
    if not path.is_file():
        return None
    try:
        found: NDArray[np.float64] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {BEGIN_AGAIN}") from error
    return found


def facts(folder: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Read bank.json.

    Args:
        folder: Folder of the bank.
        names: Names of the run's categories; None: any.

    Raises:
        UserError: It is missing or damaged, or of other categories.
    """
    path = folder / FACTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no bank that a run has exported ({FACTS}: {error}); give <run>/model/embeddings of one"
            " that has trained"
        ) from error
    kinds = {"names": list, "shape": list, "architecture": str, "sha256": str}
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path} is damaged: it must hold {', '.join(kinds)}; {AGAIN}")
    if names is not None and content["names"] != list(names):
        known = set(content["names"])
        strange = next((name for name in names if name not in known), None)
        what = f"it has no '{strange}'" if strange else "their number or order differs"
        raise UserError(f"{folder} is a bank of other categories: {what}; train one for this dataset")
    return content


def read(folder: Path, names: Sequence[str]) -> torch.Tensor:
    """Read the embeddings of a bank. Shape: [C, m, D], fp32.

    Raises:
        UserError: It is missing or damaged, or of other categories.
    """
    known = facts(folder, names)
    entries = _load(folder / ENTRIES, "entries", AGAIN)
    if list(entries.shape) != known["shape"] or known["sha256"] != bank_hash(entries, names):
        raise UserError(f"{folder} is damaged: {ENTRIES} does not match its hash in {FACTS}; {AGAIN}")
    return entries


def read_begun(folder: Path) -> torch.Tensor:
    """Read the initial embeddings of a training. Shape: [C, m, D], fp32.

    Raises:
        UserError: They are missing or damaged.
    """
    return _load(folder / BEGUN, "begun", BEGIN_AGAIN)


def known_entries(
    known: Path | None, bank: Path | None, names: Sequence[str], shape: Sequence[int], architecture: str
) -> torch.Tensor | None:
    """Return the bank of an earlier attempt of a run, or the one it starts from (`method.bank`); None without either.

    Args:
        known: Folder of the earlier attempt's bank.
        bank: Folder of the bank to start from.
        names: Names of the categories.
        shape: Shape that the model needs.
        architecture: Architecture of the model.

    Raises:
        UserError: It does not fit.
    """
    if known is not None:
        entries = read_begun(known)
        fix = "model or data have changed since this run began: use another run_name"
        check_fits(known / BEGUN, entries, shape, fix)
        return entries
    if bank is None:
        return None
    with asked_by("method.bank"):
        entries = read(bank, names)
        if (of := facts(bank)["architecture"]) != architecture:
            raise UserError(f"{bank} was made for {of}, not for {architecture}; train another")
        check_fits(bank, entries, shape, "give a bank of this model and dataset")
    return entries


def check_fits(path: Path, entries: torch.Tensor, shape: Sequence[int], fix: str) -> None:
    """Check that embeddings have the expected shape.

    Args:
        path: File that they were read from, for errors.
        entries: Embeddings to check.
        shape: Expected C, m and D.
        fix: Advice in the error.

    Raises:
        UserError: Their shape is another one.
    """
    if list(entries.shape) != list(shape):
        categories, tokens, width = shape
        raise UserError(
            f"{path} holds embeddings of shape {list(entries.shape)} instead of {list(shape)}"
            f" ({counted(categories, 'category')}, {counted(tokens, 'token')} of an image, width {width}); {fix}"
        )


def _save(path: Path, name: str, tensor: torch.Tensor) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor}, path)


def _load(path: Path, name: str, fix: str) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {fix}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); {fix}") from error
    if tensor.ndim != 3 or not tensor.is_floating_point():
        raise UserError(f"{path} is damaged: '{name}' has the shape {list(tensor.shape)}; {fix}")
    return tensor.float()


def bank_hash(entries: torch.Tensor, names: Sequence[str]) -> str:
    """Return the SHA-256 of the names and embeddings of a bank, fp32."""
    digest = hashlib.sha256(json.dumps(list(names)).encode())
    digest.update(entries.flatten().numpy().data)
    return digest.hexdigest()
