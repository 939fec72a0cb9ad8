"""Load the images of a run: check each once before training, decode in parallel, resize, cache on disk."""

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

# Loading: images at the model's size, decoded in parallel, cached on disk and checked before a run.


log = logging.getLogger(__name__)
T = TypeVar("T")
SUFFIX = ".rgb"  # of files in the cache
TAIL = 5  # bytes after the pixels: one with a bit for each of KINDS that was done to them, four of checksum
CHECKED = "checked.txt"  # in the cache folder; a line per image that was found good: what was done to it, its digest
CHUNK = 256  # images that are checked before the good ones are written to CHECKED


class Loader:
    """Loads square images by their keys.

    Threads are enough, because PIL releases the interpreter lock while it decodes and resizes. Cache entries are
    found by the image's stamp, so a file that has changed is decoded again.
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
            images: Source of the images.
            size: Side in pixels.
            policy: How to make images square, see `resize`.
            cache: Cache with suffix SUFFIX; with a limit of 0 it still keeps what `examine` found. None: neither.
            workers: Threads, 1 or more; each holds one decoded image.
            kept: Images to cache; None: all. If more were cached than fit, they would evict each other.
        """
        self.kept = kept
        self.images, self.size, self.policy, self.cache, self.workers = images, size, policy, cache, workers

    def __call__(self, keys: Sequence[str]) -> list[Image.Image]:
        """Load images, in the order of their keys.

        Raises:
            UserError: Some cannot be loaded; names them.
        """
        return on_all(self.load, keys, self.workers)

    def load(self, image: str) -> Image.Image:
        """Load one image.

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
        """Return the SHA-256 of everything that the pixels depend on, without decoding.

        Raises:
            BadImage: There is no such image, or it has no content.
        """
        facts = (self.images.stamp(image), self.size, self.policy, PIL.__version__, VERSION)
        return hashlib.sha256("|".join(map(str, facts)).encode()).hexdigest()

    def _decode(self, image: str) -> Image.Image:
        picture = self.images.open(image)
        small = resize(picture, self.size, self.policy)
        small.info = picture.info
        return small


def attempt(work: Callable[[str], T], keys: Sequence[str], workers: int) -> list[T | BadImage]:
    """Call `work` on every key in `workers` threads; return results or errors in the order of the keys."""

    def one(key: str) -> T | BadImage:
        try:
            return work(key)
        except BadImage as error:
            return error

    if workers == 1 or len(keys) < 2:
        return [one(key) for key in keys]
    # threads of this call only: in a forked process, threads of a lasting pool would not exist but be waited for
    with ThreadPoolExecutor(min(workers, len(keys))) as pool:
        return list(pool.map(one, keys))


def on_all(work: Callable[[str], T], keys: Sequence[str], workers: int) -> list[T]:
    """Call `work` on every key as `attempt` does, but allow no failure.

    Raises:
        UserError: Some images cannot be used; names them.
    """
    results = attempt(work, keys, workers)
    if bad := {key: str(each) for key, each in zip(keys, results, strict=True) if isinstance(each, BadImage)}:
        raise report(bad, len(keys))
    return [each for each in results if not isinstance(each, BadImage)]


def treated(picture: Image.Image) -> tuple[str, ...]:
    """Return what was done to a decoded image, see `images.to_rgb`."""
    return tuple(picture.info.get(TREATED, ()))


def bytes_per_picture(size: int) -> int:
    """Return the disk space of one cached image, in bytes."""
    return 3 * size**2 + TAIL


def _packed(picture: Image.Image) -> bytes:
    content = picture.tobytes() + bytes([sum(1 << bit for bit, kind in enumerate(KINDS) if kind in treated(picture))])
    return content + zlib.crc32(content).to_bytes(TAIL - 1, "big")


def _unpacked(entry: bytes | None, size: int) -> Image.Image | None:
    """Return the image of a cache entry; None if there is none or it is damaged (a power cut can leave zeros)."""
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
    """Result of trying images, in the order of their keys.

    bad: reason for each image that cannot be used.
    treated: what was done to each image that is not shown as it is stored (see `images.to_rgb`).
    """

    bad: dict[str, str]
    treated: dict[str, tuple[str, ...]]


def examine(loader: Loader, keys: Sequence[str]) -> Examined:
    """Try every image once, which also fills the cache.

    Good images are recorded beside the cache, so that a later run on the same data decodes nothing here.
    """
    # 1. hash: finds missing and empty files
    digests: dict[str, str] = {}
    bad: dict[str, str] = {}
    for key, digest in progress(_chunks(loader, loader.digest, keys), "reading images", len(keys)):
        if isinstance(digest, BadImage):
            bad[key] = str(digest)
        else:
            digests[key] = digest
    # 2. skip images that an earlier run has recorded as good
    notes = None if loader.cache is None else loader.cache.folder / CHECKED
    good = _noted(notes, set(digests.values()))
    done = {key: good[digest] for key, digest in digests.items() if digest in good}
    waiting = {key: digest for key, digest in digests.items() if digest not in good}
    # 3. decode the others
    for key, outcome in progress(_try(loader, waiting, notes), "checking images", len(waiting)):
        if isinstance(outcome, BadImage):
            bad[key] = str(outcome)
        else:
            done[key] = outcome
    keys = list(dict.fromkeys(keys))
    return Examined({key: bad[key] for key in keys if key in bad}, {key: done[key] for key in keys if done.get(key)})


def count_treated(treated: Mapping[str, tuple[str, ...]], images: Iterable[str]) -> dict[str, int]:
    """Count for each kind of treatment the images that it was done to (see `Examined`)."""
    counts = Counter(kind for image in images for kind in treated.get(image, ()))
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _chunks(loader: Loader, work: Callable[[str], T], keys: Sequence[str]) -> Iterator[tuple[str, T | BadImage]]:
    for start in range(0, len(keys), CHUNK):
        chunk = keys[start : start + CHUNK]
        yield from zip(chunk, attempt(work, chunk, loader.workers), strict=True)


def _try(
    loader: Loader, waiting: dict[str, str], notes: Path | None
) -> Iterator[tuple[str, tuple[str, ...] | BadImage]]:
    def check(key: str) -> tuple[str, ...]:  # drops the image: all together may not fit into memory
        return treated(loader.load(key))

    keys = list(waiting)
    for start in range(0, len(keys), CHUNK):
        outcomes = list(_chunks(loader, check, keys[start : start + CHUNK]))
        lines = [" ".join((*done, waiting[key])) for key, done in outcomes if not isinstance(done, BadImage)]
        notes = _note(notes, lines)
        yield from outcomes


def _noted(notes: Path | None, wanted: set[str]) -> dict[str, tuple[str, ...]]:
    """Return what was done to the images of those digests that are recorded."""
    if notes is None or not notes.exists():
        return {}
    with notes.open(encoding="utf-8", errors="replace") as lines:
        words = (line.split() for line in lines)
        return {each[-1]: tuple(each[:-1]) for each in words if each and each[-1] in wanted}


def _note(notes: Path | None, found: list[str]) -> Path | None:
    """Append lines to the record with one write, since other processes do so too; begin with a line break, in case the
    last line is incomplete.

    Returns:
        Where to write more; None if the file cannot be written.
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
    """Return an error about images that cannot be used: `bad` has the reason of each, `total` counts all images."""
    everything = "; manifest=true data.skip_bad=true writes down all of them" if len(bad) > SHOWN else ""
    return UserError(
        f"{len(bad):,} of {counted(total, 'image')} cannot be used: {unusable(bad)}; "
        f"repair or restore the files, or leave them out with data.skip_bad=true{everything}"
    )


# Checking the images of a run: each is tried once before training, and duplicates are reported.


def readable(config: Config, data: TaskData | None = None) -> TaskData:
    """Check the images as `examined` does, and report what was found.

    Raises:
        UserError: As in `examined`; also if an image occurs twice and `data.duplicates=refuse`.
    """
    data = examined(config, data)
    for line in manifest.notes_of(data.manifest):
        log_info(line)
    if copies := data.manifest.get("duplicates"):
        if config.data.duplicates == "refuse":
            raise UserError(
                f"data.duplicates=refuse: {duplicates.worded(copies)}; remove the copies, or go on with"
                " data.duplicates=warn, which lists all of them in manifest.json"
            )
        log_info(f"warning: {duplicates.worded(copies)}; manifest.json lists all (data.duplicates=refuse stops here)")
    return data


def examined(config: Config, data: TaskData | None = None) -> TaskData:
    """Return the task without images that cannot be decoded. Every image is tried once; ranks share the work.

    The manifest in the result also has the hashes of the images and what was found about them.

    Args:
        config: Configuration of the run.
        data: The whole task, if this process has read it already.

    Raises:
        UserError: Images cannot be decoded, and `data.skip_bad` does not allow leaving them out.
    """
    data, bad, treated = data or tasks.build(config), dict[str, str](), dict[str, tuple[str, ...]]()
    tried: set[str] = set()
    # repeat: images that replace those left out have not been tried yet
    while new := [image for image in data.images if image not in tried]:
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
    # record hashes and findings in the manifest
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
    """Compare a finished run with the images that the same command would train and test on now.

    Args:
        config: Configuration of the run.
        path: Manifest of the run.

    Raises:
        UserError: Other images would be used, or the content of some has changed.
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
    """Return images that the task has twice, by the kinds of `duplicates.WORDS`. Ranks share the work."""
    if config.data.duplicates == "ignore":
        return {}
    same = duplicates.equal(stamps)
    copies = duplicates.troubling(data.task, same)
    near = config.data.near_duplicates
    # look-alikes: compared by default only where that is fast; identical images are reported already
    if len(data.images) <= duplicates.FEW if near is None else near:
        load = make_loader(config, data.task)
        hashes = _shared(lambda image: duplicates.difference_hash(load.load(image)), data.images)
        known = {image: group[0] for group in same for image in group}
        pairs = [pair for pair in duplicates.alike(hashes) if len({known.get(image, image) for image in pair}) > 1]
        copies |= duplicates.troubling(data.task, duplicates.confirmed(pairs, load.load), "near_")
    return copies


def of_each(work: Callable[[str], T], images: Sequence[str]) -> dict[str, T]:
    """Call `work` on images in parallel; those for which it failed are missing in the result."""
    found = zip(images, attempt(work, images, _workers()), strict=True)
    return {image: value for image, value in found if not isinstance(value, BadImage)}


def _shared(work: Callable[[str], T], images: Sequence[str]) -> dict[str, T]:
    """Call `work` on images as `of_each` does, shared among the ranks."""
    results = {image: value for part in gather(of_each(work, share_of(list(images)))) for image, value in part.items()}
    return {image: results[image] for image in images if image in results}


def log_info(line: str) -> None:
    """Write a line to the console and to run.log."""
    log.info("%s", line)
    say(line)


def make_loader(config: Config, task: Task) -> Loader:
    """Create the loader of a run; it caches images on disk for later epochs and runs if they fit.

    If they do not all fit, only training and validation images are cached, since these are read repeatedly.
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
    """Return the number of threads of this rank."""
    return max(1, min(8, (os.cpu_count() or 1) // world()))
