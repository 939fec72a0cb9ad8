"""The judge's replies on disk: an interrupted or repeated run asks nothing twice.

One file per reply, written whole or not at all, so processes share a folder and may die at any moment.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from common.runtime.disk_cache import DiskCache

log = logging.getLogger(__name__)


class Replies:
    """Replies by judge and prompt. Each file also holds the prompt: a reader can see what was asked."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """`folder`: made if it is not there. `limit_bytes`: 0: nothing is kept."""
        self.cache = DiskCache(folder, limit_bytes, ".json")

    @staticmethod
    def key(judge: str, prompt: str) -> str:
        """SHA-256 of both; a judge's name holds no NUL, so no two pairs share a text."""
        return hashlib.sha256(f"{judge}\0{prompt}".encode()).hexdigest()

    def get(self, judge: str, prompt: str) -> str | None:
        """What this judge replied to this prompt, or None."""
        key = self.key(judge, prompt)
        content = self.cache.get(key)
        if content is None:
            return None
        try:
            entry = json.loads(content)
            if (entry["judge"], entry["prompt"]) == (judge, prompt):
                return str(entry["reply"])
        except (ValueError, KeyError, TypeError):
            log.warning("the reply %s is damaged and asked for anew", key)
        return None

    def put(self, judge: str, prompt: str, reply: str) -> None:
        """Keep a reply."""
        entry = {"judge": judge, "prompt": prompt, "reply": reply}
        self.cache.put(self.key(judge, prompt), json.dumps(entry, ensure_ascii=False).encode())
