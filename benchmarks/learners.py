"""Compare few-shot learners at the size of ImageNet, on random features, with their formulas written out literally.

    python -m benchmarks.learners                    # --images 2048 --betas 4 takes eight minutes
    python -m benchmarks.learners --whole            # ours alone: 50,000 images, the whole grid; an epoch of CaFo

    tip_search      Tip-Adapter's search of alpha and beta: 16,000 keys of 1024 numbers, 1,000 classes. Written out: for
                    every pair of the grid one exponential over all keys and a product with their one-hot labels. Both
                    sides search the same part of the grid (all 20 alphas, the first --betas betas) and must find the
                    same pair, and the same logits for it.
    cafo_batch      one training batch of CaFo, 256 images against 16,000 keys of CLIP and of DINO (1024 and 2048
                    numbers): logits, gradients and AdamW. Written out: products with one-hot labels. The losses must
                    agree.

Every measurement has its own process: its seconds, and the growth of its peak resident memory. The memory of
`tip_search` is compared at --images; ours does not grow with them, except for the logits themselves.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from common.few_shot.heads import cafo, search, tip_adapter
from common.few_shot.heads import keys as keys_
from common.few_shot.heads.base import Plan, cosine_logits

CLASSES, SHOTS, WIDTH, SECOND, BATCH = 1000, 16, 1024, 2048, 256
SCALE, STEPS = (7.0, 3.0), 20


@dataclass(frozen=True)
class Found:
    """Seconds, growth of peak memory in MiB, and the numbers in which both sides must agree."""

    seconds: float
    memory: float
    check: list[float]


def features(count: int, width: int, seed: int, labels: Tensor | None = None) -> Tensor:
    """Return random features of length 1; with labels, around a centre per class. Shape: [count, width]."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator)
    if labels is not None:
        rows += 0.3 * torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(99))[labels]
    return normalize(rows, dim=1)


def peak() -> float:
    """Return the peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def tip_search(ours: bool, images: int, betas: int) -> Found:
    """Measure the search of Tip-Adapter, see the module docstring."""
    labels = torch.arange(images) % CLASSES
    key_labels = torch.arange(CLASSES).repeat_interleave(SHOTS)
    asked, keys = features(images, WIDTH, 1, labels), features(CLASSES * SHOTS, WIDTH, 2, key_labels)
    base = cosine_logits(asked, features(CLASSES, WIDTH, 3, torch.arange(CLASSES)))
    onehot = torch.eye(CLASSES)[key_labels]
    before, clock = peak(), time.perf_counter()
    if ours:
        kept = keys_.keys_of(keys[None], key_labels, CLASSES)
        # the first betas of the whole grid: its step is (end - 0.1) / 200
        scale = (0.1 + (SCALE[0] - 0.1) * betas / 200, SCALE[1])
        found = search.search_keys(lambda part: keys_.affinity(asked[part], kept), base, labels, scale, (betas, STEPS))
        alpha, beta, best = found.alpha, found.beta, found.accuracy
    else:
        affinity, best, alpha, beta = asked @ keys.T, 0.0, 0.0, 0.0
        for i in range(betas):
            for j in range(STEPS):
                b, a = i * (SCALE[0] - 0.1) / 200 + 0.1, j * (SCALE[1] - 0.1) / STEPS + 0.1
                logits = base + ((-1) * (b - b * affinity)).exp() @ onehot * a
                accuracy = float((logits.argmax(1) == labels).float().mean())
                if accuracy > best:
                    best, alpha, beta = accuracy, a, b
    seconds, memory = time.perf_counter() - clock, peak() - before
    # logits of the pair that was found, for the comparison
    few = slice(0, 32)
    if ours:
        logits = tip_adapter.logits(asked[few], kept, base[few], alpha, beta)
    else:
        logits = base[few] + ((-1) * (beta - beta * affinity[few])).exp() @ onehot * alpha
    return Found(seconds, memory, [alpha, beta, best, float(logits.double().norm())])


def cafo_batch(ours: bool, images: int, betas: int, batches: int = 2) -> Found:
    """Measure training batches of CaFo, see the module docstring. `images` and `betas` are not used."""
    labels = torch.arange(BATCH) % CLASSES
    key_labels = torch.arange(CLASSES).repeat_interleave(SHOTS)
    asked = [features(BATCH, width, seed, labels) for width, seed in ((WIDTH, 1), (SECOND, 2))]
    keys = [features(CLASSES * SHOTS, width, seed, key_labels) for width, seed in ((WIDTH, 3), (SECOND, 4))]
    base = cosine_logits(asked[0], features(CLASSES, WIDTH, 5, torch.arange(CLASSES)))
    onehot, beta, alpha = torch.eye(CLASSES)[key_labels], 1.0, 0.6
    if ours:
        missing = torch.zeros(CLASSES, SHOTS, dtype=torch.bool)
        trained = [nn.Parameter(each.view(CLASSES, SHOTS, -1).clone()) for each in keys]
    else:
        trained = [nn.Parameter(each.clone()) for each in keys]
    if ours:
        optimizer = Plan("adamw", 20, BATCH, 1e-3, 0.01).make(trained)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-4)
    losses, before, clock = [], peak(), time.perf_counter()
    for _ in range(batches):
        if ours:
            near = [keys_.affinity(x, keys_.Keys(k, missing)) for x, k in zip(asked, trained, strict=True)]
            logits = cafo.logits(torch.stack([keys_.votes(each, beta) for each in near]), base, alpha)
        else:
            votes = [((-1) * (beta - beta * (x @ k.T))).exp() @ onehot for x, k in zip(asked, trained, strict=True)]
            standard = [(v - v.mean(1, keepdim=True)) / v.std(1, keepdim=True) for v in votes]
            zero = (base - base.mean(1, keepdim=True)) / base.std(1, keepdim=True)
            weight = torch.stack([(s * zero).sum(1) for s in standard]).softmax(0)
            logits = base + alpha * sum(w[:, None] * s for w, s in zip(weight, standard, strict=True))
        loss = cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return Found((time.perf_counter() - clock) / batches, peak() - before, losses)


CASES = {"tip_search": tip_search, "cafo_batch": cafo_batch}


def measure(name: str, ours: bool, images: int, betas: int) -> Found:
    """Measure one side of a case in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(CASES[name], (ours, images, betas))


def whole() -> None:
    """Measure our side alone, at the size of ImageNet: 50,000 validation images, 16 shots."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        search = pool.apply(tip_search, (True, 50_000, 200))
        print(f"tip_search: 50,000 images, 200 betas, 20 alphas: {search.seconds:.0f} s, {search.memory:.0f} MiB")
        batches = math.ceil(CLASSES * SHOTS / BATCH)
        batch = pool.apply(cafo_batch, (True, 0, 0, batches))
        print(f"cafo: an epoch, {batches} batches: {batch.seconds * batches:.0f} s, {batch.memory:.0f} MiB")


def main() -> None:
    """Measure both sides alternately; print one line per case and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--betas", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="ours alone, all of ImageNet's validation images")
    options = parser.parse_args()
    if options.whole:
        whole()
        return
    cases: dict[str, Any] = {}
    for name in CASES:
        found: dict[bool, list[Found]] = {True: [], False: []}
        for _ in range(options.repetitions):
            for ours in (True, False):
                found[ours].append(measure(name, ours, options.images, options.betas))
        mine, theirs = found[True][0].check, found[False][0].check
        if any(abs(a - b) > 1e-4 * max(1.0, abs(b)) for a, b in zip(mine, theirs, strict=True)):
            raise SystemExit(f"{name}: ours finds {mine}, the formula {theirs}")
        seconds = {side: statistics.median(f.seconds for f in each) for side, each in found.items()}
        memory = {side: statistics.median(f.memory for f in each) for side, each in found.items()}
        cases[name] = {
            "ratio": round(seconds[False] / seconds[True], 2),
            "memory_ratio": round(memory[False] / max(1.0, memory[True]), 2),
            "seconds": [round(seconds[side], 3) for side in (True, False)],
            "mib": [round(memory[side]) for side in (True, False)],
        }
        print(
            f"{name}: ours {seconds[True]:.2f} s, {memory[True]:.0f} MiB; as written {seconds[False]:.2f} s,", end=" "
        )
        print(f"{memory[False]:.0f} MiB; {cases[name]['ratio']} times as fast; agree: {mine}")
    print(json.dumps({"images": options.images, "betas": options.betas, "cases": cases}))


if __name__ == "__main__":
    main()
