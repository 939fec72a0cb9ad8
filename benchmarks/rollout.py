"""Compare sampling the completions of a group with transformers' `generate`; our sampler computes the prompt once.

    python -m benchmarks.rollout
    python -m benchmarks.rollout --engines         # vLLM and whole updates as well (benchmarks/engines.py)

`generate(num_return_sequences=G)` repeats the prompt and its image G times and computes all copies. Both sides sample
from the same weights at temperature 1 without truncation, ban the same ids, and decode a fixed number of tokens, since
end-of-sequence ids are banned. They alternate in one process; CPU seconds of one thread.

Before timing, both sides decode greedily and must give the same tokens, which shows that they do the same work.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines
from benchmarks.setup import Case, Seconds, alternate, load_ours, load_stock, make_group, prepare, save_model, show
from common.rollout.base import Decoding, Request
from common.rollout.hf import HFRollout

CASE = Case(1000, 16, 8)


class OurRollout:
    """Our sampler, `HFRollout`, on one prompt."""

    def __init__(self, folder: Path, case: Case) -> None:
        loaded = load_ours(folder)
        # with end-of-sequence ids banned, every completion has its full length
        self.policy = replace(loaded, banned=tuple(sorted({*loaded.banned, *loaded.eos})))
        self.prompt, self.case = make_group(self.policy, case).prompt, case
        self.request = Request(self.prompt, "0", lambda: self.prompt.ids, list)
        self.rollout = HFRollout(self.policy)

    def __call__(self, sample: bool = True) -> torch.Tensor:
        """Return completions. Shape: [G, R]."""
        decoding = Decoding(1.0 if sample else 0.0, 0, 1.0, self.case.completion)
        return torch.stack([c.ids for c in self.rollout.generate([self.request], self.case.group, decoding)[0]])


class StockRollout:
    """The method `generate` of transformers, on the same prompt and weights."""

    def __init__(self, folder: Path, ours: OurRollout) -> None:
        self.model, self.case = load_stock(folder).eval(), ours.case
        ids = ours.prompt.ids[None]
        self.inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
            "pixel_values": ours.prompt.pixel_values,
            "image_grid_thw": ours.prompt.grid,
        }
        self.banned = list(ours.policy.banned)

    def __call__(self, sample: bool = True) -> torch.Tensor:
        """Return completions. Shape: [G, R]; one row if greedy."""
        sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": self.case.group}
        out = self.model.generate(
            **self.inputs,
            **(sampling if sample else {}),
            do_sample=sample,
            suppress_tokens=self.banned,
            max_new_tokens=self.case.completion,
        )
        return out[:, self.inputs["input_ids"].shape[1] :]


def measure(case: Case, folder: Path, repetitions: int) -> tuple[dict[str, Seconds], dict[str, Any]]:
    """Return the CPU seconds of both sides, and the numbers of the case."""
    ours = OurRollout(folder, case)
    stock = StockRollout(folder, ours)
    assert torch.equal(ours(sample=False)[:1], stock(sample=False)), "the two samplers decode different tokens greedily"
    assert ours().shape == stock().shape == (case.group, case.completion)
    seconds = alternate({"ours": ours, "generate": stock}, repetitions)
    ratio = seconds["generate"].median / seconds["ours"].median
    return seconds, {"ratio": ratio, "seconds": {name: list(times.values) for name, times in seconds.items()}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--engines", action="store_true", help="also vLLM, and whole updates by phase; make setup-vllm")
    parser.add_argument("--updates", type=int, default=20, help="of each whole training")
    options = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as workdir:
        seconds, numbers = measure(CASE, save_model(Path(workdir) / "model"), options.repetitions)
    rows = [
        (CASE.name, name, str(times), "" if name == "ours" else f"{numbers['ratio']:.2f}")
        for name, times in seconds.items()
    ]
    columns = ("case", "variant", "CPU s: median [min, max]", "x ours")
    found = {"cases": {CASE.name: numbers}}
    if options.engines:
        more, beside = engines.compare(options.repetitions, options.updates)
        show(f"Completing {engines.PROMPTS} prompts, 17 M Qwen2-VL, one thread", engines.COLUMNS, more, beside)
        found |= {"engines": beside["cases"], "updates": beside["updates"]}
    show("Sampling one group, 17 M Qwen2-VL, one thread", columns, rows, found)


if __name__ == "__main__":
    main()
