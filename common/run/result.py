"""Result of a run: the content of metrics.json, its origin, and the comparison with before training.

    result = Result.load("outputs/<run>")
    result.final["test"].accuracy

Every reader of finished runs uses `Result.load`. No torch.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from common.config.composition import signature, values_of
from common.config.schema import Config
from common.data.task import TaskData
from common.evaluation import metrics
from common.evaluation.evaluate import Evaluation
from common.evaluation.metrics import Summary
from common.types import UserError

FORMAT = 1
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "hydra-core", "wandb", "datasets", "timm")


@dataclass
class Result:
    """Result of a finished run. Its fields are the keys of metrics.json.

    before, after: summaries of the splits before training (empty for a learner that cannot answer yet) and after
        training (empty if nothing was trained), see `final`.
    weights: path and sha256 of the weights at the start.
    overall: one number for several splits, by phase.
    train: updates, seconds by phase, the paired comparison, the update of the tested weights, the best evaluation,
        and rewards that were the same for all completions.
    calibration: the temperature of the probabilities and what it changes (common/evaluation/calibration.py); empty
        without held-out images or probabilities.
    novelty: how well images of unknown classes are told from others (common/evaluation/novelty.py); empty where that
        is not measured.
    remarks: notes for tables on the trained results.
    device: model of the GPU, or CPU.
    """

    method: str
    data: str
    setting: str
    protocol: str
    model: str
    shots: int | str
    seed: int
    sampler: str
    origins: dict[str, str]
    left_out: int
    short_classes: dict[str, int]
    signature: str
    git_commit: str | None
    versions: dict[str, str]
    weights: dict[str, str]
    manifest: str
    decoding: str
    before: dict[str, Summary] = field(default_factory=dict)
    after: dict[str, Summary] = field(default_factory=dict)
    overall: dict[str, dict[str, float]] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    novelty: dict[str, Any] = field(default_factory=dict)
    refilled: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    device: str = ""
    format: int = FORMAT

    @property
    def final(self) -> dict[str, Summary]:
        """Summaries at the end of the run: after training if it trained, else before."""
        return self.after or self.before

    def to_json(self) -> dict[str, Any]:
        """Return the content of metrics.json."""
        splits = {phase: {n: s.to_json() for n, s in getattr(self, phase).items()} for phase in ("before", "after")}
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"format": self.format} | {**values, **splits}

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Load the result of a finished run.

        Args:
            path: The run folder, or its metrics.json.

        Raises:
            UserError: There is no result, it is damaged, or another version wrote it.
        """
        given = Path(path).expanduser()
        if not given.exists() and given.name != "metrics.json":
            raise UserError(f"{given} does not exist; give the folder of a finished run")
        file = given / "metrics.json" if given.is_dir() else given
        if not file.parent.is_dir():
            raise UserError(f"{file.parent} does not exist; give the folder of a finished run")
        if not file.is_file():
            raise UserError(f"{path} holds no finished run: there is no {file.name}; a run writes it last")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls.from_json(values)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{file} is damaged or no result of a run ({error}); run it again in another folder"
            ) from error

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        """Build a result from the output of `to_json`.

        Raises:
            UserError: Another version wrote it.
        """
        if (found := values.get("format")) != FORMAT:
            raise UserError(f"this result has format {found}, and this version reads {FORMAT}; run it again, or update")
        splits = {phase: {n: Summary.from_json(s) for n, s in values[phase].items()} for phase in ("before", "after")}
        return cls(**{**values, **splits, "format": FORMAT})


def describe(config: Config, weights: dict[str, str], data: TaskData, decoding: str) -> Result:
    """Return a result with everything that is known before the first evaluation.

    Args:
        config: Configuration of the run.
        weights: Path and sha256 of the weights at the start.
        data: The task and its manifest.
        decoding: How answers are chosen.
    """
    return Result(
        method=config.method["name"],
        data=config.data.name,
        setting=config.setting.name,
        protocol=config.protocol.name,
        model=config.model.name,
        shots=config.shots,
        seed=config.seed,
        sampler=config.sampler,
        origins=data.task.origins,
        left_out=len(data.manifest["left_out"]),
        short_classes=data.manifest["short_classes"],
        refilled=data.manifest.get("refilled", {}),
        passed_over=data.manifest["passed_over"],
        duplicates={kind: len(groups) for kind, groups in data.manifest.get("duplicates", {}).items()},
        signature=signature(values_of(config)),
        git_commit=git_commit(),
        versions=installed_versions(),
        weights=weights,
        manifest=data.manifest["hash"],
        decoding=decoding,
    )


def installed_versions() -> dict[str, str]:
    """Return the versions of the relevant packages; one that is not installed is left out."""
    return {d.name: d.version for d in distributions() if d.name in PACKAGES}


def git_commit() -> str | None:
    """Return the commit of this code, with `-dirty` if files were changed; None outside a git checkout."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    return process.stdout.strip() or None


def paired(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Compare before and after training on the same images, per split (see `metrics.paired_test`)."""
    return {
        split: metrics.paired_test(
            [p.correct for p in before.answers[split].predictions], [p.correct for p in answers.predictions]
        )
        for split, answers in after.answers.items()
    }
