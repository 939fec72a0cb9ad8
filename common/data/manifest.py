"""The manifest of a run: which images, which labels, which questions, frozen with hashes.

"What exactly was the split?" is answered by this file alone, and evaluation refuses a task that does not match it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.types import Prompt, Task, UserError


def build(
    task: Task, train: Sequence[Prompt], evaluation: dict[str, list[Prompt]], header: dict[str, Any]
) -> dict[str, Any]:
    """Everything that defines the task, as JSON-ready values; `hash` covers all the rest."""
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
    return {"hash": digest(content), **content}


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
    unfinished.write_text(text(manifest))
    os.replace(unfinished, path)


def verify(path: Path, manifest: dict[str, Any]) -> None:
    """Compare the run's manifest with the task that is about to be evaluated.

    Raises:
        UserError: They differ; names the first differing source or split, or the file if it was edited.
    """
    frozen = json.loads(path.read_text())
    body = {key: value for key, value in frozen.items() if key != "hash"}
    if frozen["hash"] != digest(body):
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
