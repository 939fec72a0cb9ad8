"""The result of a run: what metrics.json holds, where it came from, and the comparison with before training.

    result = Result.load("outputs/<run>")
    result.final["test"].accuracy

Everything that reads finished runs reads them through `Result.load`. No torch.
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

from common.config.composition import signature
from common.config.schema import Config
from common.data.task import Questions
from common.evaluation import metrics
from common.evaluation.evaluate import Evaluation
from common.evaluation.summary import Summary
from common.types import UserError

FORMAT = 1
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "hydra-core", "wandb", "datasets", "timm")
# Keys of metrics.json before there was a format number, and what they are called now.
FORMER = {"zero_shot": "before", "eval": "after", "checkpoint": "weights"}


@dataclass
class Result:
    """What a finished run reports. metrics.json has these fields as its keys.

    before, after: the splits as the learner began (empty if it knew nothing then) and after training (empty if nothing
    was trained), see `final`.
    weights: path and sha256 of what the learner began from. overall: one number for several splits, by phase.
    train: updates, seconds by phase, the paired comparison, the update that was tested at last, the best evaluation,
    and rewards that paid everybody or nobody. remarks: what a table must say of the trained results. device: the GPU's
    model, or CPU; empty: an earlier version did not say.
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
    refilled: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    device: str = ""
    format: int = FORMAT

    @property
    def final(self) -> dict[str, Summary]:
        """The splits as the run ends: after training if it trained, else as the learner is."""
        return self.after or self.before

    def to_json(self) -> dict[str, Any]:
        """As metrics.json has it."""
        splits = {phase: {n: s.to_json() for n, s in getattr(self, phase).items()} for phase in ("before", "after")}
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"format": self.format} | {**values, **splits}

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """The result of a finished run.

        Args:
            path: The run folder, or its metrics.json. Folders of earlier versions load as well.

        Raises:
            UserError: There is no result, it is damaged, or a later version wrote it.
        """
        file = Path(path).expanduser()
        file = file / "metrics.json" if file.is_dir() else file
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
        """The inverse of `to_json`; takes the keys of earlier versions.

        Raises:
            UserError: A later version wrote it.
        """
        if values.get("format", 0) > FORMAT:
            raise UserError(f"this result has format {values['format']}, and this version reads up to {FORMAT}; update")
        if "format" not in values:
            values = {FORMER.get(name, name): value for name, value in values.items()}
            values["overall"] = {FORMER[phase]: numbers for phase, numbers in values["overall"].items()}
            if not values["train"]["updates"]:  # then the evaluation before training stood in both places
                values |= {"after": {}, "overall": {"before": values["overall"]["before"]}}
        splits = {phase: {n: Summary.from_json(s) for n, s in values[phase].items()} for phase in ("before", "after")}
        return cls(**{**values, **splits, "format": FORMAT})


def describe(
    config: Config, values: dict[str, Any], weights: dict[str, str], questions: Questions, decoding: str
) -> Result:
    """Everything of the result that is known before the first evaluation.

    Args:
        config: Of the run.
        values: The same as plain values.
        weights: Path and sha256 of what the learner begins from.
        questions: What it is asked.
        decoding: How its answers are chosen.
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
        origins=questions.task.origins,
        left_out=len(questions.manifest["left_out"]),
        short_classes=questions.manifest["short_classes"],
        refilled=questions.manifest.get("refilled", {}),
        passed_over=questions.manifest["passed_over"],
        duplicates={kind: len(groups) for kind, groups in questions.manifest.get("duplicates", {}).items()},
        signature=signature(values),
        git_commit=git_commit(),
        versions=installed_versions(),
        weights=weights,
        manifest=questions.manifest["hash"],
        decoding=decoding,
    )


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter; one that is not installed was not used."""
    return {d.name: d.version for d in distributions() if d.name in PACKAGES}


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files were changed; None outside a git checkout."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    return process.stdout.strip() or None


def paired(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Before and after training on the same images, per split (see `metrics.paired_test`)."""
    return {
        split: metrics.paired_test(
            [p.correct for p in before.answers[split].predictions], [p.correct for p in answers.predictions]
        )
        for split, answers in after.answers.items()
    }
