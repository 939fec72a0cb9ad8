"""Pictures at the model's size: decoded in parallel, kept on disk so that this happens once, checked before a run."""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import PIL
from PIL import Image

from common.counted import counted
from common.data.images import VERSION, resize
from common.data.notes import SHOWN, unusable
from common.data.rgb import KINDS, TREATED
from common.runtime.disk_cache import DiskCache
from common.runtime.progress import progress
from common.types import BadImage, Images, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
SUFFIX = ".rgb"  # of the cache's files
TAIL = 5  # bytes after the pixels: one with a bit for each of KINDS that was done to them, and a checksum
CHECKED = "checked.txt"  # beside them: a line per picture that was found good: what was done to it, and its digest
CHUNK = 256  # pictures that are checked before the good ones are written down


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
        return on_all(self.load, keys, self.workers)

    def load(self, image: str) -> Image.Image:
        """One picture.

        Raises:
            BadImage: It cannot be used.
        """
        if self.cache is None or (self.kept is not None and image not in self.kept):
            return self._decode(image)
        digest = self.digest(image)
        if (known := _unpacked(self.cache.get(digest), self.size)) is not None:
            return known
        picture = self._decode(image)
        self.cache.put(digest, _packed(picture))
        return picture

    def digest(self, image: str) -> str:
        """SHA-256 of all that the pixels depend on. Decodes nothing.

        Raises:
            BadImage: There is no such picture, or it has no content.
        """
        facts = (self.images.stamp(image), self.size, self.policy, PIL.__version__, VERSION)
        return hashlib.sha256("|".join(map(str, facts)).encode()).hexdigest()

    def _decode(self, image: str) -> Image.Image:
        picture = self.images.open(image)
        small = resize(picture, self.size, self.policy)
        small.info = picture.info
        return small


def attempt(work: Callable[[str], T], keys: Sequence[str], workers: int) -> list[T | BadImage]:
    """`work` on every key, in so many threads; its results in the order of the keys, an error where it failed."""

    def one(key: str) -> T | BadImage:
        try:
            return work(key)
        except BadImage as error:
            return error

    if workers == 1 or len(keys) < 2:
        return [one(key) for key in keys]
    # threads of this call only: some that stayed would be missing, and waited for, after a fork
    with ThreadPoolExecutor(min(workers, len(keys))) as pool:
        return list(pool.map(one, keys))


def on_all(work: Callable[[str], T], keys: Sequence[str], workers: int) -> list[T]:
    """As `attempt`, where none may fail.

    Raises:
        UserError: Some pictures cannot be used; names them.
    """
    results = attempt(work, keys, workers)
    if bad := {key: str(each) for key, each in zip(keys, results, strict=True) if isinstance(each, BadImage)}:
        raise report(bad, len(keys))
    return [each for each in results if not isinstance(each, BadImage)]


def treated(picture: Image.Image) -> tuple[str, ...]:
    """What was done to a decoded picture, see `rgb.to_rgb`."""
    return tuple(picture.info.get(TREATED, ()))


def bytes_per_picture(size: int) -> int:
    """Disk space of one cached picture."""
    return 3 * size**2 + TAIL


def _packed(picture: Image.Image) -> bytes:
    content = picture.tobytes() + bytes([sum(1 << bit for bit, kind in enumerate(KINDS) if kind in treated(picture))])
    return content + zlib.crc32(content).to_bytes(TAIL - 1, "big")


def _unpacked(entry: bytes | None, size: int) -> Image.Image | None:
    """The picture of a cache entry; None if there is none or it is damaged (a power cut can leave zeros)."""
    if entry is None or len(entry) != bytes_per_picture(size):
        return None
    content = memoryview(entry)[: 1 - TAIL]
    if zlib.crc32(content) != int.from_bytes(entry[1 - TAIL :], "big"):
        return None
    picture = Image.frombytes("RGB", (size, size), content[:-1])
    if kinds := tuple(kind for bit, kind in enumerate(KINDS) if content[-1] >> bit & 1):
        picture.info[TREATED] = kinds
    return picture


@dataclass(frozen=True)
class Examined:
    """What was found of pictures, in the order of their keys.

    bad: those that cannot be used, with the reason. treated: those that are not shown as they are stored, with what was
    done to them (see `rgb.to_rgb`).
    """

    bad: dict[str, str]
    treated: dict[str, tuple[str, ...]]


def examine(loader: Loader, keys: Sequence[str]) -> Examined:
    """Try every picture once, which also fills the cache.

    What was found good is written beside the cache, so that a later run of the same data decodes nothing here.
    """
    digests: dict[str, str] = {}
    bad: dict[str, str] = {}
    for key, digest in progress(_chunks(loader, loader.digest, keys), "reading images", len(keys)):
        if isinstance(digest, BadImage):
            bad[key] = str(digest)
        else:
            digests[key] = digest
    notes = None if loader.cache is None else loader.cache.folder / CHECKED
    good = _noted(notes, set(digests.values()))
    done = {key: good[digest] for key, digest in digests.items() if digest in good}
    waiting = {key: digest for key, digest in digests.items() if digest not in good}
    for key, outcome in progress(_try(loader, waiting, notes), "checking images", len(waiting)):
        if isinstance(outcome, BadImage):
            bad[key] = str(outcome)
        else:
            done[key] = outcome
    keys = list(dict.fromkeys(keys))
    return Examined({key: bad[key] for key in keys if key in bad}, {key: done[key] for key in keys if done.get(key)})


def count_treated(treated: Mapping[str, tuple[str, ...]], images: Iterable[str]) -> dict[str, int]:
    """How many of the images each kind of treatment was done to (see `Examined`)."""
    counts = Counter(kind for image in images for kind in treated.get(image, ()))
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _chunks(loader: Loader, work: Callable[[str], T], keys: Sequence[str]) -> Iterator[tuple[str, T | BadImage]]:
    for start in range(0, len(keys), CHUNK):
        chunk = keys[start : start + CHUNK]
        yield from zip(chunk, attempt(work, chunk, loader.workers), strict=True)


def _try(
    loader: Loader, waiting: dict[str, str], notes: Path | None
) -> Iterator[tuple[str, tuple[str, ...] | BadImage]]:
    def check(key: str) -> tuple[str, ...]:  # the picture itself is not kept: there may be more than memory holds
        return treated(loader.load(key))

    keys = list(waiting)
    for start in range(0, len(keys), CHUNK):
        outcomes = list(_chunks(loader, check, keys[start : start + CHUNK]))
        lines = [" ".join((*done, waiting[key])) for key, done in outcomes if not isinstance(done, BadImage)]
        notes = _note(notes, lines)
        yield from outcomes


def _noted(notes: Path | None, wanted: set[str]) -> dict[str, tuple[str, ...]]:
    """Those of the digests that are written down, and what was done to their pictures."""
    if notes is None or not notes.exists():
        return {}
    with notes.open(encoding="utf-8", errors="replace") as lines:
        words = (line.split() for line in lines)
        return {each[-1]: tuple(each[:-1]) for each in words if each and each[-1] in wanted}


def _note(notes: Path | None, found: list[str]) -> Path | None:
    """Write lines down, in one piece for the sake of other processes. Begins a line, should the last be torn.

    Returns:
        Where to write more; None where nothing can be written.
    """
    if notes is None or not found:
        return notes
    try:
        with notes.open("ab", buffering=0) as file:
            file.write("\n".join(["", *found, ""]).encode())
    except OSError as error:
        log.warning("%s cannot be written: %s (cache_dir); images are checked again", notes, error.strerror)
        return None
    return notes


def report(bad: dict[str, str], total: int) -> UserError:
    """One line about pictures that cannot be used, `bad` by reason, among `total`."""
    everything = "; manifest=true data.skip_bad=true writes down all of them" if len(bad) > SHOWN else ""
    return UserError(
        f"{len(bad):,} of {counted(total, 'image')} cannot be used: {unusable(bad)}; "
        f"repair or restore the files, or leave them out with data.skip_bad=true{everything}"
    )
