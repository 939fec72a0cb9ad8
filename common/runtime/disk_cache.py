"""A folder of byte strings with a bound on its size, shared by processes and threads; what was read longest ago goes
first.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)
RECOUNT = 200  # entries stored between two looks at what other processes stored, more in a folder with many
ABANDONED = 3600  # seconds after which an unfinished file has lost its writer


class DiskCache:
    """Entries by key, each one file.

    Several processes may share the folder; each looks at the others' files every so often, so the bound is kept
    roughly. A folder that cannot be made or written costs a warning: a run does not die of its cache.
    """

    def __init__(self, folder: Path, limit_bytes: int, suffix: str) -> None:
        """
        Args:
            folder: Made if it is not there; files with another suffix are left alone.
            limit_bytes: Bound on the entries' sizes together; 0: nothing is stored.
            suffix: Of the entries' files, with its dot.
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
        """What was stored, or None."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:  # not there, or not to be read: as good as not there
            return None
        with suppress(OSError):  # removed since, or another user's: the content is good all the same
            os.utime(path)
        return content

    def put(self, key: str, content: bytes) -> None:
        """Store an entry, whole or not at all; one above the bound is not stored.

        A full or read-only disk ends storing.
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
        self.puts += 1
        if self.used + size <= self.limit and self.puts < self.recount:
            return
        known = self._entries()
        self.puts, self.recount = 0, max(RECOUNT, len(known) // 10)
        self.used = sum(length for _, length, _ in known)
        if self.used + size <= self.limit:
            return
        for _, length, path in sorted(known):
            if self.used + size <= 0.9 * self.limit:  # a little more than needed, so that this stays rare
                break
            with suppress(OSError):  # another user's, or gone
                path.unlink()
            self.used -= length

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Time of the last reading, bytes and path of every entry."""
        known: list[tuple[float, int, Path]] = []
        try:
            entries = os.scandir(self.folder)
        except OSError:  # not there, or not to be read
            return known
        with entries:
            for entry in entries:
                if entry.name.endswith(self.suffix):
                    with suppress(OSError):  # another process made room at the same time
                        status = entry.stat()
                        known.append((status.st_mtime, status.st_size, Path(entry.path)))
        return known

    def _drop_abandoned(self) -> None:
        for path in self.folder.glob("*.unfinished"):
            with suppress(OSError):  # finished just now, or another user's
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{self.suffix}"
