"""The manifest of a run: which images and which labels, frozen with hashes.

"What exactly was the split?" is answered by this file alone, and evaluation refuses a task that does not match it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.counted import counted
from common.types import Task, UserError

# How the data was read, on this machine and day. It may change without changing the task, so no hash covers it.
OBSERVED = ("passed_over", "notes", "duplicates", "unusable", "treated", "background")
DIGITS = 16  # of the hash of a picture's content


def build(task: Task, header: dict[str, Any], observed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that defines the task, as JSON-ready values; `hash` covers all the rest but what was OBSERVED."""
    content: dict[str, Any] = {**header, "splits": {}}
    for name, split in {"train": task.train, **task.evaluation}.items():
        rows = [[item.image, item.label] for item in split.items]
        content["splits"][name] = {
            "n": len(rows),
            "names": list(split.names),
            "items_sha256": digest(rows),
            "rows": rows,
        }
        if split.aliases:
            content["splits"][name]["aliases_sha256"] = digest(split.aliases)
    return {"hash": digest(content), **(observed or {}), **content}


def defining(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the hash of a manifest covers."""
    covered = {key: value for key, value in manifest.items() if key not in ("hash", *OBSERVED)}
    splits = {name: {**split, "rows": [row[:2] for row in split["rows"]]} for name, split in covered["splits"].items()}
    return {**covered, "splits": splits}


def with_contents(manifest: Mapping[str, Any], stamps: Mapping[str, str]) -> dict[str, Any]:
    """The manifest whose rows also say what the pictures hold, as a third value; the hash does not cover it.

    Args:
        manifest: As `build` made it.
        stamps: By image, see `Images.stamp`; images without one get none.
    """
    contents = {image: hashlib.sha256(stamp.encode()).hexdigest()[:DIGITS] for image, stamp in stamps.items()}
    splits = {
        name: {**split, "rows": [[*row[:2], contents.get(row[0])] for row in split["rows"]]}
        for name, split in manifest["splits"].items()
    }
    return {**manifest, "splits": splits}


def changed(frozen: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Images of both that hold something else now than they did."""
    before, now = (
        {row[0]: row[2] for split in each["splits"].values() for row in split["rows"] if len(row) > 2}
        for each in (frozen, manifest)
    )
    return [image for image, content in now.items() if before.get(image, content) != content]


def digest(content: object) -> str:
    """SHA-256 of canonical JSON; the same on every machine and Python version."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def text(manifest: dict[str, Any]) -> str:
    """JSON with one image per line, so that two manifests can be compared with diff."""
    head = {key: value for key, value in manifest.items() if key != "splits"}
    lines = [json.dumps(head)[:-1] + ', "splits": {']
    for number, (name, split) in enumerate(manifest["splits"].items()):
        facts = {key: value for key, value in split.items() if key != "rows"}
        lines.append(f'{"," if number else ""}{json.dumps(name)}: {json.dumps(facts)[:-1]}, "rows": [')
        lines.append(",\n".join(json.dumps(row) for row in split["rows"]))
        lines.append("]}")
    return "\n".join([*lines, "}}"]) + "\n"


def write(manifest: dict[str, Any], path: Path) -> None:
    """Write the file, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text(manifest), encoding="utf-8")
    os.replace(unfinished, path)


def is_one(path: Path) -> bool:
    """Whether a file is a manifest."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"hash", "splits", "fingerprint"} <= found.keys()


def left_out(path: Path) -> list[str]:
    """The images that a run left out, since they could not be used."""
    return list(json.loads(path.read_text(encoding="utf-8"))["left_out"])


def verify(path: Path, manifest: dict[str, Any]) -> None:
    """Compare the run's manifest with the task that is about to be evaluated.

    Raises:
        UserError: They differ; names the first differing split, the pictures that hold something else now, or
            the file if it was edited.
    """
    frozen = json.loads(path.read_text(encoding="utf-8"))
    if frozen["hash"] != digest(defining(frozen)):
        raise UserError(f"{path} was changed after the run began: its content does not match its hash")
    if others := changed(frozen, manifest):
        raise UserError(
            f"{_some(others, manifest)} changed since {path} was written; put the old ones back, or begin anew with"
            " run_name=<name>"
        )
    if frozen["hash"] == manifest["hash"]:
        return
    for name, split in manifest["splits"].items():
        before = frozen["splits"].get(name, {})
        if before.get("items_sha256") != split["items_sha256"]:
            raise UserError(f"{path} froze another task: the images of split '{name}' differ; use another run folder")
    raise UserError(f"{path} froze another task; use another run folder")


def verify_finished(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the manifest of a finished run with the images that the same command would train and test on now.

    Raises:
        UserError: There are others, or some hold something else.
    """
    frozen = json.loads(path.read_text(encoding="utf-8"))
    again = f"; {path.parent} keeps the result of the old ones, begin anew with run_name=<name>"
    if others := changed(frozen, manifest):
        raise UserError(f"the run is finished, but {_some(others, manifest)} changed since{again}")
    for name in dict.fromkeys([*manifest["splits"], *frozen["splits"]]):
        parts = (each["splits"].get(name, {"rows": []}) for each in (frozen, manifest))
        old, new = ([tuple(row[:2]) for row in part["rows"]] for part in parts)
        if old != new:
            first = min({*old} ^ {*new}, default=(*old, *new)[0])[0]
            raise UserError(f"the run is finished, but '{name}' has other images or labels now, first: {first}{again}")


def _some(images: Sequence[str], manifest: Mapping[str, Any]) -> str:
    """How many images of a task, and which is the first."""
    total = len({row[0] for split in manifest["splits"].values() for row in split["rows"]})
    return (
        f"{len(images):,} of {counted(total, 'picture')} (first: {images[0]}) {'has' if len(images) == 1 else 'have'}"
    )


def trained_images(model: Path, data: str, fingerprint: str) -> frozenset[str]:
    """The images that the weights in a folder were trained on, by the manifest of the run that wrote them.

    Args:
        model: `<run>/model`, or that of a checkpoint of it. Weights from elsewhere have no manifest: none are known.
        data: The dataset that is asked about; images of other ones do not count.
        fingerprint: Of its content. A run on several datasets has one of all together, which is not compared.
    """
    for folder in model.absolute().parents[:3] if model.is_dir() else ():
        path = folder / "manifest.json"
        if not path.is_file() or not (folder / "config.yaml").is_file():
            continue
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["data"] == data and (manifest["fingerprint"] == fingerprint or len(manifest["origins"]) > 1):
            return frozenset(row[0] for row in manifest["splits"]["train"]["rows"])
    return frozenset()
