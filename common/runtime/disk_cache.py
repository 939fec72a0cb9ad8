"""Cache byte strings in a folder of limited size, shared by processes and threads; least recently read go first."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)
RECOUNT = 200  # entries stored before the folder is listed again for those of other processes; more in a full folder
ABANDONED = 3600  # seconds after which an unfinished file is taken for the rest of a killed process


class DiskCache:
    """Cache of entries by key, each one file.

    Several processes may share the folder; each counts the others' files only now and then, so the limit is kept
    roughly. If the folder cannot be created or written, only a warning is logged: the run continues without the
    cache.
    """

    def __init__(self, folder: Path, limit_bytes: int, suffix: str) -> None:
        """
        Args:
            folder: Folder of the cache, created if missing; files with another suffix are left alone.
            limit_bytes: Limit of the total size; 0: nothing is stored.
            suffix: Suffix of the files, with its dot.
        """
        self.folder, self.limit, self.suffix = folder, limit_bytes, suffix
        self.lock = threading.Lock()
        self.puts, self.recount, self.writable = 0, RECOUNT, True
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)
        self._drop_abandoned()
        self.used = sum(size for _, size, _ in self._entries())

    def get(self, key: str) -> bytes | None:
        """Return a stored entry, or None."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:  # missing or not readable: a cache miss either way
            return None
        with suppress(OSError):  # evicted meanwhile, or another user's file: the content is good nevertheless
            os.utime(path)
        return content

    def put(self, key: str, content: bytes) -> None:
        """Store an entry atomically, unless it is larger than the limit.

        After an error, such as a full or read-only disk, nothing more is stored.
        """
        if len(content) > self.limit or not self.writable:
            return
        with self.lock:
            self._make_room(len(content))
            self.used += len(content)
        unfinished = self.folder / f"{key}.{secrets.token_hex(8)}.unfinished"
        try:
            unfinished.write_bytes(content)
            os.replace(unfinished, self._path(key))
        except OSError as error:
            self._give_up(error)
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        self.writable = False
        log.warning("nothing more is stored in %s: %s (cache_dir)", self.folder, error.strerror)

    def _make_room(self, size: int) -> None:
        # count again now and then: other processes store and evict, too
        self.puts += 1
        if self.used + size <= self.limit and self.puts < self.recount:
            return
        known = self._entries()
        self.puts, self.recount = 0, max(RECOUNT, len(known) // 10)
        self.used = sum(length for _, length, _ in known)
        if self.used + size <= self.limit:
            return
        for _, length, path in sorted(known):
            if self.used + size <= 0.9 * self.limit:  # a little more than needed, so that this is rare
                break
            with suppress(OSError):  # another user's file, or gone
                path.unlink()
            self.used -= length

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Return time of the last reading, size in bytes and path of every entry."""
        known: list[tuple[float, int, Path]] = []
        try:
            entries = os.scandir(self.folder)
        except OSError:  # missing or not readable
            return known
        with entries:
            for entry in entries:
                if entry.name.endswith(self.suffix):
                    with suppress(OSError):  # another process has evicted it
                        status = entry.stat()
                        known.append((status.st_mtime, status.st_size, Path(entry.path)))
        return known

    def _drop_abandoned(self) -> None:
        for path in self.folder.glob("*.unfinished"):
            with suppress(OSError):  # just renamed, or another user's
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{self.suffix}"
