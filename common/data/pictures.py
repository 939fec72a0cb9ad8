"""The pictures of a run: each tried once before anything expensive, then decoded and resized side by side."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from common.config.schema import Config
from common.counted import counted
from common.data import duplicates, notes, task
from common.data.loading import SUFFIX, Loader, bytes_per_picture, examine, report
from common.data.task import Questions
from common.runtime.disk_cache import DiskCache
from common.runtime.distributed import gather, share_of, world
from common.runtime.progress import say
from common.types import BadImage, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")


def readable(config: Config, questions: Questions | None = None) -> Questions:
    """The task without pictures that cannot be decoded. Every picture is tried once, ranks share them.

    Args:
        config: Of the run.
        questions: The whole task, if this process has read it already.

    Raises:
        UserError: There are such pictures, and `data.skip_bad` does not say to leave them out; or a picture is there
            twice, and `data.duplicates=refuse`.
    """
    questions, bad = questions or task.build(config), dict[str, str]()
    tried: set[str] = set()
    while new := [image for image in questions.images if image not in tried]:  # others may replace those left out
        tried.update(new)
        parts = gather(examine(make_loader(config, questions), share_of(new)))
        if not any(parts):
            break
        bad |= {image: reason for part in parts for image, reason in part.items()}
        if not config.data.skip_bad:
            raise report(bad, len(questions.images))
        questions = task.build(config, bad)
    if bad:
        tell(f"left out {counted(len(bad), 'picture')} that cannot be decoded; manifest.json names them")
    for line in (*notes.passed_over(questions.manifest), *questions.manifest.get("notes", [])):
        tell(line)
    return _without_surprise(config, questions)


def _without_surprise(config: Config, questions: Questions) -> Questions:
    """The questions, whose manifest says which pictures are there twice.

    Raises:
        UserError: There are such pictures, and `data.duplicates=refuse`.
    """
    copies = find_duplicates(config, questions)
    if not copies:
        return questions
    if config.data.duplicates == "refuse":
        raise UserError(
            f"data.duplicates=refuse: {duplicates.worded(copies)}; remove the copies, or go on with"
            " data.duplicates=warn, which lists all of them in manifest.json"
        )
    tell(f"warning: {duplicates.worded(copies)}; manifest.json lists all (data.duplicates=refuse stops here)")
    return replace(questions, manifest={**questions.manifest, "duplicates": copies})


def find_duplicates(config: Config, questions: Questions) -> dict[str, list[list[str]]]:
    """The keys of pictures that the task has twice, by the kinds of `duplicates.WORDS`. Ranks share the work."""
    if config.data.duplicates == "ignore":
        return {}
    load = make_loader(config, questions)
    apply = partial(_on_all, load)
    same = duplicates.identical(questions.task.images, questions.images, apply)
    copies = duplicates.troubling(questions.task, same)
    if config.data.near_duplicates:
        hashes = apply(lambda image: duplicates.difference_hash(load.load(image)), questions.images)
        known = {image: group[0] for group in same for image in group}
        pairs = [pair for pair in duplicates.alike(hashes) if len({known.get(image, image) for image in pair}) > 1]
        copies |= duplicates.troubling(questions.task, pairs, "near_")
    return copies


def _on_all(load: Loader, work: Callable[[str], T], images: Sequence[str]) -> dict[str, T]:
    """`work` on every picture, in the order of the keys; those for which it failed are missing. Ranks share them."""
    mine = share_of(list(images))
    done = zip(mine, load.attempt(work, mine), strict=True)
    parts = gather({image: value for image, value in done if not isinstance(value, BadImage)})
    results = {image: value for part in parts for image, value in part.items()}
    return {image: results[image] for image in images if image in results}


def tell(line: str) -> None:
    """A line for who watches the run and for run.log."""
    log.info("%s", line)
    say(line)


def make_loader(config: Config, questions: Questions) -> Loader:
    """Decodes and resizes pictures, side by side; on disk for later epochs and runs if they fit.

    If not all do, those are kept that training reads again and again.
    """
    size, limit = config.model.image_size, int(config.data.cache_gb * 2**30)
    cache = DiskCache(Path(config.cache_dir).resolve() / "pixels", limit, SUFFIX)
    workers = max(1, min(8, (os.cpu_count() or 1) // world()))
    kept = None
    if len(questions.images) * bytes_per_picture(size) > limit:
        kept = {
            prompt.image for prompts in (questions.train, questions.evaluation.get("val", [])) for prompt in prompts
        }
    return Loader(questions.task.images, size, config.model.resize, cache, workers, kept)
