"""The pictures of a run: each tried once before anything expensive, then decoded and resized side by side."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from common import task
from common.data.loading import SUFFIX, Loader, examine, report
from common.disk_cache import DiskCache
from common.distributed import gather, share_of, world
from common.schema import Config
from common.task import Questions

log = logging.getLogger(__name__)


def readable(config: Config) -> tuple[Questions, list[str]]:
    """The task without pictures that cannot be decoded, and their keys. Every picture is tried once, ranks share them.

    Raises:
        UserError: There are such pictures, and `data.skip_bad` does not say to leave them out.
    """
    questions = task.build(config)
    load = make_loader(config, questions)
    found = examine(load, share_of(questions.images))
    bad = {image: reason for part in gather(list(found.items())) for image, reason in part}
    if not bad:
        return questions, []
    if not config.data.skip_bad:
        raise report(bad, len(questions.images))
    log.warning("left out %d pictures that cannot be decoded: %s", len(bad), bad)
    return task.build(config, bad), sorted(bad)


def make_loader(config: Config, questions: Questions) -> Loader:
    """Decodes and resizes pictures, side by side; decoded ones are kept on disk for later epochs and runs."""
    cache = None
    if config.data.cache_gb > 0:
        folder = Path(config.cache_dir).resolve() / "pixels"
        cache = DiskCache(folder, int(config.data.cache_gb * 2**30), SUFFIX)
    workers = max(1, min(8, (os.cpu_count() or 1) // world()))
    return Loader(questions.task.images, config.model.image_size, config.model.resize, cache, workers)
