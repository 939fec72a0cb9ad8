"""Compare samplers (ours, vLLM, transformers' `generate`) on the completions of an update, then whole updates by phase.

    python -m benchmarks.engines                 # about twenty minutes; --updates 0 leaves the second part out

All three sample G completions of N prompts of random words, from the same weights, at temperature 1 without truncation,
with a fixed number of tokens: end-of-sequence ids are banned. Prompts have no common prefix, and vLLM's prefix cache is
cleared between turns. The samplers alternate in one process; CPU seconds of one thread. Before timing, the first two
decode greedily and must give the same tokens, except for one prompt at most. Needs make setup-vllm.

Whole updates are those of the demo's model on the digits, thinking (method=clsrl): alternating runs of `run.py` with
one thread; wall seconds of each phase, median over all updates but the first three. `overlap` samples the next batch
during an update; the sampler then has a core of its own.

Shapes: N prompts of P tokens, G completions of R tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.setup import (
    FIRST_WORD,
    VOCABULARY,
    Case,
    Seconds,
    alternate,
    load_ours,
    load_stock,
    prepare,
    save_model,
    show,
)
from common.models.encoder import EncodedPrompt
from common.models.families import Qwen2VL
from common.models.vlm import VLM
from common.rollout.base import Decoding, Request, Rollout, sampling_mode
from common.rollout.hf import HFRollout

PROMPTS = 8
JOB = ["method=clsrl", "tracking=none", "label_scoring=false", "trainer.evaluate_every=0", "shots=170"]
AHEAD = ["rollout.overlap=true", "trainer.importance_correction=token_truncate"]
WAYS = {"hf": [], "vllm": ["rollout=vllm"], "overlap": ["rollout=vllm", *AHEAD]}
CASES = (Case(1000, 16, 8), Case(200, 128, 8), Case(200, 128, 2))


def make_requests(policy: VLM, case: Case) -> list[Request]:
    """Return prompts of random words."""
    generator = torch.Generator().manual_seed(1)
    requests = []
    for number in range(PROMPTS):
        ids = torch.randint(FIRST_WORD, VOCABULARY, (case.prompt,), generator=generator)
        encoded = EncodedPrompt(ids, Qwen2VL.positions(ids, None, policy.model.config))
        requests.append(Request(encoded, str(number), encoded.ids.clone, list))
    return requests


def side(rollout: Rollout, requests: list[Request], case: Case) -> Callable[[], int]:
    """Return a function that samples with a backend once and returns the number of tokens."""

    def turn() -> int:
        with sampling_mode(rollout, 0):
            groups = rollout.generate(requests, case.group, Decoding(1.0, 0, 1.0, case.completion))
        forget(rollout)
        return sum(len(completion.ids) for group in groups for completion in group)

    return turn


def forget(rollout: Any) -> None:
    """Clear vLLM's caches, so that it computes the prompts again."""
    if hasattr(rollout, "engine"):
        rollout.engine.forget()


def stock(folder: Path, policy: VLM, requests: list[Request], case: Case) -> Callable[[], int]:
    """Return the same function for transformers' `generate`, with all prompts in one batch."""
    model = load_stock(folder).eval()
    ids = torch.stack([request.encoded.ids for request in requests])

    def turn() -> int:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=case.group,
            suppress_tokens=list(policy.banned),
            max_new_tokens=case.completion,
        )
        return out[:, ids.shape[1] :].numel()

    return turn


def measure(case: Case, folder: Path, rollouts: dict[str, Rollout], policy: VLM, repetitions: int) -> dict[str, Any]:
    """Measure CPU seconds and tokens per second of all samplers, and their ratios to ours."""
    requests, greedy = make_requests(policy, case), Decoding(0.0, 0, 1.0, case.completion)
    # greedy replies must be the same, see the limit below
    found = []
    for rollout in rollouts.values():
        with sampling_mode(rollout, 0):
            found.append([group[0].ids.tolist() for group in rollout.generate(requests, 1, greedy)])
        forget(rollout)
    same = sum(a == b for a, b in zip(*found, strict=True)) if len(found) == 2 else PROMPTS
    assert same >= PROMPTS - 1, f"{PROMPTS - same} of {PROMPTS} greedy replies differ"  # random weights have near ties
    # timed sampling
    sides = {name: side(rollout, requests, case) for name, rollout in rollouts.items()}
    sides["generate"] = stock(folder, policy, requests, case)
    tokens = PROMPTS * case.group * case.completion
    assert all(turn() == tokens for turn in sides.values())
    seconds: dict[str, Seconds] = alternate(sides, repetitions)
    return {
        "ratio": seconds["generate"].median / seconds["hf"].median,
        "vllm_over_hf": seconds["vllm"].median / seconds["hf"].median,
        "tokens_per_second": {name: tokens / times.median for name, times in seconds.items()},
        "seconds": {name: list(times.values) for name, times in seconds.items()},
    }


def whole_updates(updates: int, repetitions: int) -> dict[str, dict[str, Any]]:
    """Measure the median wall seconds of each phase and of whole updates, for each kind of sampling."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repetitions):
            for name, arguments in WAYS.items():
                run = Path(folder) / f"{name}-{number}"
                command = [
                    sys.executable,
                    "run.py",
                    f"hydra.run.dir={run}",
                    f"trainer.updates={updates}",
                    *JOB,
                    *arguments,
                ]
                subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                lines = (run / "timings.jsonl").read_text(encoding="utf-8").splitlines()
                seconds[name] += [json.loads(line) for line in lines[3:]]
    phases = ("rollout", "reward", "update")
    return {
        name: {
            **{phase: statistics.median(row[phase] for row in rows) for phase in phases},
            "whole": statistics.median(sum(row[phase] for phase in phases) for row in rows),
        }
        for name, rows in seconds.items()
    }


COLUMNS = ("case", "backend", "tokens/s", "CPU s: min to max")


def compare(repetitions: int, updates: int) -> tuple[list[tuple[str, str, str, str]], dict[str, Any]]:
    """Return rows of `COLUMNS`, and the numbers for JSON: `cases` by name, `updates` by backend."""
    from common.rollout.vllm.backend import VLLMRollout
    from common.runtime.group import init_process_group

    init_process_group(gpus=0)
    with tempfile.TemporaryDirectory() as workdir:
        folder = save_model(Path(workdir) / "model")
        loaded = load_ours(folder)
        # with end-of-sequence ids banned, every completion has its full length
        policy = replace(loaded, banned=tuple(sorted({*loaded.banned, *loaded.eos})))
        engine = VLLMRollout(policy, prompt_tokens=1024, completion_tokens=128, seed=1, cpu_kvcache_space=2)
        rollouts: dict[str, Rollout] = {"hf": HFRollout(policy), "vllm": engine}
        numbers = {case.name: measure(case, folder, rollouts, policy, repetitions) for case in CASES}
        engine.close()
    whole = whole_updates(updates, repetitions) if updates else {}
    for name, phases in whole.items():
        print(name, ", ".join(f"{phase} {value:.3f} s" for phase, value in phases.items()))
    rows = [
        (name, side, f"{case['tokens_per_second'][side]:.0f}", f"{min(values):.2f} to {max(values):.2f}")
        for name, case in numbers.items()
        for side, values in case["seconds"].items()
    ]
    return rows, {"cases": numbers, "updates": whole}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--updates", type=int, default=20)
    options = parser.parse_args()
    prepare()
    rows, numbers = compare(options.repetitions, options.updates)
    show(f"Completing {PROMPTS} prompts, 17 M Qwen2-VL, one thread", COLUMNS, rows, numbers)


if __name__ == "__main__":
    main()
