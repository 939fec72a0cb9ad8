"""One run from data to figures. Every rank executes `run`; rank 0 writes the run folder, every rank its checkpoint.

1. Data: read and check the images, freeze in manifest.json which ones the run uses.
2. Model: find the last checkpoint, build the learner from it or from the initial weights. `learner.build` in
   conf/learner/ names its class: for language models `VLMLearner` (common/vlm/learner.py), whose constructor also
   freezes the prompts (prompts.json) and may run the doctor.
3. Evaluation before training, on every split.
4. Training, with checkpoints, and evaluations in between.
5. Saving of the trained weights.
6. Evaluation after training, on every split.
7. Result: confidences calibrated by images that were not trained on, metrics.json, whose presence marks the run as
   finished; then figures.

A run that stopped resumes with the same command: evaluations that are complete are read from the run folder, and
training continues from the last checkpoint. What is trained and tested is a `Learner` (common/learner.py), the loop
over its updates is common/run/loop.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from common.config.schema import Config
from common.data import manifest
from common.data.loading import readable
from common.data.task import TaskData
from common.evaluation import calibration
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
from common.training.signs import CUT, Signs, constant_rewards
from common.types import Answers


def run(config: Config, folder: Path, data: TaskData | None = None) -> Result:
    """Train and evaluate one configuration, or resume it in the folder of an earlier attempt.

    Args:
        config: Validated configuration.
        folder: Run folder, already claimed.
        data: Data of the run, if this process has read it already.

    Returns:
        The result, as written to metrics.json.
    """
    # Setup: clock, W&B mode (settled before anything slow), process group and device of this rank.
    clock = Stopwatch()
    config = replace(config, tracking=settled(config.tracking))
    device = init_process_group(config.gpus)
    # 1. Data. Every image is decoded once; a resumed run must find the same images as before.
    with clock.phase("data"):
        data = readable(config, data)
        freeze(data, folder)
    # 2. Model. `state` is the last checkpoint's, None in a new run; the time of earlier attempts is counted too.
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.max_checkpoints)
    state = checkpoints.state
    clock.earlier = 0.0 if state is None else state.seconds
    with clock.phase("model"), doing(f"{folder.name}: loading {config.model.path or config.model.name}"):
        learner = learner_class(config)(config, data, device, folder, checkpoints)
    # Recorder: everything that the run writes (metrics, completions, predictions) goes through it.
    tracker = make_tracker(config, folder, data.task, None if state is None else state.tracker)
    recorder = Recorder(RunFolder(folder), tracker, config.tracking.completions_every, clock, state)
    result = describe(config, learner.weights, data, learner.decoding)
    result.device = model_of(device)
    # From here on tracker and learner are closed, whatever happens.
    failed = True
    try:
        # 3. Evaluation before training; a blank learner (no CLIP, not yet fitted) cannot predict.
        with clock.phase("evaluation before"):
            before = after = None if learner.blank else all_splits(learner, "before", recorder)
        if state is None and before is not None:
            recorder.evaluation(0, before)
        # 4. Training, resumed from the last checkpoint; 0 updates for zero-shot methods.
        updates = learner.train(recorder)
        if updates:
            # 5. Trained weights, into the folder `model` of the run folder.
            with clock.phase("saving"):
                learner.save(folder / "model")
            # 6. Evaluation after training; without training the one before is the only one.
            with clock.phase("evaluation after"):
                after = all_splits(learner, "after", recorder)
            recorder.evaluation(updates, after)
        assert after is not None, "a learner that cannot predict before training must train"
        # 7. Result: accuracies before and after, the best evaluation, calibration, warnings, seconds per phase.
        conclude(result, before, after, updates)
        if updates:
            rows = recorder.files.read_log("metrics.jsonl")
            result.train |= best_evaluation(config, learner, checkpoints, after, updates, rows)
            result.train["constant_rewards"] = constant_rewards(rows)
            result.train |= training_facts(config, learner, updates, rows)
        held_out = learner.held_out(after)
        if held_out is not None:
            recorder.held_out(*held_out)
            result.calibration, result.novelty = calibrate(*held_out, after), learner.novelty()
            learner.examine_data(held_out[1], after)
        result.remarks = list(learner.remarks)
        result.train["seconds"] = clock.split(recorder.seconds())
        keep_thumbnails(config, learner, before, after, folder)
        # Writing metrics.json finishes the run; then optimizer states are deleted.
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
    """Build the learner, which examines itself, and stop (`doctor=true`)."""
    device = init_process_group(config.gpus)
    data = readable(config)
    learner_class(config)(config, data, device, folder, Checkpoints(folder / "checkpoints", 1)).close()


def freeze(data: TaskData, folder: Path) -> None:
    """Write down which images this run uses, or check that an earlier attempt used the same.

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
    """Write small copies of some images for the run's report."""
    if rank() == 0 and config.tracking.thumbnails:
        with best_effort("thumbnails"):
            trained_on = list(dict.fromkeys(item.image for item in learner.task.train.items))
            chosen = choose_thumbnails(before or after, after, trained_on, config.tracking.thumbnails)
            write_thumbnails(folder, learner.task.images, chosen)


def conclude(result: Result, before: Evaluation | None, after: Evaluation, updates: int) -> None:
    """Put the evaluations into the result. A learner that was blank before its training has only the one after it."""
    if before is not None:
        result.before, result.overall["before"] = before.summary, before.overall
    result.train = {"updates": updates, "paired": {}}
    if updates:
        result.after, result.overall["after"] = after.summary, after.overall
        result.train["paired"] = {} if before is None else paired(before, after)


def calibrate(source: str, held_out: Answers, after: Evaluation) -> dict[str, Any]:
    """Return the calibration by held-out images, and the calibration error of every split with and without it.

    Empty if the answers have no probabilities.
    """
    found = calibration.fit(held_out, source)
    if found is None:
        return {}
    errors = {split: calibration.errors(answers, found) for split, answers in after.answers.items()}
    return asdict(replace(found, ece={split: pair for split, pair in errors.items() if pair is not None}))


def training_facts(config: Config, learner: Learner, updates: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return facts about the training for the result.

    `signs`: signs that it went wrong. `cut`: share of truncated completions, if it is large. `planned`: planned number
    of updates, if patience stopped it early.

    Args:
        config: Configuration of the run.
        learner: Learner after training.
        updates: Number of updates that were made.
        rows: Rows of metrics.jsonl.
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
    """Return which update was tested (`tested`), and the best (`best`) and last accuracy (`last`) while training.

    Both are measured on the monitored split, and the last update is a candidate for the best. Without evaluations
    during training there are neither.

    Args:
        config: Configuration of the run.
        learner: Learner as it was tested.
        checkpoints: Checkpoints of the run.
        after: Evaluation after training.
        updates: Number of updates that were made.
        rows: Rows of metrics.jsonl.
    """
    checkpoint = checkpoints.latest()
    best = None if checkpoint is None else read_state(checkpoint).best
    if best is None:
        return {"tested": updates}
    split = monitor_split(learner.task)
    # Accuracy after the last update: from the final evaluation, on the same subset that evaluations in training use,
    # or, if another update was tested, from the metrics of training.
    if config.evaluate == "last":
        right = evenly_spaced(after.answers[split].right_alone, config.trainer.evaluate_limit)
        last = (updates, fmean(right))
        best = max(best, last, key=lambda each: each[1])
    else:
        key = f"eval/{split}/accuracy"  # not from `after`: that may be of an earlier update, the best one
        last = (updates, next(row[key] for row in rows if row["step"] == updates and key in row))
    tested = best[0] if config.evaluate == "best" else updates
    both = {"best": best, "last": last}
    told = {name: {"update": number, "accuracy": right, "split": split} for name, (number, right) in both.items()}
    return {"tested": tested, **told}
