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
    "model.load_in_8bit": "false",  # runs refuse them there; `checks` and `update` have them
    "rollout.max_completion_tokens": "6",
    "trainer.prompts_per_update": "2",
}
UPDATES, PAPER = 2500, "in CLS-RL 94 (direct) and 1,587 (thinking) on eight A100"  # section 5.2, table 3
FILE = "rehearsal.json"
INTERRUPTED = 130  # exit code of run.py that was stopped
ROUNDED = 0.05  # most that bf16 may change: a probability, or a share of a gradient's norm
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes", "vllm", "flash_attn", "trl")


@dataclass
class Rehearsal:
    """What is rehearsed, the words for run.py, where, and on how many GPUs. lines: what was seen so far."""

    config: Config
    overrides: list[str]
    out: Path
    gpus: int
    lines: list[Line] = field(default_factory=list)

    def run(self, name: str, *more: str) -> list[str]:
        """What starts a run."""
        return ["run.py", *self.overrides, f"hydra.run.dir={self.out / name}", *more]

    def go(
        self,
        check: str,
        command: Sequence[str],
        judge: Callable[[], list[Line]],
        stop: Callable[[], bool] = lambda: False,
        code: int = 0,
    ) -> list[Line]:
        """Run Python to its end, and judge what it has written; the lines get its seconds and its peak.

        The peak is that of its largest process; on GPUs, of what the first one holds, others' memory included.

        Args:
            check: Its name, for the log and for the line of a failure.
            command: What follows `python`.
            judge: Is asked if it ended as expected; else its last message is a failed line.
            stop: Once this holds, it is asked to stop.
            code: The exit code that is expected.
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
    """The line of a process that did not end as expected; its last message names the key."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    told = next((line for line in reversed(lines) if "rror" in line), lines[-1])
    return Line(check, "failed", f"exit code {code}: {told}"[:600])


def checks(plan: Rehearsal, names: str = "prompts,forwards,labels", *more: str) -> list[Line]:
    """checks.py in a process of its own; in the configuration's 8 bits, if it asks for them, on the CPU too."""
    file, eight = plan.out / "checks.json", plan.config.model.load_in_8bit and find_spec("bitsandbytes") is not None
    overrides = [*plan.overrides, *(["model.load_in_8bit=true"] if eight else []), *more]
    command = ["-m", "benchmarks.rehearse.checks", str(file), str(plan.out / "none"), names, *overrides]
    return plan.go("checks", command, lambda: [Line(**line) for line in json.loads(file.read_text("utf-8"))])


def update(plan: Rehearsal) -> list[Line]:
    """One update in a process that does nothing else, in 8 bits if the configuration asks for them."""
    return checks(plan, "update")


def train(plan: Rehearsal) -> list[Line]:
    """A run that is stopped after its first checkpoint."""
    run = plan.out / "run"
    judge, stop = partial(trained, "training, stopped", run), partial(any_state, run)
    return plan.go("train", plan.run("run"), lambda: [judge()], stop, INTERRUPTED)


def any_state(run: Path) -> bool:
    """Whether a run has written a checkpoint."""
    return any((run / "checkpoints").glob("step-*[0-9]/state.json"))


def resume(plan: Rehearsal) -> list[Line]:
    """The same command again, to its end: it goes on where it was stopped, and the weights have moved."""
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
    """Of metrics.jsonl: evaluations and updates."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def updates(run: Path) -> list[dict[str, Any]]:
    """The rows of updates."""
    return [row for row in rows(run) if "grad_norm" in row]


def trained(check: str, run: Path) -> Line:
    """Every update has a loss that is a number and a gradient that is not zero."""
    made = updates(run)
    names = ("loss", "grad_norm", "reward", "sampling/sampling_logp_difference/mean")
    figures = {name: [row[name] for row in made if name in row] for name in names}
    right = bool(made) and all(math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in made)
    seen = "gradient norms " + ", ".join(f"{norm:.3g}" for norm in figures["grad_norm"])
    return Line(check, "ok" if right else "failed", seen, "trainer.learning_rate, rewards", figures)


def pace(run: Path, gpus: int) -> Line:
    """Seconds of the last update by phase, and on a GPU what the paper's updates would take at that pace."""
    phases = json.loads((run / "timings.jsonl").read_text("utf-8").splitlines()[-1])
    del phases["step"]
    total = sum(phases.values())
    parts = ", ".join(f"{name} {value:.1f}" for name, value in phases.items())
    whole = f"; {UPDATES} would take {total * UPDATES / 60:.0f} min here, {PAPER}" if gpus else ""
    return Line("seconds per update", "ok", f"{total:.1f} s ({parts}){whole}", "", phases)


def moved(base: Path, model: Path) -> Line:
    """Whether the weights that a run has written are others than those that it was given."""
    from safetensors.torch import load_file

    before = {name: weight for file in files.weight_files(base) for name, weight in load_file(file).items()}
    adapters = model / files.ADAPTERS[1]
    written = [adapters] if adapters.is_file() else files.weight_files(model)
    after = {name: weight for file in written for name, weight in load_file(file).items()}
    fresh = [bool(weight.any()) for name, weight in after.items() if "lora_B" in name]  # they begin with zeros
    others = fresh + [not torch.equal(weight, before[name]) for name, weight in after.items() if name in before]
    seen = f"{sum(others)} of {len(others)} weights are others than before"
    figures = {"changed": sum(others), "of": len(others)}
    return Line("weights moved", "ok" if any(others) else "failed", seen, "trainer.learning_rate", figures)


def predict(plan: Rehearsal) -> list[Line]:
    """A photo through the run and through what it exports: the same answer, up to adapters rounded into weights."""
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
    """What was predicted: names and their probabilities."""
    top = dict(json.loads(file.read_text("utf-8").splitlines()[0])["top"])
    return Line(check, "ok", ", ".join(f"{name} {share:.3f}" for name, share in top.items()), "", top)


def ranks(plan: Rehearsal) -> list[Line]:
    """ZeRO-3 on two processes (gloo), or on all GPUs (NCCL), beside the first update of the run on one."""
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
    """The line of a run on several ranks, `off` where it does not begin as the one on one rank.

    Both score the same names before they are trained. Their first gradients are equal where both drew the same
    completions, which rewards show; in bf16 a token may be drawn otherwise.
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
    """The doctor's estimate of memory on a GPU, beside what the training took."""
    took = max((line.peak for line in plan.lines if line.check == "training, stopped"), default=0.0)

    def judge() -> list[Line]:
        said = (plan.out / "doctor.log").read_text("utf-8")
        found = re.search(r"about ([\d.]+) (GiB|MiB)", said)
        estimate = math.nan if found is None else float(found[1]) / (1 if found[2] == "GiB" else 1024)
        seen, near = f"estimates {estimate:.1f} GiB, the training took {took:.1f}", abs(estimate / took - 1) < 0.25
        return [Line("doctor", "ok" if near else "off", seen, "doctor=false", {"said": said[-4000:]})]

    asked = plan.gpus and took and isinstance(plan.config.trainer, GRPOConfig)
    return plan.go("doctor", plan.run("doctor", "doctor=true"), judge) if asked else []


def eight_bits(plan: Rehearsal) -> list[Line]:
    """A training over 8-bit weights, where there is a GPU."""
    if not plan.gpus or plan.config.model.load_in_8bit:
        return []
    rank = [] if plan.config.model.lora.wraps else ["model.lora.r=16"]
    command = plan.run("eight", "model.load_in_8bit=true", "trainer.updates=1", *rank)
    return plan.go("eight_bits", command, lambda: [trained("8 bits", plan.out / "eight")])


def push(plan: Rehearsal) -> list[Line]:
    """Parity with vLLM, which has weights of its own, before and after they change; where it is installed."""
    return checks(plan, "push", "rollout=vllm") if plan.gpus and find_spec("vllm") is not None else []


def trl(plan: Rehearsal) -> list[Line]:
    """Seconds beside TRL's in one process, where there is a GPU."""
    return checks(plan, "trl") if plan.gpus else []


STEPS: dict[str, Callable[[Rehearsal], list[Line]]] = {
    step.__name__: step for step in (checks, update, train, resume, predict, ranks, doctor, eight_bits, push, trl)
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
    (out / FILE).write_text("{}", encoding="utf-8")  # so that the next one may take the folder
    real = here(config, weights=True) if own.get("depth", "real" if gpus else "2") == "real" else None
    folder = real or write(own, config, out, gpus)
    values = SMALL | (ON_GPUS if gpus else ON_THE_CPU) | {"cache_dir": str(out / "cache")}
    pictures = photos(out / "photos", config.model.image_size)
    if isinstance(config.trainer, GRPOConfig):
        values["+rewards.varied"] = "{weight: 1.0, fn: benchmarks.rehearse.varied}"
    typed = {word.split("=", 1)[0].lstrip("+") for word in given}
    values |= {} if "data" in typed else {"data.folder": str(pictures)}
    kept = [f"{key}={value}" for key, value in values.items() if key.lstrip("+") not in typed]
    named = [*kept, *(word for word in given if not word.startswith("model.path=")), f"model.path={folder}"]
    return Rehearsal(replace(config, model=replace(config.model, path=str(folder))), named, out, gpus)


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
    process.set_thread_policy()
    plan = prepare(own, given)
    for name in chosen:
        print(f"{name} …", flush=True)
        try:
            plan.lines += STEPS[name](plan)
        except Exception as error:  # of what a step has written, or has not
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
