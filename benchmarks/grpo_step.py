"""Compare one GRPO step without sampling (scoring by policy and reference, loss, backward) with that of TRL 1.16.

    python -m benchmarks.grpo_step

Both sides get the same weights, prompt, image and completions in one process and alternate; CPU seconds of one thread.
TRL's side is a real `GRPOTrainer` whose `_get_per_token_logps_and_entropies` and `_compute_loss` are called as its
training loop calls them. The losses must agree to 1e-4 and the gradients to 1e-3, else the benchmark fails.

TRL's fused head scores only completion tokens if Triton is available; on a CPU it also scores every prompt token.
Variant `trl` has the behaviour on GPUs, the faster one (`benchmarks.setup.completion_rows_only`): `ratio` compares with
it, `ratio_as_is` with TRL as it runs on a CPU. Gradient checkpointing, TRL's default, is off: it would cost TRL another
forward.

Projecting completions to the vocabulary costs both sides the same, so the gain is below the ratio of tokens. Its limit
is the ratio of the operations of both sides, as PyTorch counts them in these steps; `of_flop_ratio` is the share of it
that is reached in CPU seconds.

Memory is the peak of a first step above the memory before it (weights, libraries), each in a new process.
`memory_ratio` is ours divided by TRL's.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.setup import (
    BETA,
    EPSILON,
    HERE,
    Case,
    OurModels,
    OurStep,
    Place,
    alternate,
    completion_rows_only,
    counted_flops,
    load_ours,
    load_stock,
    make_advantages,
    make_group,
    perturb,
    prepare,
    save_model,
    show,
)

CASES = (Case(1000, 16, 8), Case(600, 200, 6))
VARIANTS = ("ours", "trl", "trl as is")


class TrlStep:
    """The same step as `OurStep`, through TRL's trainer object."""

    def __init__(self, folder: Path, case: Case, compact: bool, workdir: Path, place: Place = HERE) -> None:
        from datasets import Dataset
        from transformers import AutoProcessor
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        config = GRPOConfig(
            output_dir=str(workdir / "trl"),
            use_cpu=place.device.type == "cpu",
            bf16=place.dtype == "bfloat16",
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=case.group,
            num_generations=case.group,
            max_completion_length=case.completion,
            loss_type="grpo",
            beta=BETA,
            epsilon=EPSILON,
            use_bias_correction_kl=False,  # the KL term of our trainer and of the papers
        )
        policy = load_stock(folder, place)
        self.trainer = GRPOTrainer(
            model=policy,
            reward_funcs=_no_reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "?"}]]}),
            processing_class=AutoProcessor.from_pretrained(folder),
        )
        self.trainer.current_gradient_accumulation_steps = 1  # set by the training loop
        self.model = policy.train()
        perturb(policy)
        self.compact = compact
        inputs = _trl_inputs(make_group(load_ours(folder), case), make_advantages(case), policy.config)
        self.inputs = {
            name: value.to(place.device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }

    def __call__(self) -> float:
        """Compute all gradients, starting from none, and return the loss."""
        trainer, inputs = self.trainer, self.inputs
        self.model.zero_grad()
        with completion_rows_only() if self.compact else nullcontext():
            with torch.no_grad():
                reference, _, _ = trainer._get_per_token_logps_and_entropies(
                    trainer.ref_model,
                    torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
                    torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                    inputs["completion_ids"].shape[1],
                    batch_size=trainer.args.per_device_train_batch_size,
                    **{key: inputs[key] for key in ("pixel_values", "image_grid_thw", "num_images")},
                    mm_token_type_ids=inputs["mm_token_type_ids"],
                )
            loss = trainer._compute_loss(self.model, {**inputs, "ref_per_token_logps": reference})
            loss.backward()
        return float(loss.detach())


def _no_reward(completions: list[Any], **_: Any) -> list[float | None]:
    """Return zeros: the trainer's constructor needs a reward function, which is never called."""
    return [0.0 for _ in completions]


def _trl_inputs(group: Any, advantages: torch.Tensor, config: Any) -> dict[str, Any]:
    """Return what TRL's `_generate_and_score_completions` passes to its loss for this group."""
    completions = torch.stack(group.completions)  # [G, R]
    size = len(completions)
    prompts = group.prompt.ids.expand(size, -1)  # [G, P]
    kinds = (prompts == config.image_token_id).int()
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(completions.numel()),
        "pixel_values": group.prompt.pixel_values.repeat(size, 1),
        "image_grid_thw": group.prompt.grid.repeat(size, 1),
        "num_images": [1] * size,
        "mm_token_type_ids": torch.cat([kinds, torch.zeros_like(completions, dtype=kinds.dtype)], 1),
    }


def build(variant: str, folder: Path, case: Case, workdir: Path, place: Place = HERE) -> OurStep | TrlStep:
    """Return the step of one of `VARIANTS`."""
    if variant == "ours":
        return OurStep(OurModels(folder, place), case)
    return TrlStep(folder, case, variant == "trl", workdir, place)


def gradients(step: OurStep | TrlStep) -> dict[str, torch.Tensor]:
    """Return the gradients of the last call."""
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


def assert_same_work(
    case: Case, steps: dict[str, OurStep | TrlStep], allowed: tuple[float, float] = (1e-4, 1e-3)
) -> tuple[float, float]:
    """Return the largest relative difference of TRL's losses and gradients from ours; `allowed`: limit of each.

    Raises:
        AssertionError: The sides do not compute the same.
    """
    loss = steps["ours"]()
    expected = gradients(steps["ours"])
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    worst_loss = worst_gradient = 0.0
    for name, step in steps.items():
        if name == "ours":
            continue
        worst_loss = max(worst_loss, abs(step() - loss) / abs(loss))
        actual = gradients(step)
        assert actual.keys() == expected.keys(), f"{case.name}: {name} has gradients for other parameters"
        distance = torch.cat([(actual[key] - expected[key]).flatten() for key in expected]).norm()
        worst_gradient = max(worst_gradient, float(distance / norm))
    assert worst_loss < allowed[0], f"{case.name}: the losses differ by {worst_loss:.1e}"
    assert worst_gradient < allowed[1], f"{case.name}: the gradients differ by {worst_gradient:.1e}"
    return worst_loss, worst_gradient


def peak_memory(step: Callable[[], Any]) -> float:
    """Return how many MiB the peak resident memory of the first call is above that before it."""
    # "5" resets VmHWM; ru_maxrss would still have the peak of importing and loading
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"{key}:\s+(\d+) kB", text)
    assert match is not None
    return int(match[1]) / 1024


def peak_memory_in_fresh_process(variant: str, folder: Path, case: Case) -> float:
    """Measure `peak_memory` of a variant in a new process."""
    size = [str(case.prompt), str(case.completion), str(case.group)]
    command = [
        sys.executable,
        "-m",
        "benchmarks.grpo_step",
        "--memory",
        variant,
        "--model",
        str(folder),
        "--case",
        *size,
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure(case: Case, folder: Path, workdir: Path, repetitions: int) -> dict[str, Any]:
    """Measure all numbers of one case."""
    steps = {name: build(name, folder, case, workdir) for name in VARIANTS}
    loss_difference, gradient_difference = assert_same_work(case, steps)
    flops = {name: counted_flops(step) for name, step in steps.items()}
    seconds = alternate(steps, repetitions)
    memory = {name: peak_memory_in_fresh_process(name, folder, case) for name in VARIANTS}
    ours, flop_ratio = seconds["ours"].median, flops["trl"] / flops["ours"]
    return {
        "ratio": seconds["trl"].median / ours,
        "flop_ratio": flop_ratio,
        "of_flop_ratio": seconds["trl"].median / ours / flop_ratio,
        "memory_ratio": memory["ours"] / memory["trl"],
        "ratio_as_is": seconds["trl as is"].median / ours,
        "memory_ratio_as_is": memory["ours"] / memory["trl as is"],
        "token_ratio": case.plain_tokens / case.shared_tokens,
        "loss_difference": loss_difference,
        "gradient_difference": gradient_difference,
        "seconds": {name: list(times.values) for name, times in seconds.items()},
        "gflops": {name: count / 1e9 for name, count in flops.items()},
        "memory_mib": memory,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as workdir:
        place = Path(workdir)
        if options.memory:
            print(peak_memory(build(options.memory, options.model, Case(*options.case), place)))
            return
        folder = save_model(place / "model")
        cases = {case.name: measure(case, folder, place, options.repetitions) for case in CASES}
    rows = []
    for case in CASES:
        numbers = cases[case.name]
        for name in VARIANTS:
            from_ours = name == "ours"
            suffix = "_as_is" if name == "trl as is" else ""
            seconds = sorted(numbers["seconds"][name])
            rows.append(
                (
                    case.name,
                    name,
                    f"{seconds[len(seconds) // 2]:.2f} [{seconds[0]:.2f}, {seconds[-1]:.2f}]",
                    "" if from_ours else f"{numbers['ratio' + suffix]:.2f}",
                    f"{numbers['gflops'][name]:.0f}",
                    "" if from_ours else f"{numbers['gflops'][name] / numbers['gflops']['ours']:.2f}",
                    f"{numbers['memory_mib'][name]:.0f}",
                    "" if from_ours else f"{numbers['memory_ratio' + suffix]:.2f}",
                )
            )
    columns = ("case", "variant", "CPU s: median [min, max]", "x ours", "GFLOP", "x ours", "peak MiB", "ours / it")
    for case in CASES:
        found = cases[case.name]
        shares = f"{found['ratio']:.2f} of {found['flop_ratio']:.2f} in operations ({found['of_flop_ratio']:.0%})"
        print(f"{case.name}: {shares}, {found['token_ratio']:.2f} in tokens")
    show("One GRPO step without sampling, 17 M Qwen2-VL, one thread", columns, rows, {"cases": cases})


if __name__ == "__main__":
    main()
