"""The pictures of a run: each tried once before anything expensive, then decoded and resized side by side."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from common import task
from common.data.loading import SUFFIX, Loader, bytes_per_picture, examine, report
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
    log.warning("left out %d pictures that cannot be decoded; manifest.json names them", len(bad))
    return task.build(config, bad), sorted(bad)


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
