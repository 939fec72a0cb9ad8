"""Rehearse a run at real size: a published architecture through every step of a run.

    python -m benchmarks.rehearse model=qwen2_vl_2b method=clsrl
    python -m benchmarks.rehearse depth=full steps=checks model=qwen2_vl_2b method=clsrl model.lora.r=16
    python -m benchmarks.rehearse tokenizer=/folder model=gemma3_4b method=alert

Overrides are those of run.py. Further arguments: `depth`: layers of the language model (2), `full`, or `real`: the
weights that model.path names, if they are on this machine (the default on a GPU). `tokenizer`: folder of the real one;
default: that in the hub's cache, else that of the tiny model. `steps`: some of the steps, separated by commas. `out`:
folder (outputs/rehearsal). `keep=true`: keep the weights and runs there.

Without a GPU, it takes a few minutes: random weights, fewer layers, few photos. With GPUs, it uses the sizes of the
configuration, and adds checks that need GPUs: kernels, 8 bits, vLLM, ZeRO-3 on all GPUs, and memory against the
doctor's estimate. At the end it prints a table and writes rehearsal.json, for reports. Exit code 1 if a line failed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.rehearse import composed
from benchmarks.rehearse.checkpoint import PUBLISHED
from benchmarks.rehearse.lines import Line
from common.config import suggest
from common.config.schema import Config, GRPOConfig
from common.models import files
from common.runtime import process
from common.types import UserError
from run import one_line

OWN = ("depth", "tokenizer", "steps", "out", "keep")
NAMES = ("Boeing 707-320", "crème brûlée", "tiger cat")  # real tokenizers cut them into several tokens
SMALL = {
    "data": "folder",
    "shots": "2",
    "validation": "none",
    "setting.test_per_class": "1",
    "trainer.updates": "3",
    "checkpoint.every": "1",
    "doctor": "false",
    "tracking": "none",
}
ON_GPUS = {"gpus": "1"}
ON_THE_CPU = {
    "gpus": "0",
    "model.load_in_8bit": "false",  # runs refuse 8 or 4 bits on a CPU; `checks` and `update` use them if configured
    "model.load_in_4bit": "false",
    "rollout.max_completion_tokens": "6",
    "trainer.prompts_per_update": "2",
}
UPDATES, PAPER = 2500, "in CLS-RL 94 (direct) and 1,587 (thinking) on eight A100"  # section 5.2, table 3
FILE = "rehearsal.json"
INTERRUPTED = 130  # exit code of run.py after a signal
ROUNDED = 0.05  # largest change by rounding in bf16: of a probability, or relative change of a gradient norm
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes", "vllm", "flash_attn", "trl")


@dataclass
class Rehearsal:
    """A rehearsal: configuration, overrides for run.py, output folder, number of GPUs, and the results so far."""

    config: Config
    overrides: list[str]
    out: Path
    gpus: int
    lines: list[Line] = field(default_factory=list)

    def run(self, name: str, *more: str) -> list[str]:
        """Return the command of a run."""
        return ["run.py", *self.overrides, f"hydra.run.dir={self.out / name}", *more]

    def go(
        self,
        check: str,
        command: Sequence[str],
        judge: Callable[[], list[Line]],
        stop: Callable[[], bool] = lambda: False,
        code: int = 0,
    ) -> list[Line]:
        """Run a Python command to its end and check what it has written; the lines get its seconds and peak memory.

        The peak is that of its largest process; on GPUs, that of all memory in use on the first GPU.

        Args:
            check: Name of the check, for the log and for the line of a failure.
            command: Arguments of `python`.
            judge: Function that checks the results if the exit code is as expected; else the last message becomes a
                failed line.
            stop: Condition on which the process gets SIGTERM.
            code: Expected exit code.
        """
        log, began, high, asked = self.out / f"{check}.log", time.perf_counter(), 0.0, False
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT)
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                if not asked and stop():
                    process.send_signal(signal.SIGTERM)
                    asked = True
                if self.gpus:
                    free, total = torch.cuda.mem_get_info(0)
                    high = max(high, (total - free) / 2**30)
                time.sleep(0.2)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        seconds, peak = time.perf_counter() - began, high or ended[2].ru_maxrss / 2**20
        failure = failed(check, process.returncode, log.read_text("utf-8", errors="replace"))
        lines = judge() if process.returncode == code else [failure]
        return [line if line.seconds else replace(line, seconds=seconds, peak=peak) for line in lines]


def failed(check: str, code: int, said: str) -> Line:
    """Return the line of a process with an unexpected exit code; its last error message names the key."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    told = next((line for line in reversed(lines) if "rror" in line), lines[-1])
    return Line(check, "failed", f"exit code {code}: {told}"[:600])


def checks(plan: Rehearsal, names: str = "prompts,forwards,labels", *more: str) -> list[Line]:
    """Run checks.py in a new process; with weights in 8 or 4 bits if the configuration has them, even on a CPU."""
    file, bits = plan.out / "checks.json", plan.config.model.bits if find_spec("bitsandbytes") else None
    overrides = [*plan.overrides, *([f"model.load_in_{bits}bit=true"] if bits else []), *more]
    command = ["-m", "benchmarks.rehearse.checks", str(file), str(plan.out / "none"), names, *overrides]
    return plan.go("checks", command, lambda: [Line(**line) for line in json.loads(file.read_text("utf-8"))])


def update(plan: Rehearsal) -> list[Line]:
    """Make one update in a new process, with weights in 8 or 4 bits if configured."""
    return checks(plan, "update")


def train(plan: Rehearsal) -> list[Line]:
    """Start a run and stop it after its first checkpoint."""
    run = plan.out / "run"
    judge, stop = partial(trained, "training, stopped", run), partial(any_state, run)
    return plan.go("train", plan.run("run"), lambda: [judge()], stop, INTERRUPTED)


def any_state(run: Path) -> bool:
    """Return whether a run has written a checkpoint."""
    return any((run / "checkpoints").glob("step-*[0-9]/state.json"))


def resume(plan: Rehearsal) -> list[Line]:
    """Run the same command again, to its end; check that it resumes where it was stopped and changes the weights."""
    run = plan.out / "run"
    before = len(updates(run))

    def judge() -> list[Line]:
        steps = [row["step"] for row in updates(run)]
        whole = steps == list(range(1, len(steps) + 1)) and len(steps) > before > 0
        seen = f"{before} updates before the stop, {len(steps)} in all"
        resumed = Line("resumed", "ok" if whole else "failed", seen, "checkpoint.every")
        return [resumed, moved(Path(plan.config.model.path or ""), run / "model"), pace(run, plan.gpus)]

    return plan.go("resume", plan.run("run"), judge)


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl: evaluations and updates."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def updates(run: Path) -> list[dict[str, Any]]:
    """Return the rows of updates."""
    return [row for row in rows(run) if "grad_norm" in row]


def trained(check: str, run: Path) -> Line:
    """Check that every update has a finite loss and a gradient that is neither zero nor infinite."""
    made = updates(run)
    names = ("loss", "grad_norm", "reward", "sampling/sampling_logp_difference/mean")
    figures = {name: [row[name] for row in made if name in row] for name in names}
    right = bool(made) and all(math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in made)
    seen = "gradient norms " + ", ".join(f"{norm:.3g}" for norm in figures["grad_norm"])
    return Line(check, "ok" if right else "failed", seen, "trainer.learning_rate, rewards", figures)


def pace(run: Path, gpus: int) -> Line:
    """Report the seconds of the last update by phase, and on a GPU the time of the paper's updates at that pace."""
    phases = json.loads((run / "timings.jsonl").read_text("utf-8").splitlines()[-1])
    del phases["step"]
    total = sum(phases.values())
    parts = ", ".join(f"{name} {value:.1f}" for name, value in phases.items())
    whole = f"; {UPDATES} would take {total * UPDATES / 60:.0f} min here, {PAPER}" if gpus else ""
    return Line("seconds per update", "ok", f"{total:.1f} s ({parts}){whole}", "", phases)


def moved(base: Path, model: Path) -> Line:
    """Check that the weights that a run has written differ from those that it started from."""
    from safetensors.torch import load_file

    before = {name: weight for file in files.weight_files(base) for name, weight in load_file(file).items()}
    adapters = model / files.ADAPTERS[1]
    written = [adapters] if adapters.is_file() else files.weight_files(model)
    after = {name: weight for file in written for name, weight in load_file(file).items()}
    fresh = [bool(weight.any()) for name, weight in after.items() if "lora_B" in name]  # initially zero
    others = fresh + [not torch.equal(weight, before[name]) for name, weight in after.items() if name in before]
    seen = f"{sum(others)} of {len(others)} weights are others than before"
    figures = {"changed": sum(others), "of": len(others)}
    return Line("weights moved", "ok" if any(others) else "failed", seen, "trainer.learning_rate", figures)


def predict(plan: Rehearsal) -> list[Line]:
    """Classify a photo with the run and with its export; answers differ only by rounding of merged adapters."""
    photo, exported = next((plan.out / "photos").rglob("*.jpg")), plan.out / "exported"

    def ask(check: str, source: Path) -> list[Line]:
        target = plan.out / f"{check}.jsonl"
        asked = [str(source), str(photo), "--format", "jsonl", "--output", str(target), "--trust-code"]
        return plan.go(check, ["-m", "common.predict", *asked], lambda: [answer(check, target)])

    export = ["-m", "common.export", str(plan.out / "run"), str(exported), "--trust-code"]
    lines = ask("predict", plan.out / "run")
    lines += plan.go("export", export, lambda: [Line("export", "ok", "written")])
    (line,) = ask("predict by the export", exported)
    if line.verdict == lines[0].verdict == "ok":
        own = lines[0].figures
        gap = max(abs(share - line.figures.get(name, 0.0)) for name, share in own.items())
        seen = f"{line.seen}; differs by {gap:.3f} from the run's"
        line = replace(line, seen=seen, verdict="ok" if gap < ROUNDED else "off", fix="model.dtype=float32")
    return [*lines, line]


def answer(check: str, file: Path) -> Line:
    """Return a line with the predicted names and their probabilities."""
    top = dict(json.loads(file.read_text("utf-8").splitlines()[0])["top"])
    return Line(check, "ok", ", ".join(f"{name} {share:.3f}" for name, share in top.items()), "", top)


def ranks(plan: Rehearsal) -> list[Line]:
    """Run ZeRO-3 on two processes (gloo) or all GPUs (NCCL); compare with the first update of the run on one rank."""
    count = plan.gpus or 2
    check, run, alone = f"ZeRO-3, {count} ranks", plan.out / "ranks", plan.out / "run"
    command = plan.run("ranks", "deepspeed=zero3", "trainer.updates=1", f"gpus={plan.gpus}")
    if not plan.gpus:
        command = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), *command]

    def judge() -> list[Line]:
        line = trained(check, run)
        return [beside(line, run, alone) if line.verdict == "ok" and updates(alone) else line]

    return plan.go("ranks", command, judge)


def beside(line: Line, run: Path, alone: Path) -> Line:
    """Return the line of a run on several ranks, `off` if it differs at first from the run on one rank.

    Label probabilities before training must be equal. The first gradient norms must be equal if both sampled the same
    completions, that is, if their rewards are equal; in bf16 a sampled token may differ.
    """
    first, other = updates(run)[0], updates(alone)[0]
    scores = [[value for name, value in rows(each)[0].items() if name.endswith("/brier")] for each in (run, alone)]
    gaps = [abs(a - b) for a, b in zip(*scores, strict=True)]
    if alike := first.get("reward") == other.get("reward"):
        gaps.append(abs(first["grad_norm"] / other["grad_norm"] - 1))
    seen = f"{line.seen} (one rank: {other['grad_norm']:.3g}{'' if alike else ', other completions'})"
    verdict = "ok" if all(gap < ROUNDED for gap in gaps) else "off"
    return replace(line, seen=seen, verdict=verdict, fix="deepspeed=zero2", figures={**line.figures, "gaps": gaps})


def doctor(plan: Rehearsal) -> list[Line]:
    """Compare the doctor's estimate of GPU memory with the peak of the training."""
    took = max((line.peak for line in plan.lines if line.check == "training, stopped"), default=0.0)

    def judge() -> list[Line]:
        said = (plan.out / "doctor.log").read_text("utf-8")
        found = re.search(r"about ([\d.]+) (GiB|MiB)", said)
        estimate = math.nan if found is None else float(found[1]) / (1 if found[2] == "GiB" else 1024)
        seen, near = f"estimates {estimate:.1f} GiB, the training took {took:.1f}", abs(estimate / took - 1) < 0.25
        return [Line("doctor", "ok" if near else "off", seen, "doctor=false", {"said": said[-4000:]})]

    asked = plan.gpus and took and isinstance(plan.config.trainer, GRPOConfig)
    return plan.go("doctor", plan.run("doctor", "doctor=true"), judge) if asked else []


def few_bits(plan: Rehearsal) -> list[Line]:
    """Train adapters on weights in 8 and in 4 bits, if there is a GPU."""
    rank = [] if plan.config.model.lora.wraps else ["model.lora.r=16"]
    found = []
    for bits in (8, 4) if plan.gpus else ():
        if bits != plan.config.model.bits:
            name = f"bits-{bits}"
            words = [f"model.load_in_{each}bit={str(each == bits).lower()}" for each in (8, 4)]
            command = plan.run(name, *words, "trainer.updates=1", *rank)
            found += plan.go("few_bits", command, partial(_trained_once, f"{bits} bits", plan.out / name))
    return found


def _trained_once(check: str, run: Path) -> list[Line]:
    return [trained(check, run)]


def push(plan: Rehearsal) -> list[Line]:
    """Check that vLLM agrees with the trainer before and after weights change, if it is installed."""
    return checks(plan, "push", "rollout=vllm") if plan.gpus and find_spec("vllm") is not None else []


def trl(plan: Rehearsal) -> list[Line]:
    """Compare seconds with those of TRL in one process, if there is a GPU."""
    return checks(plan, "trl") if plan.gpus else []


STEPS: dict[str, Callable[[Rehearsal], list[Line]]] = {
    step.__name__: step for step in (checks, update, train, resume, predict, ranks, doctor, few_bits, push, trl)
}


def photos(folder: Path, size: int) -> Path:
    """Write four photos of every class: blurred noise in the colour of the class."""
    generator = numpy.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for photo in range(4):
            noise = generator.integers(0, 120, (8, 8, 3), dtype=numpy.uint8)
            noise[..., number] += 120
            picture = Image.fromarray(noise).resize((size, size * 3 // 4), Image.Resampling.BICUBIC)
            picture.save(folder / name / f"{photo}.jpg", quality=95)
    return folder


def prepare(own: dict[str, str], given: list[str]) -> Rehearsal:
    """Compose the configuration, write weights and photos.

    Raises:
        UserError: An argument is wrong, or the model is not in PUBLISHED.
    """
    gpus, config = torch.cuda.device_count(), composed(given)
    if config.model.name not in PUBLISHED:
        raise UserError(f"model={config.model.name}: a rehearsal knows {', '.join(PUBLISHED)}")
    if config.trainer.name == "none":
        raise UserError(f"method={config.method['name']} trains nothing; rehearse one that does, such as method=clsrl")
    out = Path(own.get("out", "outputs/rehearsal")).resolve()
    if out.exists() and not (out / FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} holds something else than a rehearsal; give a new folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / FILE).write_text("{}", encoding="utf-8")  # marks the folder, so that the next rehearsal may replace it
    real = here(config, weights=True) if own.get("depth", "real" if gpus else "2") == "real" else None
    folder = real or write(own, config, out, gpus)
    values = SMALL | (ON_GPUS if gpus else ON_THE_CPU) | {"cache_dir": str(out / "cache")}
    pictures = photos(out / "photos", config.model.image_size)
    if isinstance(config.trainer, GRPOConfig):
        values["+rewards.varied"] = "{weight: 1.0, fn: benchmarks.rehearse.varied}"
    # overrides of the user take precedence over the small sizes of a rehearsal
    typed = {word.split("=", 1)[0].lstrip("+") for word in given}
    values |= {} if "data" in typed else {"data.folder": str(pictures)}
    kept = [f"{key}={value}" for key, value in values.items() if key.lstrip("+") not in typed]
    named = [*kept, *(word for word in given if not word.startswith("model.path=")), f"model.path={folder}"]
    return Rehearsal(replace(config, model=replace(config.model, path=str(folder))), named, out, gpus)


def here(config: Config, weights: bool) -> Path | None:
    """Return the folder of the configured model if it is on this machine, else None."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return files.find(config.model.path or "", config.model.revision, weights)
    except UserError:
        return None


def write(own: dict[str, str], config: Config, out: Path, gpus: int) -> Path:
    """Write random weights, in a new process; return their folder."""
    depth = own.get("depth", "full" if gpus else "2")
    if depth not in ("full", "real") and not depth.isdigit():
        raise UserError(f"depth={depth}: give a number of layers, full or real")
    layers = [] if not depth.isdigit() else ["--layers", depth, "--vision-layers", str(max(1, int(depth) // 2))]
    tokenizer = Path(own["tokenizer"]) if "tokenizer" in own else here(config, weights=False)
    if "tokenizer" in own and not any(Path(own["tokenizer"]).glob("tokenizer.json*")):
        raise UserError(f"tokenizer={own['tokenizer']}: there is no tokenizer.json in it")
    named = [] if tokenizer is None else ["--tokenizer", str(tokenizer)]
    command = [sys.executable, "-m", "benchmarks.rehearse.checkpoint", config.model.name, str(out / "weights")]
    subprocess.run([*command, *layers, *named], check=True, stdout=subprocess.DEVNULL)
    return out / "weights"


def report(lines: Sequence[Line], title: str) -> Table:
    """Return the lines as a table for the terminal."""
    table = Table("check", "", "seen", "s", "GiB", title=title, title_justify="left")
    for line in lines:
        fix = f"\nchange: {line.fix}" if line.fix and line.verdict != "ok" else ""
        table.add_row(line.check, line.verdict, Text(line.seen + fix), f"{line.seconds:.0f}", f"{line.peak:.1f}")
    return table


def main(words: Sequence[str]) -> int:
    """Run the chosen steps; return the exit code."""
    own = dict(word.split("=", 1) for word in words if word.split("=", 1)[0] in OWN)
    given = [word for word in words if word.split("=", 1)[0] not in OWN]
    chosen = own.get("steps", ",".join(name for name in STEPS if name != "update")).split(",")
    if unknown := set(chosen) - set(STEPS):
        raise UserError(f"steps={unknown.pop()}: choose from {', '.join(STEPS)}")
    process.set_thread_policy()
    plan = prepare(own, given)
    for name in chosen:
        print(f"{name} …", flush=True)
        try:
            plan.lines += STEPS[name](plan)
        except Exception as error:  # for example, a file that a step did not write
            plan.lines.append(Line(name, "failed", f"{type(error).__name__}: {error}"))
    device = torch.cuda.get_device_name(0) if plan.gpus else platform.processor() or "CPU"
    told = {
        "versions": {name: version(name) for name in PACKAGES if find_spec(name) is not None},
        "device": device,
        "gpus": plan.gpus,
        "overrides": list(words),
        "lines": [asdict(line) for line in plan.lines],
    }
    file = plan.out / FILE
    file.write_text(json.dumps(told, indent=1, default=str), encoding="utf-8")
    Console(width=140).print(report(plan.lines, " ".join(words)))
    if own.get("keep") != "true":
        for path in plan.out.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
    print(f"{file}: send it along")
    return int(any(line.verdict == "failed" for line in plan.lines))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, HydraException, OmegaConfBaseException) as error:
        explained = suggest.explain(error, sys.argv[1:])
        sys.exit(f"error: {explained}" if explained else one_line(error))
