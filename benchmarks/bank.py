"""Train a category bank of ImageNet's size on the host and as a parameter; compare memory, seconds and rows.

    python -m benchmarks.bank

1,000 categories x 256 rows x 2,560 numbers behind a small embedding, and one linear layer, through the trainer's
DeepSpeed engine: updates of 8 prompts with two categories each, with clipping and weight decay. Each side has its own
process. Memory is the peak resident memory above that of the libraries, divided by the size of the rows (2.6 GB); pages
of mapped files count. The rows of both sides must agree to 1e-6.

Shapes: E categories, m rows of one, D width.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.setup import prepare, show

IMAGENET = (1000, 256, 2560)
UPDATES, PROMPTS = 5, 8
BETAS, DECAY, RATE = (0.9, 0.99), 0.1, 1e-3  # those of ALERT, except for the learning rate


def peak() -> float:
    """Return the peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def train(where: str, shape: tuple[int, int, int], result: Path) -> dict[str, float]:
    """Train one side; write all rows that were trained, and some that were not, to `result`."""
    from common.config.schema import TrainerConfig
    from common.models.extra_embeddings import DeviceEmbeddings, ExtraEmbeddings
    from common.models.offloaded import OffloadedEmbeddings, Rule
    from common.runtime.group import init_process_group
    from common.training.engine import Engine

    prepare()
    init_process_group(gpus=0)
    count, width, dim = shape
    before = peak()
    entries = torch.randn(shape, generator=torch.manual_seed(1)).mul_(0.3)
    torch.manual_seed(2)
    embedding = torch.nn.Embedding(4, dim)
    extra: ExtraEmbeddings
    if where == "host":
        extra = OffloadedEmbeddings(embedding, entries, True, Rule(BETAS, DECAY), torch.float32)
    else:
        extra = DeviceEmbeddings(embedding, entries, True)
    del entries
    model = torch.nn.Sequential(extra, torch.nn.Linear(dim, 8))
    config = TrainerConfig(
        "sft",
        learning_rate=RATE,
        schedule="constant",
        epochs=1.0,
        betas=list(BETAS),
        weight_decay=DECAY,
        grad_clip=1e-3,
    )
    engine = Engine(model, config, {"zero_optimization": {"stage": 0}}, UPDATES)
    # the timed updates
    chosen, seen, clock = random.Random(3), [], time.perf_counter()
    for update in range(UPDATES):
        for prompt in range(PROMPTS):
            shown = chosen.sample(range(count), 2)
            seen += shown
            ids = torch.cat([torch.arange(width) + 4 + entry * width for entry in shown])
            engine.backward(engine(ids).square().mean(), last=prompt + 1 == PROMPTS)
        engine.step(update)
    seconds = (time.perf_counter() - clock) / UPDATES
    memory = peak() - before
    kept = sorted({*seen, *range(0, count, max(1, count // 50))})  # trained categories and some others
    rows = extra.host.fetch(kept) if isinstance(extra, OffloadedEmbeddings) else extra.table()[kept]
    torch.save(rows.clone(), result)
    engine.close()
    return {"seconds": seconds, "memory": memory / (count * width * dim * 4)}


def compare(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Measure both sides, and the largest difference between their rows."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for where in ("host", "device"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[where] = pool.apply(train, (where, shape, Path(folder) / where))
        rows = [torch.load(Path(folder) / where) for where in ("host", "device")]
    found["difference"] = float((rows[0] - rows[1]).abs().max())
    assert found["difference"] < 1e-6, found
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--categories", type=int, default=IMAGENET[0])
    shape = (parser.parse_args().categories, *IMAGENET[1:])
    found = compare(shape)
    show(
        f"A bank of {shape[0]} x {shape[1]} x {shape[2]}",
        ("where", "peak, rows once = 1", "s an update"),
        [(where, f"{found[where]['memory']:.2f}", f"{found[where]['seconds']:.2f}") for where in ("host", "device")],
        {"cases": {"imagenet": {**found, "memory_ratio": found["host"]["memory"] / found["device"]["memory"]}}},
    )


if __name__ == "__main__":
    main()
