"""Freeze what a run is about with hashes: its images and labels (manifest.json) and its prompts (prompts.json)."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.counted import agree, counted
from common.data.duplicates import WORDS
from common.data.listing import litter_worded
from common.runtime.distributed import barrier, rank
from common.types import Task, UserError

# The manifest: the images and labels of a run. Evaluation refuses a task that does not match it.


# Keys about how the data was read on this machine and day. They may change without changing the task, so the hash does
# not cover them.
OBSERVED = ("passed_over", "notes", "duplicates", "unusable", "treated", "background")
DIGITS = 16  # hexadecimal digits kept of an image's content hash


def build(task: Task, header: dict[str, Any], observed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return everything that defines the task, JSON-ready; `hash` covers all other keys except those in OBSERVED."""
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
    """Return the part of a manifest that its hash covers."""
    covered = {key: value for key, value in manifest.items() if key not in ("hash", *OBSERVED)}
    splits = {name: {**split, "rows": [row[:2] for row in split["rows"]]} for name, split in covered["splits"].items()}
    return {**covered, "splits": splits}


def with_contents(manifest: Mapping[str, Any], stamps: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest with a hash of each image's content as third value of its row; `hash` does not cover it.

    Args:
        manifest: The result of `build`.
        stamps: Stamp of each image (see `Images.stamp`); images without one get null.
    """
    contents = {image: hashlib.sha256(stamp.encode()).hexdigest()[:DIGITS] for image, stamp in stamps.items()}
    splits = {
        name: {**split, "rows": [[*row[:2], contents.get(row[0])] for row in split["rows"]]}
        for name, split in manifest["splits"].items()
    }
    return {**manifest, "splits": splits}


def changed(frozen: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Return the images of both manifests whose content differs."""
    before, now = (
        {row[0]: row[2] for split in each["splits"].values() for row in split["rows"] if len(row) > 2}
        for each in (frozen, manifest)
    )
    return [image for image, content in now.items() if before.get(image, content) != content]


def digest(content: object) -> str:
    """Return the SHA-256 of canonical JSON, which is the same on every machine and Python version."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def text(manifest: dict[str, Any]) -> str:
    """Return JSON with one image per line, so that two manifests can be compared with diff."""
    head = {key: value for key, value in manifest.items() if key != "splits"}
    lines = [json.dumps(head)[:-1] + ', "splits": {']
    for number, (name, split) in enumerate(manifest["splits"].items()):
        facts = {key: value for key, value in split.items() if key != "rows"}
        lines.append(f'{"," if number else ""}{json.dumps(name)}: {json.dumps(facts)[:-1]}, "rows": [')
        lines.append(",\n".join(json.dumps(row) for row in split["rows"]))
        lines.append("]}")
    return "\n".join([*lines, "}}"]) + "\n"


def write(manifest: dict[str, Any], path: Path) -> None:
    """Write the file atomically."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text(manifest), encoding="utf-8")
    os.replace(unfinished, path)


def is_one(path: Path) -> bool:
    """Tell whether a file is a manifest."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"hash", "splits", "fingerprint"} <= found.keys()


def left_out(path: Path) -> list[str]:
    """Return the images that a run left out because they could not be used."""
    return list(json.loads(path.read_text(encoding="utf-8"))["left_out"])


def verify(path: Path, manifest: dict[str, Any]) -> None:
    """Compare the run's manifest with the task that is about to be evaluated.

    Raises:
        UserError: They differ; names the first differing split, the images whose content has changed, or the file if
            it was edited.
    """
    frozen = json.loads(path.read_text(encoding="utf-8"))
    if frozen["hash"] != digest(defining(frozen)):
        raise UserError(f"{path} was changed after the run began: its content does not match its hash")
    # content first: the hash covers keys and labels only, so it can match although the files have changed
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
        UserError: Other images would be used, or the content of some has changed.
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
    """Return a text with the number of images out of those of the task, and the first of them."""
    total = len({row[0] for split in manifest["splits"].values() for row in split["rows"]})
    return (
        f"{len(images):,} of {counted(total, 'picture')} (first: {images[0]}) {'has' if len(images) == 1 else 'have'}"
    )


def trained_images(model: Path, data: str, fingerprint: str) -> frozenset[str]:
    """Return the images that the weights in a folder were trained on, by the manifest of the run that wrote them.

    Args:
        model: `<run>/model`, or that of one of its checkpoints. Weights from elsewhere have no manifest: none is known.
        data: Name of the dataset; images of other datasets are left out.
        fingerprint: Fingerprint of the dataset. A run on several datasets has a joint one, which is not compared.
    """
    for folder in model.absolute().parents[:3] if model.is_dir() else ():
        path = folder / "manifest.json"
        if not path.is_file() or not (folder / "config.yaml").is_file():
            continue
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["data"] == data and (manifest["fingerprint"] == fingerprint or len(manifest["origins"]) > 1):
            return frozenset(row[0] for row in manifest["splits"]["train"]["rows"])
    return frozenset()


# Lines about the data for results: what was passed over, left out, replaced, and present twice. No torch.

SHOWN = 10  # bad images that are named


def passed_over(facts: Mapping[str, Any]) -> list[str]:
    """Return a line about files and folders that were passed over, from a manifest or a result; none without any.

    >>> passed_over({"passed_over": {"litter": 2, "unknown suffix": 1}})
    ['passed over in the folders of the data: 2 litter, 1 unknown suffix']
    """
    reasons = facts.get("passed_over")
    return [f"passed over in the folders of the data: {litter_worded(reasons)}"] if reasons else []


def unusable(bad: Mapping[str, str]) -> str:
    """Return a text on images that cannot be used, with reasons; of many, the first ones and the commonest reasons."""
    shown = ", ".join(f"{image} ({reason})" for image, reason in list(bad.items())[:SHOWN])
    if len(bad) <= SHOWN:
        return shown
    reasons = Counter(bad.values()).most_common(3)
    return f"{shown} and {len(bad) - SHOWN:,} more (of all: {', '.join(f'{n:,} {reason}' for reason, n in reasons)})"


def treated(counts: Mapping[str, int], background: str) -> list[str]:
    """Return a line for each kind of images that are not shown as they are stored (see `images.to_rgb`).

    >>> treated({"transparent": 1, "stretched": 2}, "white")  # doctest: +NORMALIZE_WHITESPACE
    ['transparent parts of 1 picture are shown on white (data.background)',
     '16-bit levels of 2 pictures use a part of their range, and are stretched to the whole']
    """
    said = {
        "transparent": f"transparent parts of {{}} are shown on {background} (data.background)",
        "stretched": "16-bit levels of {} use a part of their range, and are stretched to the whole",
    }
    return [said[kind].format(_pictures(n)) for kind, n in counts.items()]


def _pictures(count: int) -> str:
    return f"{count:,} picture{'s' * (count != 1)}"


def notes_of(facts: Mapping[str, Any]) -> list[str]:
    """Return the lines of a manifest on how the data was read; duplicates are reported elsewhere."""
    bad = facts.get("unusable", {})
    left_out = f"left out {_pictures(len(bad))} that cannot be used: {unusable(bad)}; manifest.json names all"
    return [
        *([left_out] if bad else []),
        *passed_over(facts),
        *facts.get("notes", []),
        *treated(facts.get("treated", {}), facts.get("background", "")),
    ]


def data_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return all lines about the data for readers of a result; results of older runs lack some entries."""
    lines = passed_over(facts)
    if replaced := sum(facts.get("refilled", {}).values()):
        many, were = counted(replaced, "training picture"), agree(replaced, "was", "were")
        others = agree(replaced, "another of its class, since it", "others of their class, since they")
        lines.append(f"{many} {were} replaced by {others} cannot be decoded")
    for kind, count in facts.get("duplicates", {}).items():
        lines.append(f"{WORDS[kind]}: {count} (manifest.json lists them)")
    return lines


# prompts.json in a run folder: hashes of the prompts, and of the files that determine them.
#
# It is written when the final prompts are known (if they depend on the model, only after it has seen the images), and
# compared when a run is resumed.

PROMPTS_FILE = "prompts.json"
PROMPTS_AGAIN = "put that one back or use another run folder"


def freeze_prompts(folder: Path, prompts: Mapping[str, str], sources: Mapping[str, str]) -> None:
    """Write the hashes, or check that an earlier attempt had the same. All ranks call it together.

    Args:
        folder: Run folder.
        prompts: Hash of every split's prompts, by the split's name.
        sources: Hash of every file that determines them, by its configuration key.

    Raises:
        UserError: A hash differs from the frozen one.
    """
    path = folder / PROMPTS_FILE
    if rank() == 0 and not path.is_file():
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"prompts": prompts, "sources": sources}, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    barrier()
    check_sources(folder, sources)
    before = _read_prompts(path)["prompts"]
    if changed := [split for split, found in prompts.items() if before.get(split) != found]:
        raise UserError(
            f"{path} froze other prompts for split '{changed[0]}' than this configuration and this model ask now; use"
            " another run folder"
        )


def check_sources(folder: Path, sources: Mapping[str, str]) -> None:
    """Check before anything is loaded that the files that determine the prompts are those of an earlier attempt.

    Raises:
        UserError: A file has changed.
    """
    path = folder / PROMPTS_FILE
    if not path.is_file():
        return
    before = _read_prompts(path)["sources"]
    for key, found in sources.items():
        if before.get(key) != found:
            raise UserError(f"{key}: the file is not the one that {path} froze; {PROMPTS_AGAIN}")


def _read_prompts(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
