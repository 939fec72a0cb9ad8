"""Pictures at the model's size: decoded in parallel, kept on disk so that this happens once, checked before a run."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import PIL
from PIL import Image

from common.counted import counted
from common.data.images import resize
from common.runtime.disk_cache import DiskCache
from common.runtime.progress import progress
from common.types import BadImage, Images, UserError

T = TypeVar("T")
SUFFIX = ".rgb"  # of the cache's files
CHECKSUM = 4  # bytes after the pixels
CHECKED = "checked.txt"  # beside them: digests of pictures that were found good, one per line
VERSION = 1  # of our own decoding and resizing: count up when pixels change
CHUNK = 256  # pictures that are checked before the good ones are written down
SHOWN = 3  # bad pictures that an error names


class Loader:
    """From keys to square pictures.

    Threads are enough, because PIL releases the interpreter while it decodes and resizes. A cached picture is as good
    as its stamp: a file that has changed is decoded anew.
    """

    def __init__(
        self,
        images: Images,
        size: int,
        policy: str = "squash",
        cache: DiskCache | None = None,
        workers: int = 1,
        kept: Container[str] | None = None,
    ) -> None:
        """
        Args:
            images: Where the pictures come from.
            size: Side in pixels.
            policy: See `resize`.
            cache: With suffix SUFFIX; one with a bound of 0 still remembers what `examine` found. None: neither.
            workers: Threads, 1 or more; each holds one decoded picture.
            kept: The pictures that the cache is for; None: all. More than it holds would drive each other out.
        """
        self.kept = kept
        self.images, self.size, self.policy, self.cache, self.workers = images, size, policy, cache, workers

    def __call__(self, keys: Sequence[str]) -> list[Image.Image]:
        """The pictures, in the order of their keys.

        Raises:
            UserError: Some cannot be loaded; names them.
        """
        pictures = self.attempt(self.load, keys)
        if bad := {key: str(each) for key, each in zip(keys, pictures, strict=True) if isinstance(each, BadImage)}:
            raise report(bad, len(keys))
        return [picture for picture in pictures if not isinstance(picture, BadImage)]

    def load(self, image: str) -> Image.Image:
        """One picture.

        Raises:
            BadImage: It cannot be used.
        """
        if self.cache is None or (self.kept is not None and image not in self.kept):
            return self._decode(image)
        digest, side = self.digest(image), (self.size, self.size)
        if (pixels := _unpacked(self.cache.get(digest), 3 * self.size**2)) is not None:
            return Image.frombytes("RGB", side, pixels)
        picture = self._decode(image)
        self.cache.put(digest, _packed(picture.tobytes()))
        return picture

    def digest(self, image: str) -> str:
        """SHA-256 of all that the pixels depend on. Decodes nothing.

        Raises:
            BadImage: There is no such picture, or it has no content.
        """
        facts = (self.images.stamp(image), self.size, self.policy, PIL.__version__, VERSION)
        return hashlib.sha256("|".join(map(str, facts)).encode()).hexdigest()

    def attempt(self, work: Callable[[str], T], keys: Sequence[str]) -> list[T | BadImage]:
        """`work` on every key, in parallel; its results in the order of the keys, an error where it failed."""

        def one(key: str) -> T | BadImage:
            try:
                return work(key)
            except BadImage as error:
                return error

        if self.workers == 1 or len(keys) < 2:
            return [one(key) for key in keys]
        # threads of this call only: some that stayed would be missing, and waited for, after a fork
        with ThreadPoolExecutor(min(self.workers, len(keys))) as pool:
            return list(pool.map(one, keys))

    def _decode(self, image: str) -> Image.Image:
        return resize(self.images.open(image), self.size, self.policy)


def bytes_per_picture(size: int) -> int:
    """Disk space of one cached picture."""
    return 3 * size**2 + CHECKSUM


def _packed(pixels: bytes) -> bytes:
    return pixels + zlib.crc32(pixels).to_bytes(CHECKSUM, "big")


def _unpacked(entry: bytes | None, size: int) -> memoryview | None:
    """The pixels of a cache entry; None if there is none or it is damaged (a power cut can leave zeros)."""
    if entry is None or len(entry) != size + CHECKSUM:
        return None
    pixels = memoryview(entry)[:size]
    return pixels if zlib.crc32(pixels) == int.from_bytes(entry[size:], "big") else None


def examine(loader: Loader, keys: Sequence[str]) -> dict[str, str]:
    """Try every picture once, which also fills the cache.

    What was found good is written beside the cache, so that a later run of the same data decodes nothing here.

    Returns:
        The pictures that cannot be used, with the reason.

    Raises:
        UserError: The good ones cannot be written down.
    """
    digests: dict[str, str] = {}
    bad: dict[str, str] = {}
    for key, result in zip(keys, loader.attempt(loader.digest, keys), strict=True):
        if isinstance(result, BadImage):
            bad[key] = str(result)
        else:
            digests[key] = result
    notes = None if loader.cache is None else loader.cache.folder / CHECKED
    good = _noted(notes, set(digests.values()))
    waiting = {key: digest for key, digest in digests.items() if digest not in good}
    for key, outcome in progress(_try(loader, waiting, notes), "checking images", len(waiting)):
        if outcome is not None:
            bad[key] = str(outcome)
    return {key: bad[key] for key in keys if key in bad}


def _try(loader: Loader, waiting: dict[str, str], notes: Path | None) -> Iterator[tuple[str, BadImage | None]]:
    def check(key: str) -> None:  # the picture itself is not kept: there may be more than memory holds
        loader.load(key)

    keys = list(waiting)
    for start in range(0, len(keys), CHUNK):
        chunk = keys[start : start + CHUNK]
        outcomes = list(zip(chunk, loader.attempt(check, chunk), strict=True))
        _note(notes, [waiting[key] for key, outcome in outcomes if outcome is None])
        yield from outcomes


def _noted(notes: Path | None, wanted: set[str]) -> set[str]:
    """Those of the digests that are written down."""
    if notes is None or not notes.exists():
        return set()
    with notes.open(encoding="utf-8", errors="replace") as lines:
        return {digest for line in lines if (digest := line.rstrip()) in wanted}


def _note(notes: Path | None, digests: list[str]) -> None:
    """Write digests down, in one piece for the sake of other processes. Begins a line, should the last be torn."""
    if notes is None or not digests:
        return
    try:
        with notes.open("ab", buffering=0) as file:
            file.write("\n".join(["", *digests, ""]).encode())
    except OSError as error:
        raise UserError(
            f"cache_dir: {notes} cannot be written ({error.strerror}); make room or choose another"
        ) from error


def report(bad: dict[str, str], total: int) -> UserError:
    """One line about pictures that cannot be used, `bad` by reason, among `total`."""
    shown = ", ".join(f"{image} ({reason})" for image, reason in list(bad.items())[:SHOWN])
    more = f" and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
    return UserError(
        f"{len(bad):,} of {counted(total, 'image')} cannot be used: {shown}{more}; "
        "repair or restore the files, or leave them out with data.skip_bad=true"
    )
