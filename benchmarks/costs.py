"""Compute the cost of the papers' trainings: the table of docs/scaling.md.

    python -m benchmarks.costs --qwen FOLDER --gemma FOLDER      # folders of the models, with or without their weights

Without folders, the published configuration files are used, with the tokenizer of the tiny models
(`benchmarks.rehearse`). ImageNet as in both papers: the methods of CLS-RL with 4 shots, 16 prompts per update; ALERT
with 16 shots. Operations and memory are those of the longest prompt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from rich.console import Console
from rich.table import Table

from benchmarks.rehearse import checkpoint
from common.config import composition
from common.config.schema import Config
from common.cost import estimate
from common.cost.update import GIB
from common.data.names import imagenet_names
from common.data.wordnet import wnids
from common.types import Item, Split, Task
from common.vlm import prompting
from common.vlm.prompting import TaskPrompts

# tokens per completion: a label (8), with thinking (150: our assumption, no paper gives it), ALERT (300)
LENGTHS = {"clsrl": 150, "nothinking": 8, "sft": 8, "alert": 300}
MINUTES = {"clsrl": "1,587", "nothinking": "94"}  # CLS-RL, Table 3, on eight A100
WEIGHTS = {
    "full": ["model.lora.r=0", "model.load_in_8bit=false"],
    "LoRA": ["model.lora.r=16", "model.load_in_8bit=false"],
    "LoRA on 8 bits": ["model.lora.r=16", "model.load_in_8bit=true"],
    "LoRA on 4 bits": ["model.lora.r=16", "model.load_in_8bit=false", "model.load_in_4bit=true"],
}
COLUMNS = ("method", "trained", "GPUs", "GiB", "most in", "smallest card", "TFLOP per update", "hours, A100 80 GB")


def configuration(method: str, model: str, weights: str, gpus: int) -> Config:
    """Return the configuration of a run, as from the command line; ZeRO-2 on several GPUs."""
    shots = 16 if method == "alert" else 4
    changes = [f"method={method}", f"model={model}", "data=imagenet", f"shots={shots}", f"gpus={gpus}"]
    changes += [f"deepspeed=zero{2 if gpus > 1 else 0}", *WEIGHTS[weights]]
    if method == "alert" and weights == "full":
        changes += ["model.freeze_vision=false", "model.lora.projector=none"]
    return composition.validate(hydra.compose("config", changes))


def prompts(config: Config) -> TaskPrompts:
    """Return the prompts for the classes of ImageNet; no image is opened."""
    names = tuple(imagenet_names()[wnid] for wnid in wnids("imagenet"))
    items = tuple(
        Item(f"{label}/{shot}.jpg", label, name) for label, name in enumerate(names) for shot in range(config.shots)
    )
    split = Split(items, names, config.data.question, config.data.open_question or "")
    task = Task(split, {"test": replace(split, items=items[:: config.shots])}, None, "", {})  # type: ignore[arg-type]
    return prompting.ask(prompting.of_config(config), task)


def row(method: str, model: str, folder: Path, weights: str, gpus: int) -> tuple[list[str], dict[str, Any]]:
    """Return one row of the table, and its numbers."""
    config, length = configuration(method, model, weights, gpus), LENGTHS[method]
    cost = estimate.of_run(config, prompts(config), folder, gpus, () if method == "sft" else (length,))
    length = next(iter(cost.operations))
    low, high = cost.hours("A100 80 GB", length)
    operations = sum(cost.operations[length].values()) * gpus
    cells = [method, weights, str(gpus), f"{cost.bytes / GIB:.1f}", cost.fullest, estimate.smallest_card(cost.bytes)]
    cells += [f"{operations / 1e12:,.0f}", f"{low:.2g} to {high:.2g}"]
    return cells, {"prompt": cost.prompts, "memory": cost.memory, "operations": operations, "hours": [low, high]}


def main() -> None:
    """Print the table, as Markdown with --markdown, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qwen", type=Path)
    parser.add_argument("--gemma", type=Path)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    composition.register()
    table, numbers = Table(*COLUMNS, title="one training on ImageNet, computed"), {}
    if arguments.markdown:
        _print(COLUMNS, ["---"] * len(COLUMNS))
    with (
        tempfile.TemporaryDirectory() as made,
        hydra.initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"),
    ):
        folders = {"qwen2_vl_2b": arguments.qwen, "gemma3_4b": arguments.gemma}
        for model, methods in (("qwen2_vl_2b", ("clsrl", "nothinking", "sft")), ("gemma3_4b", ("alert",))):
            folder = folders[model] or checkpoint.write(model, Path(made) / model, weights=False)
            for method in methods:
                for weights in WEIGHTS:
                    for gpus in (1, 4, 8):
                        line, found = row(method, model, folder, weights, gpus)
                        numbers["-".join(line[:3])] = found
                        table.add_row(*line)
                        if arguments.markdown:
                            _print(line)
    if not arguments.markdown:
        Console(width=160).print(table)
    print(json.dumps(numbers))


def _print(*rows: Sequence[str]) -> None:
    for each in rows:
        print(f"| {' | '.join(each)} |", flush=True)


if __name__ == "__main__":
    main()
