"""The manifest of a run: which images, which labels, which questions, frozen with hashes.

"What exactly was the split?" is answered by this file alone, and evaluation refuses a task that does not match it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.types import Prompt, Task, UserError

# How the data was read, on this machine and day. It may change without changing the task, so no hash covers it.
OBSERVED = ("passed_over", "notes", "duplicates")


def build(
    task: Task,
    train: Sequence[Prompt],
    evaluation: dict[str, list[Prompt]],
    header: dict[str, Any],
    observed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that defines the task, as JSON-ready values; `hash` covers all the rest but what was OBSERVED."""
    splits = {"train": (task.train, train)} | {name: (task.evaluation[name], evaluation[name]) for name in evaluation}
    content: dict[str, Any] = {**header, "splits": {}}
    for name, (split, prompts) in splits.items():
        rows = [[item.image, item.label] for item in split.items]
        content["splits"][name] = {
            "n": len(rows),
            "names": list(split.names),
            "items_sha256": digest(rows),
            "prompts_sha256": digest([[prompt.system, prompt.text] for prompt in prompts]),
            "rows": rows,
        }
        if split.aliases:
            content["splits"][name]["aliases_sha256"] = digest(split.aliases)
    return {"hash": digest(content), **(observed or {}), **content}


def defining(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the hash of a manifest covers."""
    return {key: value for key, value in manifest.items() if key not in ("hash", *OBSERVED)}


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


def verify(path: Path, manifest: dict[str, Any]) -> None:
    """Compare the run's manifest with the task that is about to be evaluated.

    Raises:
        UserError: They differ; names the first differing source or split, or the file if it was edited.
    """
    frozen = json.loads(path.read_text(encoding="utf-8"))
    if frozen["hash"] != digest(defining(frozen)):
        raise UserError(f"{path} was changed after the run began: its content does not match its hash")
    if frozen["hash"] == manifest["hash"]:
        return
    for key, digest_now in manifest.get("sources", {}).items():
        if frozen.get("sources", {}).get(key) != digest_now:
            raise UserError(
                f"{key}: the file is not the one that {path} froze; put that one back or use another run folder"
            )
    for name, split in manifest["splits"].items():
        before = frozen["splits"].get(name, {})
        for key in ("items_sha256", "prompts_sha256"):
            if before.get(key) != split[key]:
                raise UserError(f"{path} froze another task: {key} of split '{name}' differs; use another run folder")
    raise UserError(f"{path} froze another task; use another run folder")


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
            return frozenset(image for image, _ in manifest["splits"]["train"]["rows"])
    return frozenset()
