"""Hash files with SHA-256: read each once, and again only when the file system says that it may have changed.

Size and modification time are not enough: rsync, unzip and `cp -p` keep the times of what they copy, and uncompressed
images of one shape have one size. So the time of change (ctime) is compared too, which no program can set.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)
FILE = "contents.txt"  # in the cache folder; a line per file: `<hash of path and facts> <SHA-256 of its content>`
LINE = re.compile("([0-9a-f]{32}) ([0-9a-f]{64})")
SETTLED = 2 * 10**9  # nanoseconds; within this time a file may change again without getting another ctime


class Contents:
    """Cache of content hashes. Threads and processes may share it."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where the hashes are kept for other processes; None: in memory only."""
        self.cache = folder or cache_folder()
        self.file = None if folder is None else folder / FILE
        self.known: dict[str, str] | None = None
        self.lock = threading.Lock()

    def of(self, path: Path) -> str:
        """Return the SHA-256 of a file, in hexadecimal.

        Raises:
            OSError: The file cannot be read.
        """
        name, changed = facts(path)
        return self.keep(name, changed, lambda: _sha256(path))

    def keep(self, name: str, changed: int, compute: Callable[[], str]) -> str:
        """Return the hash cached under a name; compute and cache it if there is none.

        Args:
            name: A text that differs whenever `compute` may return something else.
            changed: When the hashed data changed last, in nanoseconds. If that is too recent, nothing is cached.
            compute: Function that returns the SHA-256 in hexadecimal.
        """
        key = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        known = self._read().get(key)
        if known is not None:
            return known
        settled = time.time_ns() - changed > SETTLED  # before computing: the file may change meanwhile
        digest = compute()
        if settled:
            self._write(key, digest)
        return digest

    def _read(self) -> dict[str, str]:
        with self.lock:
            if self.known is None:
                self.known = {}
                try:
                    if self.file is not None and self.file.is_file():
                        with self.file.open(encoding="ascii", errors="replace") as lines:
                            found = (LINE.fullmatch(line.rstrip("\n")) for line in lines)
                            self.known = {match[1]: match[2] for match in found if match}
                except OSError as error:
                    self._give_up(error)
            return self.known

    def _write(self, key: str, digest: str) -> None:
        with self.lock:
            assert self.known is not None
            self.known[key] = digest
            if self.file is None:
                return
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                # one unbuffered append, so that lines of several processes do not mix; the line break in front ends a
                # line that another process left unfinished
                with self.file.open("ab", buffering=0) as file:
                    file.write(f"\n{key} {digest}\n".encode())
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("hashes of pictures are not kept in %s (%s)", self.file, error.strerror)
        self.file = None


def cache_folder() -> Path:
    """Return the default of `cache_dir` (conf/config.yaml), for commands without such a key."""
    return Path(os.environ.get("FEWSHOT_CACHE", "cache")).absolute()


def facts(path: Path) -> tuple[str, int]:
    """Return a text that changes when the file may have changed, and when it changed last, in nanoseconds.

    Raises:
        OSError: The file does not exist.
    """
    status = path.stat()
    parts = (path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "\0".join(map(str, parts)), status.st_ctime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
