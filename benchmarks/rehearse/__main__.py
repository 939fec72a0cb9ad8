"""A run at real size before there is one: the published architecture through every step that a run takes.

    python -m benchmarks.rehearse model=qwen2_vl_2b method=clsrl
    python -m benchmarks.rehearse depth=full steps=checks model=qwen2_vl_2b method=clsrl model.lora.r=16
    python -m benchmarks.rehearse tokenizer=/folder model=gemma3_4b method=alert

Overrides are those of run.py. Beside them: `depth`: layers of the language model (2), `full`, or `real`: the weights
that model.path names, if they are here (the default on a GPU). `tokenizer`: folder of the real one, else the hub's
cache, else the tiny model's. `steps`: some of them, by commas. `out`: folder (outputs/rehearsal). `keep=true`: leave
the weights and runs there.

Without a GPU a few minutes: random weights, fewer layers, few photos. With GPUs the same on them at the sizes of the
configuration, and what only they show: kernels, 8 bits, vLLM, all of them under ZeRO-3, memory beside the doctor's
estimate. It ends with a table and with rehearsal.json, to send along. Exit code 1 if a line failed.
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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.rehearse.checkpoint import PUBLISHED
from benchmarks.rehearse.checks import composed
from benchmarks.rehearse.lines import Line
from common.config.schema import Config, GRPOConfig
from common.models import files
from common.runtime import threads
from common.types import UserError

OWN = ("depth", "tokenizer", "steps", "out", "keep")
NAMES = ("Boeing 707-320", "crème brûlée", "tiger cat")  # real tokenizers cut them into several tokens
SMALL = {  # without a GPU
    "gpus": "0",
    "model.load_in_8bit": "false",  # bitsandbytes' are refused there; `checks` has them
    "rollout.max_completion_tokens": "6",
    "trainer.prompts_per_update": "2",
}
UPDATES, PAPER = 2500, "in CLS-RL 94 (direct) and 1,587 (thinking) on eight A100"  # section 5.2, table 3
ROUNDED = 0.05  # of a probability, when adapters become part of bf16 weights
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes", "vllm", "flash_attn", "trl")


@dataclass
class Rehearsal:
    """Where it happens and with what: the words for run.py, and what has been seen."""

    config: Config
    overrides: list[str]
    out: Path
    gpus: int

    def words(self, name: str, *more: str) -> list[str]:
        """What starts a run."""
        return ["run.py", *self.overrides, f"hydra.run.dir={self.out / name}", *more]


@dataclass(frozen=True)
class Done:
    """How a process ended: exit code, seconds, the peak in GiB, and the end of what it said."""

    code: int
    seconds: float
    peak: float
    said: str


def go(command: Sequence[str], log: Path, gpus: int, until: Callable[[], bool] | None = None) -> Done:
    """Run Python to its end; once `until` holds, it is asked to stop.

    The peak is that of its largest process; on GPUs, that of the first one, with whatever else it holds.
    """
    began, high = time.perf_counter(), 0.0
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            if until is not None and until():
                process.send_signal(signal.SIGTERM)
                until = None
            if gpus:
                free, total = torch.cuda.mem_get_info(0)
                high = max(high, (total - free) / 2**30)
            time.sleep(0.2)
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code
    said = log.read_text("utf-8", errors="replace")
    return Done(code, time.perf_counter() - began, high or usage.ru_maxrss / 2**20, said)


def outcome(check: str, done: Done, expected: int = 0) -> Line | None:
    """The failed line of a process that did not end as expected; its last message names the key."""
    if done.code == expected:
        return None
    lines = [line.strip() for line in done.said.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "it said nothing")
    return Line(check, "failed", f"exit code {done.code}: {told}"[:600], seconds=done.seconds, peak=done.peak)


def checks(plan: Rehearsal, names: str = "prompts,forwards,labels") -> list[Line]:
    """checks.py in a process of its own; in the configuration's 8 bits, if it asks for them, on the CPU too."""
    overrides, file = list(plan.overrides), plan.out / "checks.json"
    if plan.config.model.load_in_8bit and find_spec("bitsandbytes") is not None:
        overrides.append("model.load_in_8bit=true")
    command = ["-m", "benchmarks.rehearse.checks", str(file), str(plan.out / "none"), names]
    done = go([*command, *overrides], plan.out / "checks.log", 0)
    if failed := outcome("checks", done):
        return [failed]
    return [Line(**line) for line in json.loads(file.read_text("utf-8"))]


def update(plan: Rehearsal) -> list[Line]:
    """One update in a process that does nothing else, in 8 bits if the configuration asks for them."""
    return checks(plan, "update")


def trl(plan: Rehearsal) -> list[Line]:
    """Seconds beside TRL's in one process, where there is a GPU."""
    return checks(plan, "trl") if plan.gpus else []


def push(plan: Rehearsal) -> list[Line]:
    """Parity with a sampler that has weights of its own (rollout=vllm), before and after they change."""
    if plan.config.rollout.name != "vllm" and find_spec("vllm") is None:
        return []
    more = [] if plan.config.rollout.name == "vllm" else ["rollout=vllm"]
    return checks(replace(plan, overrides=[*plan.overrides, *more]), "push")


def train(plan: Rehearsal) -> list[Line]:
    """A run that is stopped after its first checkpoint."""
    states = plan.out / "run" / "checkpoints"
    done = go(plan.words("run"), plan.out / "train.log", plan.gpus, lambda: any(states.glob("*/state.json")))
    if failed := outcome("training, stopped", done, expected=130):
        return [failed]
    rows = metrics(plan.out / "run")
    return [replace(trained("training, stopped", rows), seconds=done.seconds, peak=done.peak)]


def resume(plan: Rehearsal) -> list[Line]:
    """The same command again, to its end: it goes on where it was stopped, and the weights have moved."""
    before = len(metrics(plan.out / "run"))
    done = go(plan.words("run"), plan.out / "resume.log", plan.gpus)
    if failed := outcome("resumed", done):
        return [failed]
    rows = metrics(plan.out / "run")
    steps = [row["step"] for row in rows if "grad_norm" in row]
    whole = steps == list(range(1, len(steps) + 1))
    seen = f"{before} updates before the stop, {len(steps)} in all"
    lines = [
        Line("resumed", "ok" if whole and len(steps) > before > 0 else "failed", seen, "checkpoint.every"),
        moved(Path(plan.config.model.path or ""), plan.out / "run" / "model"),
        pace(plan.out / "run"),
    ]
    return [replace(line, seconds=done.seconds, peak=done.peak) for line in lines]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl with an update each."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
    return [row for row in rows if "grad_norm" in row]


def trained(check: str, rows: Sequence[dict[str, Any]]) -> Line:
    """Every update has a loss that is a number and a gradient that is not zero."""
    names = ("loss", "grad_norm", "reward", "sampling/sampling_logp_difference/mean")
    figures = {name: [row[name] for row in rows if name in row] for name in names}
    right = bool(rows) and all(math.isfinite(x) for x in figures["loss"]) and all(x > 0 for x in figures["grad_norm"])
    norms = ", ".join(f"{norm:.3g}" for norm in figures["grad_norm"])
    return Line(
        check, "ok" if right else "failed", f"gradient norms {norms}", "trainer.learning_rate, rewards", figures
    )


def pace(run: Path) -> Line:
    """Seconds of the last update by phase, and what the paper's updates would take at that pace."""
    last = json.loads((run / "timings.jsonl").read_text("utf-8").splitlines()[-1])
    phases = {name: value for name, value in last.items() if name != "step"}
    total = sum(phases.values())
    parts = ", ".join(f"{name} {value:.1f}" for name, value in phases.items())
    seen = f"{total:.1f} s ({parts}); {UPDATES} would take {total * UPDATES / 60:.0f} min here"
    return Line("seconds per update", "ok", f"{seen}, {PAPER}", "", phases)


def moved(base: Path, model: Path) -> Line:
    """Whether the weights that a run has written are others than those that it was given."""
    from safetensors import safe_open

    first: dict[str, Path] = {}
    for file in files.weight_files(base):
        with safe_open(file, "pt") as shard:
            first |= dict.fromkeys(shard.keys(), file)
    still, changed = 0, 0
    adapters = model / files.ADAPTERS[1]
    for file in [adapters] if adapters.is_file() else files.weight_files(model):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  # it is no dict
                weight = shard.get_tensor(name)
                if "lora_B" in name:  # it begins with zeros
                    other = bool(weight.any())
                elif name in first:
                    with safe_open(first[name], "pt") as original:
                        other = not torch.equal(weight, original.get_tensor(name))
                else:
                    continue
                still, changed = still + (not other), changed + other
    seen = f"{changed} of {changed + still} weights are others than before"
    figures = {"changed": changed, "still": still}
    return Line("weights moved", "ok" if changed else "failed", seen, "trainer.learning_rate", figures)


def predict(plan: Rehearsal) -> list[Line]:
    """A photo through the run and through what it exports: the same answer, up to adapters rounded into weights."""
    photo = next((plan.out / "photos" / NAMES[0]).iterdir())
    exported = plan.out / "exported"
    answers: list[dict[str, float]] = []
    lines: list[Line] = []
    export = ["-m", "common.export", str(plan.out / "run"), str(exported), "--trust-code"]
    for check, command in (("predict", None), ("export", export), ("predict by the export", None)):
        if command is None:
            source, target = (plan.out / "run" if check == "predict" else exported), plan.out / f"{len(lines)}.jsonl"
            asked = [str(source), str(photo), "--format", "jsonl", "--output", str(target), "--trust-code"]
            command = ["-m", "common.predict", *asked]
        done = go(command, plan.out / f"{check}.log", plan.gpus)
        if failed := outcome(check, done):
            return [*lines, failed]
        line = Line(check, "ok", "written", seconds=done.seconds, peak=done.peak)
        if check != "export":
            answer = json.loads(target.read_text("utf-8").splitlines()[0])
            answers.append(dict(answer["top"]))  # names and their probabilities
            seen = ", ".join(f"{name} {share:.3f}" for name, share in answer["top"])
            line = replace(line, seen=seen, figures=answer)
        lines.append(line)
    gap = max(abs(share - answers[1].get(name, 0.0)) for name, share in answers[0].items())
    if not gap < ROUNDED:
        lines[-1] = replace(lines[-1], verdict="off", seen=f"{lines[-1].seen}; the run says it {gap:.3f} otherwise")
    return lines


def ranks(plan: Rehearsal) -> list[Line]:
    """ZeRO-3 on two processes (gloo), or on all GPUs (NCCL), beside the first update of the run on one."""
    count = torch.cuda.device_count() if plan.gpus else 2
    check = f"ZeRO-3, {count} ranks"
    more = ["deepspeed=zero3", "trainer.updates=1", *([f"gpus={count}"] if plan.gpus else [])]
    command = plan.words("ranks", *more)
    if not plan.gpus:
        command = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), *command]
    done = go(command, plan.out / "ranks.log", plan.gpus)
    if failed := outcome(check, done):
        return [failed]
    rows, alone = metrics(plan.out / "ranks"), metrics(plan.out / "run")
    line = replace(trained(check, rows), seconds=done.seconds, peak=done.peak)
    if alone and line.verdict == "ok":
        ours, theirs = rows[0]["grad_norm"], alone[0]["grad_norm"]
        apart = abs(ours - theirs) / theirs
        seen = f"{line.seen}; the first {100 * apart:.1f} % from that of one rank"
        # in bf16 a token may be drawn otherwise, and then the gradient is another one
        line = replace(line, seen=seen, verdict="ok" if apart < 0.1 else "off", fix="deepspeed=zero2")
    return [line]


def doctor(plan: Rehearsal) -> list[Line]:
    """The doctor's own findings on a GPU, and its estimate of memory beside what the training took."""
    if not plan.gpus or not isinstance(plan.config.trainer, GRPOConfig):
        return []
    done = go(plan.words("doctor", "doctor=true"), plan.out / "doctor.log", plan.gpus)
    if failed := outcome("doctor", done):
        return [failed]
    found = re.search(r"about ([\d.]+) (GiB|MiB)", done.said)
    figures = {"said": done.said[-4000:]}
    seen = f"estimates {found[1]} {found[2]}" if found else "its table says nothing about memory"
    verdict = "ok" if found else "off"
    return [Line("doctor", verdict, seen, "doctor=false", figures, done.seconds, done.peak)]


def eight_bits(plan: Rehearsal) -> list[Line]:
    """A training over 8-bit weights, where there is a GPU."""
    if not plan.gpus or plan.config.model.load_in_8bit:
        return []
    rank = [] if plan.config.model.lora.wraps else ["model.lora.r=16"]
    command = plan.words("eight", "model.load_in_8bit=true", *rank)
    done = go(command, plan.out / "eight_bits.log", plan.gpus)
    failed = outcome("8 bits", done)
    return [failed or replace(trained("8 bits", metrics(plan.out / "eight")), seconds=done.seconds, peak=done.peak)]


STEPS: dict[str, Callable[[Rehearsal], list[Line]]] = {
    "checks": checks,
    "update": update,
    "train": train,
    "resume": resume,
    "predict": predict,
    "ranks": ranks,
    "doctor": doctor,
    "eight_bits": eight_bits,
    "push": push,
    "trl": trl,
}


def photos(folder: Path, size: int) -> Path:
    """Four photos of every name: blurred noise in a colour of the class."""
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
        UserError: A word makes no sense, or the architecture is none that is written here.
    """
    gpus = torch.cuda.device_count()
    out = Path(own.get("out", "outputs/rehearsal")).resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = composed(given)
    if config.model.name not in PUBLISHED:
        raise UserError(f"model={config.model.name}: a rehearsal knows {', '.join(PUBLISHED)}")
    at_hand = here(config, weights=True) if own.get("depth", "real" if gpus else "2") == "real" else None
    folder = at_hand or write(own, config, out, gpus)
    typed = {word.split("=", 1)[0].lstrip("+") for word in given}
    small = SMALL if gpus == 0 else {"gpus": "1"}
    if config.trainer.name == "none":
        small = {key: value for key, value in small.items() if not key.startswith("trainer.")}
    values = {
        "data": "folder",
        "data.folder": str(photos(out / "photos", config.model.image_size)),
        "shots": "2",
        "validation": "none",
        "setting.test_per_class": "1",
        "checkpoint.every": "1",
        "doctor": "false",
        "tracking": "none",
        "cache_dir": str(out / "cache"),
        **({} if config.trainer.name == "none" else {"trainer.updates": "3"}),
        **small,
    }
    if typed & {"data"}:
        values = {key: value for key, value in values.items() if not key.startswith("data.")}
    if isinstance(config.trainer, GRPOConfig):
        values["+rewards.varied"] = "{weight: 1.0, fn: benchmarks.rehearse.checks.varied}"
    ours = [f"{key}={value}" for key, value in values.items() if key.lstrip("+") not in typed]
    final = [*ours, *(word for word in given if not word.startswith("model.path=")), f"model.path={folder}"]
    return Rehearsal(replace(config, model=replace(config.model, path=str(folder))), final, out, gpus)


def here(config: Config, weights: bool) -> Path | None:
    """The folder of the configured model if it needs no network; None: it is not here."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return files.find(config.model.path or "", config.model.revision, weights)
    except UserError:
        return None


def write(own: dict[str, str], config: Config, out: Path, gpus: int) -> Path:
    """Random weights, in a process of its own."""
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
    """The lines for the terminal."""
    table = Table("check", "", "seen", "s", "GiB", title=title, title_justify="left")
    for line in lines:
        fix = f"\nchange: {line.fix}" if line.fix and line.verdict != "ok" else ""
        table.add_row(line.check, line.verdict, Text(line.seen + fix), f"{line.seconds:.0f}", f"{line.peak:.1f}")
    return table


def main(words: Sequence[str]) -> int:
    """Rehearse. Returns the exit code."""
    own = dict(word.split("=", 1) for word in words if word.split("=", 1)[0] in OWN)
    given = [word for word in words if word.split("=", 1)[0] not in OWN]
    chosen = own.get("steps", ",".join(name for name in STEPS if name != "update")).split(",")
    if unknown := set(chosen) - set(STEPS):
        raise UserError(f"steps={unknown.pop()}: choose from {', '.join(STEPS)}")
    threads.settle()
    plan = prepare(own, given)
    lines: list[Line] = []
    for name in chosen:
        print(f"{name} …", flush=True)
        try:
            lines += STEPS[name](plan)
        except (OSError, ValueError, KeyError, IndexError) as error:
            lines.append(Line(name, "failed", f"{type(error).__name__}: {error}"))
    device = torch.cuda.get_device_name(0) if plan.gpus else platform.processor() or "CPU"
    told = {
        "versions": {name: version(name) for name in PACKAGES if find_spec(name) is not None},
        "device": device,
        "gpus": plan.gpus,
        "overrides": list(words),
        "lines": [asdict(line) for line in lines],
    }
    file = plan.out / "rehearsal.json"
    file.write_text(json.dumps(told, indent=1, default=str), encoding="utf-8")
    Console(width=140).print(report(lines, " ".join(words)))
    if own.get("keep") != "true":
        for path in plan.out.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
    print(f"{file}: send it along")
    return int(any(line.verdict == "failed" for line in lines))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
