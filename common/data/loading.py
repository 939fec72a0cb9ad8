"""The pictures of a run: each tried once before anything expensive, decoded in parallel, resized and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import PIL
from PIL import Image

from common.config.schema import Config
from common.counted import counted
from common.data import duplicates, manifest
from common.data import task as tasks
from common.data.images import KINDS, TRANSPARENT, TREATED, VERSION, resize
from common.data.manifest import SHOWN, unusable
from common.data.task import TaskData
from common.runtime.disk_cache import DiskCache
from common.runtime.distributed import gather, share_of, world
from common.runtime.progress import progress, say
from common.types import BadImage, Images, Task, UserError

# Pictures at the model's size: decoded in parallel, kept on disk so that this happens once, checked before a run.


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


# The pictures of a run: each tried once before anything expensive, then decoded and resized side by side.


def readable(config: Config, data: TaskData | None = None) -> TaskData:
    """As `examined`, and says what was found.

    Raises:
        UserError: Also if a picture is there twice, and `data.duplicates=refuse`.
    """
    data = examined(config, data)
    for line in manifest.notes_of(data.manifest):
        tell(line)
    if copies := data.manifest.get("duplicates"):
        if config.data.duplicates == "refuse":
            raise UserError(
                f"data.duplicates=refuse: {duplicates.worded(copies)}; remove the copies, or go on with"
                " data.duplicates=warn, which lists all of them in manifest.json"
            )
        tell(f"warning: {duplicates.worded(copies)}; manifest.json lists all (data.duplicates=refuse stops here)")
    return data


def examined(config: Config, data: TaskData | None = None) -> TaskData:
    """The task without pictures that cannot be decoded. Every picture is tried once, ranks share them.

    Its manifest also has what the pictures hold, and what was found of them.

    Args:
        config: Of the run.
        data: The whole task, if this process has read it already.

    Raises:
        UserError: There are such pictures, and `data.skip_bad` does not say to leave them out.
    """
    data, bad, treated = data or tasks.build(config), dict[str, str](), dict[str, tuple[str, ...]]()
    tried: set[str] = set()
    while new := [image for image in data.images if image not in tried]:  # others may replace those left out
        tried.update(new)
        parts = gather(examine(make_loader(config, data.task), share_of(new)))
        worse = {image: reason for part in parts for image, reason in part.bad.items()}
        treated |= {image: kinds for part in parts for image, kinds in part.treated.items()}
        if not worse:
            break
        bad |= worse
        if not config.data.skip_bad:
            raise report({image: bad[image] for image in new if image in bad}, len(data.images))
        data = tasks.build(config, bad)
    stamps = _shared(data.task.images.stamp, data.images)
    observed: dict[str, Any] = {
        "unusable": dict(sorted(bad.items())),
        "treated": count_treated(treated, data.images),
        "duplicates": find_duplicates(config, data, stamps),
    }
    if TRANSPARENT in observed["treated"]:
        observed["background"] = config.data.background
    found = {key: value for key, value in observed.items() if value}
    return replace(data, manifest={**manifest.with_contents(data.manifest, stamps), **found})


def check_finished(config: Config, path: Path) -> None:
    """Compare a finished run with the pictures that the same command would train and test on now.

    Args:
        config: Of the run.
        path: Its manifest.

    Raises:
        UserError: There are others, or some hold something else.
    """
    if not path.is_file():
        return
    try:
        data = tasks.build(config, manifest.left_out(path))
    except UserError as error:
        say(f"whether its pictures are still the same cannot be told: {error}")
        return
    stamps = of_each(data.task.images.stamp, data.images)
    manifest.verify_finished(path, manifest.with_contents(data.manifest, stamps))


def find_duplicates(config: Config, data: TaskData, stamps: Mapping[str, str]) -> dict[str, list[list[str]]]:
    """The keys of pictures that the task has twice, by the kinds of `duplicates.WORDS`. Ranks share the work."""
    if config.data.duplicates == "ignore":
        return {}
    same = duplicates.equal(stamps)
    copies = duplicates.troubling(data.task, same)
    near = config.data.near_duplicates
    if len(data.images) <= duplicates.FEW if near is None else near:
        load = make_loader(config, data.task)
        hashes = _shared(lambda image: duplicates.difference_hash(load.load(image)), data.images)
        known = {image: group[0] for group in same for image in group}
        pairs = [pair for pair in duplicates.alike(hashes) if len({known.get(image, image) for image in pair}) > 1]
        copies |= duplicates.troubling(data.task, pairs, "near_")
    return copies


def of_each(work: Callable[[str], T], images: Sequence[str]) -> dict[str, T]:
    """`work` on pictures, side by side; those for which it failed are missing."""
    found = zip(images, attempt(work, images, _workers()), strict=True)
    return {image: value for image, value in found if not isinstance(value, BadImage)}


def _shared(work: Callable[[str], T], images: Sequence[str]) -> dict[str, T]:
    """As `of_each`, shared among the ranks."""
    results = {image: value for part in gather(of_each(work, share_of(list(images)))) for image, value in part.items()}
    return {image: results[image] for image in images if image in results}


def tell(line: str) -> None:
    """A line for who watches the run and for run.log."""
    log.info("%s", line)
    say(line)


def make_loader(config: Config, task: Task) -> Loader:
    """Decodes and resizes pictures, side by side; on disk for later epochs and runs if they fit.

    If not all do, those are kept that training reads again and again.
    """
    size, limit = config.model.image_size, int(config.data.cache_gb * 2**30)
    cache = DiskCache(Path(config.cache_dir).resolve() / "pixels", limit, SUFFIX)
    kept = None
    splits = [task.train, *task.evaluation.values()]
    if sum(len(split.items) for split in splits) * bytes_per_picture(size) > limit:
        read_again = [task.train, *(task.evaluation[name] for name in ("val",) if name in task.evaluation)]
        kept = {item.image for split in read_again for item in split.items}
    return Loader(task.images, size, config.model.resize, cache, _workers(), kept)


def _workers() -> int:
    """Threads of this rank."""
    return max(1, min(8, (os.cpu_count() or 1) // world()))
