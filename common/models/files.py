"""Find, check and hash the files of a model. Needs no torch.

The checks run before every job, so that a missing or damaged file is reported within a second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from common.config.schema import Config
from common.types import UserError

NEEDED = ("config.json", "tokenizer.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")  # as PEFT writes them


def find(path: str, revision: str | None, weights: bool = True, key: str = "model.path") -> Path:
    """Return the folder of a model; one on the hub is downloaded into the Hugging Face cache.

    Args:
        path: Folder, or `owner/name` on the hub.
        revision: Commit or branch on the hub.
        weights: False: download everything but the weights, which suffices to check prompts.
        key: Key of the configuration, for errors.

    Raises:
        UserError: The folder is missing or damaged, or the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return folder.resolve()  # absolute, because results and adapters record it
    # a hub id has exactly one slash and begins with a name
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{key}={path} is not a folder; give a model folder or a hub id 'owner/name'")
    from huggingface_hub import snapshot_download

    # no *.bin: pickled weights could run code
    names = ["*.json", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=names))
    except Exception as error:
        raise UserError(
            f"{key}={path} is neither a local folder nor reachable on the hub ({type(error).__name__}); download"
            f" it where there is a network (hf download {path}; if it is gated, hf auth login first) and pass"
            f" {key}=<folder>"
        ) from error


def on_hub(path: str | None, folder: Path) -> tuple[str, str] | None:
    """Return id and commit of a model from the hub; None for a local folder or a recipe's model.

    Args:
        path: Argument of `find`; None: built by a recipe.
        folder: Result of `find`; for the hub it is `snapshots/<commit>` in the cache.
    """
    if path is None or Path(path).expanduser().is_dir() or folder.parent.name != "snapshots":
        return None
    return path, folder.name


def check_folder(folder: Path) -> None:
    """Check that the files of a model, or of adapters, exist and are complete.

    Raises:
        UserError: Names the file at fault.
    """
    adapters = (folder / ADAPTERS[0]).is_file()
    for name in ADAPTERS[:1] if adapters else NEEDED:
        if not (folder / name).is_file():
            raise UserError(f"model {folder} has no {name}; it must be a folder written by save_pretrained")
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"model {folder}: {name} is damaged ({error}); copy or build it again") from error
    shards = [folder / ADAPTERS[1]] if adapters else weight_files(folder)
    if not shards:
        raise UserError(f"model {folder} has none of {', '.join(WEIGHTS)}")
    for shard in shards:
        _check_safetensors(shard)


def lineage(folder: Path, weights: bool = True) -> list[Path]:
    """Return the folder of the base model, then the folders of adapters in the order of their training.

    A run that trains adapters saves only these; their adapter_config.json names their base.

    Args:
        folder: Folder from `find`. A whole model is returned alone.
        weights: False: download a base on the hub without its weights.

    Raises:
        UserError: A base is missing or damaged.
    """
    path = folder / ADAPTERS[0]
    if not path.is_file():
        return [folder]
    settings = json.loads(path.read_text(encoding="utf-8"))
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str):
        raise UserError(f"{path} does not say on which model the adapters belong (base_model_name_or_path)")
    try:
        return [*lineage(find(base, revision, weights), weights), folder]
    except UserError as error:
        raise UserError(
            f"model {folder} holds adapters for {base}, which cannot be used ({error}); put that model there"
            f" or correct base_model_name_or_path in {path.name}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model; empty if there are none."""
    index = folder / WEIGHTS[1]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"model {folder}: {index.name} is damaged; copy or build it again") from error
        # a path such as ../x would read, hash and copy files outside of the folder
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"model {folder}: {index.name} names {outside[0]}, which is no file of this folder")
        return [folder / name for name in sorted(names)]
    single = folder / WEIGHTS[0]
    return [single] if single.is_file() else []


def check_links(folder: Path) -> None:
    """Refuse links out of a folder whose files will be copied or uploaded: they would include other files.

    Raises:
        UserError: Names the first link.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link to {path.resolve()}, outside of {folder}; put the file itself there")


def _check_safetensors(path: Path) -> None:
    """Check that a safetensors file has the length that follows from its header, so a cut-off copy is found."""
    if not path.is_file():
        raise UserError(f"weights file {path} is missing")
    with path.open("rb") as file:
        # format: 8 bytes with the size of the header, the header as JSON, then the tensors
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size) if size < 100_000_000 else b"")
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
            raise UserError(f"weights file {path} is damaged: no safetensors header; copy or build it again") from error
    expected = 8 + size + max(ends, default=1)
    if path.stat().st_size != expected:
        raise UserError(
            f"weights file {path} is damaged: {path.stat().st_size} bytes instead of {expected}; copy or build it again"
        )


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of weights and tokenizer, of adapters and their base; it is part of every result."""
    base, *adapters = lineage(folder)
    total = hashlib.sha256()
    for path in [*weight_files(base), base / "tokenizer.json", *(each / ADAPTERS[1] for each in adapters)]:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    # settings such as lora_alpha change the model; the path of the base does not
    for each in adapters:
        settings = json.loads((each / ADAPTERS[0]).read_text(encoding="utf-8")) | {
            "base_model_name_or_path": None,
            "revision": None,
        }
        total.update(json.dumps(settings, sort_keys=True).encode())
    return total.hexdigest()


def weights_folder(config: Config) -> Path:
    """Return the folder of the run's model; it is built or downloaded on first use."""
    model = config.model
    if model.path is None:
        assert model.recipe is not None
        return build(model.recipe, config.cache_dir)
    folder = find(model.path, model.revision)
    lineage(folder)  # downloads the base of adapters if that is on the hub
    return folder


def build(recipe: str, cache_dir: str) -> Path:
    """Run the `build` function of a recipe module, or return its cached result."""
    folder = Path(of_recipe(recipe, "build")(Path(cache_dir).resolve()))
    check_folder(folder)
    return folder


def of_recipe(recipe: str, name: str) -> Callable[..., Any]:
    """Return a function of a recipe module."""
    try:
        return getattr(import_module(recipe), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"model.recipe={recipe}: {error}; give the dotted path of a module with build and meter, or a model.path"
        ) from error
