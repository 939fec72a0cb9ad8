"""What a result says about where it came from, and the paired comparison with zero-shot."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from common import metrics
from common.config import signature
from common.evaluate import Evaluation, greedy
from common.schema import Config
from common.task import Questions
from common.types import Result

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "hydra-core", "wandb", "datasets", "timm")


def describe(config: Config, values: dict[str, Any], checkpoint: dict[str, str], questions: Questions) -> Result:
    """Everything of the result that is known before the first evaluation. `checkpoint`: path and sha256."""
    return Result(
        method=config.method["name"],
        data=config.data.name,
        setting=config.setting.name,
        protocol=config.protocol.name,
        model=config.model.name,
        shots=config.shots,
        seed=config.seed,
        sampler=config.sampler,
        origins=questions.task.origins,
        left_out=len(questions.manifest["left_out"]),
        short_classes=questions.manifest["short_classes"],
        signature=signature(values),
        git_commit=git_commit(),
        versions=installed_versions(),
        checkpoint=checkpoint,
        manifest=questions.manifest["hash"],
        decoding=str(greedy(config.rollout.max_completion_tokens)),
    )


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter; one that is not installed was not used."""
    return {d.name: d.version for d in distributions() if d.name in PACKAGES}


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files were changed; None outside a git checkout."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def paired(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Before and after training on the same images, per split (see `metrics.paired_test`)."""
    return {
        split: metrics.paired_test([p.correct for p in before.predictions[split]], [p.correct for p in found])
        for split, found in after.predictions.items()
    }
