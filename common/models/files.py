"""A model as files: finding them, checking them, hashing them. No torch needed.

These checks run before every job, so that a missing file or an over-long prompt costs a second and not a training run.
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
    """A local folder as it is; anything else is a hub id, fetched into the Hugging Face cache.

    Args:
        path: Folder, or `owner/name` on the hub.
        revision: Commit or branch on the hub.
        weights: False fetches everything but the weights, enough for all checks of a prompt.
        key: Of the configuration, for errors.

    Raises:
        UserError: The folder is missing or damaged, or the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return folder.resolve()  # results and adapters name it, and must not depend on where the run was started
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{key}={path} is not a folder; give a model folder or a hub id 'owner/name'")
    from huggingface_hub import snapshot_download

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
    """Id and commit of a model on the hub; None of a local or built one.

    Args:
        path: As it was given to `find`; None: it was built.
        folder: What `find` returned; of the hub, `snapshots/<commit>` in its cache.
    """
    if path is None or Path(path).expanduser().is_dir() or folder.parent.name != "snapshots":
        return None
    return path, folder.name


def check_folder(folder: Path) -> None:
    """Check that the files of a model, or of adapters, are there and whole.

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
    """The whole model that a folder builds on, then the folders of adapters in the order of their training.

    A run with adapters writes only these; where their base lies, stands in their adapter_config.json.

    Args:
        folder: From `find`. A whole model is its own lineage.
        weights: False: a base on the hub is fetched without its weights.

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
    """The safetensors files of a model; empty if there are none."""
    index = folder / WEIGHTS[1]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"model {folder}: {index.name} is damaged; copy or build it again") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"model {folder}: {index.name} names {outside[0]}, which is no file of this folder")
        return [folder / name for name in sorted(names)]
    single = folder / WEIGHTS[0]
    return [single] if single.is_file() else []


def check_links(folder: Path) -> None:
    """Refuse links that lead out of a folder whose files will be copied or sent: they would take others along.

    Raises:
        UserError: Names the first.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link to {path.resolve()}, outside of {folder}; put the file itself there")


def _check_safetensors(path: Path) -> None:
    """The header of a safetensors file says how long the file must be."""
    if not path.is_file():
        raise UserError(f"weights file {path} is missing")
    with path.open("rb") as file:
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
    """SHA-256 over the weights and the tokenizer, adapters and their base alike; part of every result."""
    base, *adapters = lineage(folder)
    total = hashlib.sha256()
    for path in [*weight_files(base), base / "tokenizer.json", *(each / ADAPTERS[1] for each in adapters)]:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    for each in adapters:  # the same matrices count differently with another scale; where the base lies does not matter
        settings = json.loads((each / ADAPTERS[0]).read_text(encoding="utf-8")) | {
            "base_model_name_or_path": None,
            "revision": None,
        }
        total.update(json.dumps(settings, sort_keys=True).encode())
    return total.hexdigest()


def weights_folder(config: Config) -> Path:
    """The folder of the run's model; built or fetched on first use."""
    model = config.model
    if model.path is None:
        assert model.recipe is not None
        return build(model.recipe, config.cache_dir)
    folder = find(model.path, model.revision)
    lineage(folder)  # what adapters build on may be on the hub, too
    return folder


def build(recipe: str, cache_dir: str) -> Path:
    """Run the `build` function of a recipe module, or return its cached result."""
    folder = Path(of_recipe(recipe, "build")(Path(cache_dir).resolve()))
    check_folder(folder)
    return folder


def of_recipe(recipe: str, name: str) -> Callable[..., Any]:
    """A function of a recipe module."""
    try:
        return getattr(import_module(recipe), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"model.recipe={recipe}: {error}; give the dotted path of a module with build and meter, or a model.path"
        ) from error
