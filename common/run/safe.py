"""Work that may fail without harm once a result is written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def best_effort(who: str) -> Iterator[None]:
    """Log exceptions instead of raising them: the result is already saved."""
    try:
        yield
    except Exception as error:  # of whatever kind: a mirror's or a drawing's library decides
        log.warning("%s failed (%s: %s); the run folder is whole", who, type(error).__name__, error)
