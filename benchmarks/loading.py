"""Compare loading images at the model's size with Hugging Face `datasets` and its imagefolder builder.

    python -m benchmarks.loading                     # 50,000 JPEGs; --images 2000 for a quick look

Both sides read the same generated JPEGs of about 500x375 pixels (quality 85, 100 classes), convert them to RGB and
resize them to 384x384 by Lanczos; before timing, they must give the same pixels. Every measurement has a new process,
and the files are in the page cache for all of them.

ours: `Loader` in batches, with threads. `decode` has no cache, `fill` also writes one, `cached` reads it; the last two
are measured on as many images as a cache of --cache-gb holds.
datasets: with one worker a loop over the rows, with two a torch `DataLoader` whose processes send the pixels as
tensors through shared memory.

Reports images per second of wall-clock time over the loop, starting the workers included; the seconds before it in
which one side lists the files and the other builds its index; and the peak resident memory, summed over the worker
processes (memory that they share with the main process counts in each). Imports are not timed, but count as memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIDE, BATCH, CLASSES = 384, 32, 100
ENTRY = 3 * SIDE**2 + 4  # bytes of a cached image
FULL = 0.98  # share of the cache that is filled, so that no image is evicted
NAME, DONE = "generated", "generated.json"


@dataclass(frozen=True)
class Plan:
    """One measurement. cache: folder of our cache, or of the index of `datasets`."""

    side: str
    workers: int
    folder: str
    images: int
    cache: str | None = None
    cache_bytes: int = 0


@dataclass
class Found:
    """Seconds before the loop and in it, and peak resident memory in MiB of the main process and of its workers."""

    prepare: float
    seconds: float
    memory: float = 0.0
    workers_memory: float = 0.0


def generate(folder: Path, images: int) -> None:
    """Write `images` JPEGs in one folder per class, unless they exist."""
    done = folder / DONE
    if done.exists() and json.loads(done.read_text(encoding="utf-8")) == {"images": images, "classes": CLASSES}:
        return
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"--folder {folder} holds something else than {images} generated images; choose an empty one")
    counts = [images // CLASSES + (label < images % CLASSES) for label in range(CLASSES)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.starmap(generate_class, [(folder / "images", label, count) for label, count in enumerate(counts)], 1)
    done.write_text(json.dumps({"images": images, "classes": CLASSES}), encoding="utf-8")


def generate_class(folder: Path, label: int, count: int) -> None:
    """Write crops of different sizes from one blurred texture, each with its own noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(label)
    blobs = Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8))
    texture = np.asarray(blobs.resize((700, 600), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = (rng.standard_normal((900, 1000, 3)) * 14).astype(np.int16)
    target = folder / f"class_{label:03d}"
    target.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width, height = int(rng.integers(440, 561)), int(rng.integers(330, 421))
        if number % 4 == 3:
            width, height = height, width
        x, y = rng.integers(0, 700 - width), rng.integers(0, 600 - height)
        u, v = rng.integers(0, 1000 - width), rng.integers(0, 900 - height)
        pixels = texture[y : y + height, x : x + width] + grain[v : v + height, u : u + width]
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(target / f"{number:05d}.jpg", quality=85)


def listed(folder: Path) -> list[str]:
    """Return the paths of the images inside the folder of all classes, sorted."""
    return [f"{kind.name}/{file.name}" for kind in sorted(folder.iterdir()) for file in sorted(kind.iterdir())]


def ours(plan: Plan) -> Found:
    """Measure `Loader`, batch by batch."""
    from common.data.images import FileImages
    from common.data.loading import SUFFIX, Loader
    from common.runtime.disk_cache import DiskCache

    start = time.perf_counter()
    folder = Path(plan.folder) / "images"
    keys = chosen([f"{NAME}/{path}" for path in listed(folder)], plan.images)
    cache = None if plan.cache is None else DiskCache(Path(plan.cache), plan.cache_bytes, SUFFIX)
    loader = Loader(FileImages({NAME: folder}), SIDE, "squash", cache, plan.workers)
    between = time.perf_counter()
    for first in range(0, len(keys), BATCH):
        loader(keys[first : first + BATCH])
    return Found(between - start, time.perf_counter() - between)


def chosen(items: list[str], count: int) -> list[str]:
    """Return `count` random items, so that the order is neither that of the disk nor that of the classes."""
    return random.Random(0).sample(items, count)


def index(plan: Plan) -> Any:
    """Return the folder as a dataset of Hugging Face `datasets`, in the order of `chosen`."""
    from datasets import load_dataset

    dataset = load_dataset("imagefolder", data_dir=f"{plan.folder}/images", split="train", cache_dir=plan.cache)
    rows = [str(row) for row in range(len(dataset))]
    return dataset.select([int(row) for row in chosen(rows, plan.images)])


def datasets(plan: Plan) -> Found:
    """Measure a loop over the rows, or torch's `DataLoader`."""
    import torch
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    start = time.perf_counter()
    dataset = index(plan)
    between = time.perf_counter()
    if plan.workers == 1:
        for row in dataset:
            square(row["image"])
        return Found(between - start, time.perf_counter() - between)
    dataset = dataset.with_transform(tensors)
    memory = 0.0
    for _ in torch.utils.data.DataLoader(dataset, BATCH, num_workers=plan.workers):
        memory = max(memory, sum(peak(child.pid) for child in multiprocessing.active_children()))
    return Found(between - start, time.perf_counter() - between, workers_memory=memory)


def square(picture: Any) -> Any:
    """Resize like our loader with `model.resize=squash`."""
    from PIL.Image import Resampling

    return picture.convert("RGB").resize((SIDE, SIDE), Resampling.LANCZOS)


def tensors(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the pixels of some rows; shape of each: [SIDE, SIDE, 3]."""
    import numpy as np
    import torch

    return {"pixels": [torch.from_numpy(np.array(square(picture))) for picture in rows["image"]]}


def same(plan: Plan) -> Found:
    """Check that both sides give the same pixels."""
    from common.data.images import FileImages
    from common.data.loading import Loader

    folder = Path(plan.folder) / "images"
    keys = chosen([f"{NAME}/{path}" for path in listed(folder)], plan.images)
    pictures = Loader(FileImages({NAME: folder}), SIDE, "squash", None, plan.workers)(keys)
    for key, picture, row in zip(keys, pictures, index(plan), strict=True):
        assert picture.tobytes() == square(row["image"]).tobytes(), f"the two sides differ in {key}"
    return Found(0, 0)


def peak(process: int | str | None = "self") -> float:
    """Return the peak resident memory of a process since it started its program, in MiB; 0 if it has ended.

    The peak of getrusage would include that of its parent process.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


SIDES: dict[str, Callable[[Plan], Found]] = {"ours": ours, "datasets": datasets, "same": same}


def measure(plan: Plan) -> Found:
    """Run one measurement in a new process."""
    command = [sys.executable, "-m", "benchmarks.loading", "--plan", json.dumps(asdict(plan))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def run(folder: Path, images: int, cache_bytes: int, workdir: Path) -> dict[str, tuple[int, Found]]:
    """Run all measurements once; return the number of images and the result, by name."""
    stored = min(images, int(FULL * cache_bytes / ENTRY))
    results: dict[str, tuple[int, Found]] = {}

    def add(name: str, side: str, workers: int, count: int, cache: Path | None = None) -> None:
        place = None if cache is None else str(cache)
        results[f"{name}_{workers}"] = count, measure(Plan(side, workers, str(folder), count, place, cache_bytes))

    for workers in (1, 2):
        add("ours_decode", "ours", workers, images)
        add("datasets", "datasets", workers, images, workdir / f"index_{workers}")
        cache = workdir / "cache"
        add("ours_fill", "ours", workers, stored, cache)
        add("ours_cached", "ours", workers, stored, cache)
        shutil.rmtree(cache)
        shutil.rmtree(workdir / f"index_{workers}")
    return results


def warm(folder: Path) -> float:
    """Read all images into the page cache; return their mean size in KiB."""
    sizes = [len((folder / "images" / path).read_bytes()) for path in listed(folder / "images")]
    return statistics.fmean(sizes) / 1024


def refuse(options: argparse.Namespace, workdir: Path) -> None:
    """Exit if the cache does not fit on the disk or is too small."""
    free, needed = shutil.disk_usage(workdir).free, options.cache_gb * 2**30 + options.images * 100 * 2**10
    if needed > free:
        raise SystemExit(f"{needed / 2**30:.0f} GiB are needed, {free / 2**30:.0f} are free: lower --cache-gb")
    if options.images < CLASSES or options.cache_gb * 2**30 * FULL < ENTRY * BATCH:
        raise SystemExit(f"--images must be {CLASSES} or more, and --cache-gb enough for {BATCH} pictures")


def report(rounds: list[dict[str, tuple[int, Found]]], facts: dict[str, Any]) -> None:
    """Print the table and one line of JSON."""
    from benchmarks.setup import show

    rows, cases = [], {}
    for name, (count, _) in rounds[0].items():
        each = [results[name][1] for results in rounds]
        speeds = [count / one.seconds for one in each]
        prepare = statistics.median(one.prepare for one in each)
        memory, workers = max(one.memory for one in each), max(one.workers_memory for one in each)
        speed = f"{statistics.median(speeds):.0f} [{min(speeds):.0f}, {max(speeds):.0f}]"
        total = f"{memory:.0f}" + (f" + {workers:.0f}" if workers else "")
        rows.append((name[:-2], name[-1], f"{count:,}", speed, f"{prepare:.2f}", total))
        cases[name] = {"images": count, "per_second": speeds, "prepare": prepare, "memory": [memory, workers]}
    columns = ("variant", "workers", "pictures", "pictures/s: median [min, max]", "index s", "peak memory MiB")
    title = f"Loading {facts['images']:,} JPEGs of {facts['kib']:.0f} KiB to {SIDE}x{SIDE}"
    show(title, columns, rows, {**facts, "cases": cases})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, help="where the images are made, and kept for the next time")
    parser.add_argument("--cache-gb", type=float, default=4.0, help="GiB for decoded pictures; 22 for all 50,000")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--plan", help=argparse.SUPPRESS)  # for the new process of one measurement
    options = parser.parse_args()
    if options.plan is not None:
        plan = Plan(**json.loads(options.plan))
        result = SIDES[plan.side](plan)
        result.memory = peak()
        print(json.dumps(asdict(result)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder and options.folder.parent) as workdir:
        refuse(options, Path(workdir))
        folder = (options.folder or Path(workdir) / "pictures").absolute()
        generate(folder, options.images)
        facts = {"images": options.images, "kib": warm(folder), "side": SIDE, "cache_gb": options.cache_gb}
        measure(Plan("same", 2, str(folder), min(options.images, 64), str(Path(workdir) / "index")))
        cache_bytes = int(options.cache_gb * 2**30)
        rounds = [run(folder, options.images, cache_bytes, Path(workdir)) for _ in range(options.repetitions)]
        report(rounds, facts)


if __name__ == "__main__":
    main()
