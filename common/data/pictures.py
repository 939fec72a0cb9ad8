"""The pictures of a run: each tried once before anything expensive, then decoded and resized side by side."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from common.config.schema import Config
from common.data import duplicates, manifest, notes
from common.data import task as tasks
from common.data.loading import SUFFIX, Loader, attempt, bytes_per_picture, count_treated, examine, report
from common.data.rgb import TRANSPARENT
from common.data.task import TaskData
from common.runtime.disk_cache import DiskCache
from common.runtime.distributed import gather, share_of, world
from common.runtime.progress import say
from common.types import BadImage, Task, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")


def readable(config: Config, data: TaskData | None = None) -> TaskData:
    """As `examined`, and says what was found.

    Raises:
        UserError: Also if a picture is there twice, and `data.duplicates=refuse`.
    """
    data = examined(config, data)
    for line in notes.of_manifest(data.manifest):
        tell(line)
    if copies := data.manifest.get("duplicates"):
        if config.data.duplicates == "refuse":
            raise UserError(
                f"data.duplicates=refuse: {duplicates.worded(copies)}; remove the copies, or go on with"
                " data.duplicates=warn, which lists all of them in manifest.json"
            )
        tell(f"warning: {duplicates.worded(copies)}; manifest.json lists all (data.duplicates=refuse stops here)")
    return data


def examined(config: Config, data: TaskData | None = None) -> TaskData:
    """The task without pictures that cannot be decoded. Every picture is tried once, ranks share them.

    Its manifest also has what the pictures hold, and what was found of them.

    Args:
        config: Of the run.
        data: The whole task, if this process has read it already.

    Raises:
        UserError: There are such pictures, and `data.skip_bad` does not say to leave them out.
    """
    data, bad, treated = data or tasks.build(config), dict[str, str](), dict[str, tuple[str, ...]]()
    tried: set[str] = set()
    while new := [image for image in data.images if image not in tried]:  # others may replace those left out
        tried.update(new)
        parts = gather(examine(make_loader(config, data.task), share_of(new)))
        worse = {image: reason for part in parts for image, reason in part.bad.items()}
        treated |= {image: kinds for part in parts for image, kinds in part.treated.items()}
        if not worse:
            break
        bad |= worse
        if not config.data.skip_bad:
            raise report({image: bad[image] for image in new if image in bad}, len(data.images))
        data = tasks.build(config, bad)
    stamps = _shared(data.task.images.stamp, data.images)
    observed: dict[str, Any] = {
        "unusable": dict(sorted(bad.items())),
        "treated": count_treated(treated, data.images),
        "duplicates": find_duplicates(config, data, stamps),
    }
    if TRANSPARENT in observed["treated"]:
        observed["background"] = config.data.background
    found = {key: value for key, value in observed.items() if value}
    return replace(data, manifest={**manifest.with_contents(data.manifest, stamps), **found})


def check_finished(config: Config, path: Path) -> None:
    """Compare a finished run with the pictures that the same command would train and test on now.

    Args:
        config: Of the run.
        path: Its manifest.

    Raises:
        UserError: There are others, or some hold something else.
    """
    if not path.is_file():
        return
    try:
        data = tasks.build(config, manifest.left_out(path))
    except UserError as error:
        say(f"whether its pictures are still the same cannot be told: {error}")
        return
    stamps = of_each(data.task.images.stamp, data.images)
    manifest.verify_finished(path, manifest.with_contents(data.manifest, stamps))


def find_duplicates(config: Config, data: TaskData, stamps: Mapping[str, str]) -> dict[str, list[list[str]]]:
    """The keys of pictures that the task has twice, by the kinds of `duplicates.WORDS`. Ranks share the work."""
    if config.data.duplicates == "ignore":
        return {}
    same = duplicates.equal(stamps)
    copies = duplicates.troubling(data.task, same)
    near = config.data.near_duplicates
    if len(data.images) <= duplicates.FEW if near is None else near:
        load = make_loader(config, data.task)
        hashes = _shared(lambda image: duplicates.difference_hash(load.load(image)), data.images)
        known = {image: group[0] for group in same for image in group}
        pairs = [pair for pair in duplicates.alike(hashes) if len({known.get(image, image) for image in pair}) > 1]
        copies |= duplicates.troubling(data.task, pairs, "near_")
    return copies


def of_each(work: Callable[[str], T], images: Sequence[str]) -> dict[str, T]:
    """`work` on pictures, side by side; those for which it failed are missing."""
    found = zip(images, attempt(work, images, _workers()), strict=True)
    return {image: value for image, value in found if not isinstance(value, BadImage)}


def _shared(work: Callable[[str], T], images: Sequence[str]) -> dict[str, T]:
    """As `of_each`, shared among the ranks."""
    results = {image: value for part in gather(of_each(work, share_of(list(images)))) for image, value in part.items()}
    return {image: results[image] for image in images if image in results}


def tell(line: str) -> None:
    """A line for who watches the run and for run.log."""
    log.info("%s", line)
    say(line)


def make_loader(config: Config, task: Task) -> Loader:
    """Decodes and resizes pictures, side by side; on disk for later epochs and runs if they fit.

    If not all do, those are kept that training reads again and again.
    """
    size, limit = config.model.image_size, int(config.data.cache_gb * 2**30)
    cache = DiskCache(Path(config.cache_dir).resolve() / "pixels", limit, SUFFIX)
    kept = None
    splits = [task.train, *task.evaluation.values()]
    if sum(len(split.items) for split in splits) * bytes_per_picture(size) > limit:
        read_again = [task.train, *(task.evaluation[name] for name in ("val",) if name in task.evaluation)]
        kept = {item.image for split in read_again for item in split.items}
    return Loader(task.images, size, config.model.resize, cache, _workers(), kept)


def _workers() -> int:
    """Threads of this rank."""
    return max(1, min(8, (os.cpu_count() or 1) // world()))
