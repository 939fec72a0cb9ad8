"""What files hold, as SHA-256: each is read once, and again only when the file system says that it may have changed.

A size and a time of modification say too little: rsync, unzip and `cp -p` keep the times of what they copy, and
pictures without compression all have one size. No program can set the time of change (ctime), so it is asked for, too.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)
FILE = "contents.txt"  # in the cache's folder: a line per file, `<hash of path and facts> <SHA-256 of its content>`
LINE = re.compile("([0-9a-f]{32}) ([0-9a-f]{64})")
SETTLED = 2 * 10**9  # nanoseconds; a file that has just changed can change again without another time of change


class Contents:
    """Hashes of contents. Threads and processes may share them."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where they are kept for other processes; None: in memory alone."""
        self.file = None if folder is None else folder / FILE
        self.known: dict[str, str] | None = None
        self.lock = threading.Lock()

    def of(self, path: Path) -> str:
        """SHA-256 of a file, in hexadecimal.

        Raises:
            OSError: It cannot be read.
        """
        name, changed = facts(path)
        return self.keep(name, changed, lambda: _sha256(path))

    def keep(self, name: str, changed: int, compute: Callable[[], str]) -> str:
        """What is known under a name; computed, and kept from then on, if nothing is.

        Args:
            name: Another one whenever `compute` may give something else.
            changed: When what is computed from changed last, in nanoseconds. If that is hardly over, nothing is kept.
            compute: SHA-256 in hexadecimal.
        """
        key = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        known = self._read().get(key)
        if known is not None:
            return known
        settled = time.time_ns() - changed > SETTLED
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
                with self.file.open("ab", buffering=0) as file:  # in one piece, after a line that may be torn
                    file.write(f"\n{key} {digest}\n".encode())
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("hashes of pictures are not kept in %s (%s)", self.file, error.strerror)
        self.file = None


def facts(path: Path) -> tuple[str, int]:
    """A text that changes when the file may have changed, and when it changed last, in nanoseconds.

    Raises:
        OSError: It is not there.
    """
    status = path.stat()
    parts = (path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "\0".join(map(str, parts)), status.st_ctime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
