"""What stands between a run's number and the paper's: why they are not to be compared, and what a reader must know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config.composition import few_shot_of
from common.counted import counted
from common.evaluation.summary import Summary
from common.report import folders
from common.report.folders import Run
from common.run.result import Result

PAPERS_GPUS, PAPERS_GPU = 8, "A100"  # CLS-RL, implementation details
CACHED = ("tip_adapter", "tip_adapter_f", "cafo")  # whose authors chose by the test images
HALVES = ("base", "new")


def marks(run: Run, result: Result, summary: Summary) -> list[str]:
    """What a reader must know: how it was made, and where the paper's number was made otherwise."""
    values, found = run.values, list(result.remarks)
    draft = summary.facts.get("draft", {})
    found += [draft["published_above_bound"]] if "published_above_bound" in draft else []
    if values.get("learner", {}).get("name") == "vlm" and values["rollout"]["name"] == "vllm":
        found.append("replies sampled by vLLM, whose arithmetic is not the trainer's")
    if values["method"].get("learner") in CACHED and values.get("selection") == "val":
        found.append("chosen by validation images; the published number by the test images")
    drafted = _draft(run)
    if values["method"].get("learner") is None and (lacking := _lacking(drafted)):
        found.append(f"over candidates of CaFo without {lacking}")
    return found


def _draft(run: Run) -> Mapping[str, Any]:
    """The configuration that a run's candidates come from; empty: they come from no learner of ours."""
    draft = run.values["method"].get("draft")
    if draft != "file":
        return run.values if draft else {}
    other = Path(run.values["method"]["draft_file"])
    beside = run.path.parent / other.name  # a sweep's runs lie side by side, wherever they have been taken since
    return folders.read(beside if beside.is_dir() else other).values


def _lacking(values: Mapping[str, Any]) -> str:
    """What CaFo's authors give it and this configuration does not; empty: nothing, or it is no CaFo."""
    if few_shot_of({**values}) != "cafo":
        return ""
    own = values["few_shot"]
    there = {
        "generated pictures": own.get("generated") and own.get("per_class"),
        "sentences": values["clip"].get("prompts"),
    }
    return " and ".join(name for name, given in there.items() if not given)


def reasons(run: Run, result: Result, split: str, summary: Summary) -> list[str]:
    """Why the images or what is made of them are not the paper's."""
    values = run.values
    found = [f"{counted(result.left_out, 'image')} left out"] if result.left_out else []
    targets = {one["name"]: one for one in values["setting"]["targets"].values()}
    halves = [result.final[half].n for half in HALVES if half in result.final]
    own = split == "test" or split in HALVES
    data = values["data"] if own else targets.get(split)
    tested = sum(halves) if split in HALVES else summary.n  # no paper says how many either half has
    published = (data or {}).get("published", {})
    test = published.get("test")
    with_val = test and test + published.get("val", 0)  # the authors' scripts test the validation images, too
    if test and tested not in (test, with_val if result.protocol == "official" else test):
        found.append(f"{tested} of {test} test images")
    learner = values["method"].get("learner")
    if learner == "cafo" and (lacking := _lacking(values)):
        found.append(f"CaFo without {lacking}")
    if learner not in (None, "cafo") and (values.get("clip") or {}).get("prompts"):
        found.append("sentences of clip.prompts, which the published number has not")
    return found


def as_fast(run: Run, result: Result) -> list[str]:
    """Why times are not the paper's, which were taken on eight A100."""
    found = [] if run.gpus == PAPERS_GPUS else [f"timed on {counted(run.gpus or 'no', 'GPU')} instead of {PAPERS_GPUS}"]
    if run.gpus and PAPERS_GPU not in result.device:
        found.append(f"timed on {result.device or 'an unknown GPU'} instead of {PAPERS_GPU}")
    return found
