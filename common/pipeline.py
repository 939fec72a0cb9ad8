"""One run, top to bottom. Every rank executes this; rank 0 writes.

data -> learner -> evaluation before -> training -> weights -> evaluation after -> result -> pictures

What is trained and tested is a `Learner` (common/learner.py); here is only the order of things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from common.config.schema import Config
from common.data import manifest
from common.data.loading import readable
from common.data.task import TaskData
from common.evaluation.evaluate import Evaluation, all_splits, evenly_spaced, monitor_split
from common.learner import Learner, learner_class
from common.run.checkpoint import Checkpoints, read_state
from common.run.predictions import choose_thumbnails, write_thumbnails
from common.run.recorder import Recorder
from common.run.result import Result, describe, paired
from common.run.run_folder import RunFolder, best_effort
from common.run.tracking import make_tracker, settled
from common.runtime.distributed import barrier, rank
from common.runtime.group import init_process_group, model_of
from common.runtime.progress import Stopwatch, doing
from common.training.base import total_updates
from common.training.signs import CUT, Signs, silent_rewards


def run(config: Config, folder: Path, data: TaskData | None = None) -> Result:
    """Train and evaluate one configuration; what an earlier attempt in the same folder finished is not done again.

    Args:
        config: Validated configuration.
        folder: Run folder, already claimed.
        data: The run's data, if this process has read it already.

    Returns:
        The result, as written to metrics.json.
    """
    clock = Stopwatch()
    config = replace(config, tracking=settled(config.tracking))
    device = init_process_group(config.gpus)
    with clock.phase("data"):
        data = readable(config, data)
        freeze(data, folder)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.max_checkpoints)
    state = checkpoints.state
    clock.earlier = 0.0 if state is None else state.seconds
    with clock.phase("model"), doing(f"{folder.name}: loading {config.model.path or config.model.name}"):
        learner = learner_class(config)(config, data, device, folder, checkpoints)
    tracker = make_tracker(config, folder, data.task, None if state is None else state.tracker)
    recorder = Recorder(RunFolder(folder), tracker, config.tracking.completions_every, clock, state)
    result = describe(config, learner.weights, data, learner.decoding)
    result.device = model_of(device)
    failed = True
    try:
        with clock.phase("evaluation before"):
            before = after = None if learner.blank else all_splits(learner, "before", recorder)
        if state is None and before is not None:
            recorder.evaluation(0, before)
        updates = learner.train(recorder)
        if updates:
            with clock.phase("saving"):
                learner.save(folder / "model")
            with clock.phase("evaluation after"):
                after = all_splits(learner, "after", recorder)
            recorder.evaluation(updates, after)
        assert after is not None, "who knows nothing is trained"
        conclude(result, before, after, updates)
        if updates:
            rows = recorder.files.read_log("metrics.jsonl")
            result.train |= best_evaluation(config, learner, checkpoints, after, updates, rows)
            result.train["silent_rewards"] = silent_rewards(rows)
            result.train |= told(config, learner, updates, rows)
        result.remarks = list(learner.remarks)
        result.train["seconds"] = clock.split(recorder.seconds())
        keep_thumbnails(config, learner, before, after, folder)
        recorder.finish(result, after)
        checkpoints.keep_weights_only()
        failed = False
    finally:
        recorder.close(failed)
        learner.close()
    if rank() == 0:
        from common.report import figures  # draws

        figures.of_run(folder, result, after, learner.task)
    return result


def examine(config: Config, folder: Path) -> None:
    """`doctor=true`: build the learner, which examines itself, and stop."""
    device = init_process_group(config.gpus)
    data = readable(config)
    learner_class(config)(config, data, device, folder, Checkpoints(folder / "checkpoints", 1)).close()


def freeze(data: TaskData, folder: Path) -> None:
    """Write down which images this run takes, or check that an earlier attempt took the same.

    Raises:
        UserError: The data has changed since.
    """
    path = folder / "manifest.json"
    if rank() == 0 and not path.is_file():
        manifest.write(data.manifest, path)
    barrier()
    manifest.verify(path, data.manifest)


def keep_thumbnails(
    config: Config, learner: Learner, before: Evaluation | None, after: Evaluation, folder: Path
) -> None:
    """Small copies of some pictures, for the run's report."""
    if rank() == 0 and config.tracking.thumbnails:
        with best_effort("thumbnails"):
            trained_on = list(dict.fromkeys(item.image for item in learner.task.train.items))
            chosen = choose_thumbnails(before or after, after, trained_on, config.tracking.thumbnails)
            write_thumbnails(folder, learner.task.images, chosen)


def conclude(result: Result, before: Evaluation | None, after: Evaluation, updates: int) -> None:
    """Put the evaluations into the result; there is none before the training of a learner that knew nothing."""
    if before is not None:
        result.before, result.overall["before"] = before.summary, before.overall
    result.train = {"updates": updates, "paired": {}}
    if updates:
        result.after, result.overall["after"] = after.summary, after.overall
        result.train["paired"] = {} if before is None else paired(before, after)


def told(config: Config, learner: Learner, updates: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Signs that the training went wrong (`signs`), the share of completions that were cut (`cut`), if it is large, and
    how many updates were planned (`planned`), if patience has ended it.

    Args:
        config: Of the run.
        learner: With the questions.
        updates: How many were made.
        rows: Of metrics.jsonl.
    """
    if config.trainer.name == "none":
        return {}
    limit = config.rollout.max_completion_tokens
    signs, planned = Signs(rows, limit), total_updates(config.trainer, len(learner.task.train.items))
    cut = {"cut": {"share": signs.cut, "limit": limit}} if signs.cut >= CUT else {}
    return {**cut, "signs": signs.found, **({"planned": planned} if planned > updates else {})}


def best_evaluation(
    config: Config,
    learner: Learner,
    checkpoints: Checkpoints,
    after: Evaluation,
    updates: int,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Which update was tested at last (`tested`), and what was measured on the watched split after the best one
    (`best`) and after the last (`last`).

    The last one is among those that can be the best. Without evaluations during training there are neither.

    Args:
        config: Of the run.
        learner: As it was tested.
        checkpoints: Of the run.
        after: The evaluation after training.
        updates: How many were made.
        rows: Of metrics.jsonl.
    """
    checkpoint = checkpoints.latest()
    best = None if checkpoint is None else read_state(checkpoint).best
    if best is None:
        return {"tested": updates}
    split = monitor_split(learner.task)
    if config.evaluate == "last":
        predictions = evenly_spaced(after.answers[split].predictions, config.trainer.evaluate_limit)
        last = (updates, fmean(p.correct for p in predictions))
        best = max(best, last, key=lambda each: each[1])
    else:
        key = f"eval/{split}/accuracy"  # the last row may be of the update that is tested
        last = (updates, next(row[key] for row in rows if row["step"] == updates and key in row))
    tested = best[0] if config.evaluate == "best" else updates
    both = {"best": best, "last": last}
    told = {name: {"update": number, "accuracy": right, "split": split} for name, (number, right) in both.items()}
    return {"tested": tested, **told}
