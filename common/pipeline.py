"""One run, top to bottom. Every rank executes this; rank 0 writes.

task -> model -> zero-shot evaluation -> training -> evaluation -> weights, tables, figures
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from common import doctor, task
from common.checkpoint import Checkpoints, State, read_state, seed_generators
from common.data import manifest
from common.distributed import barrier, rank, world
from common.engine import init_process_group
from common.evaluate import spread
from common.models import adapters
from common.models.slots import detached
from common.parts import (
    Parts,
    assemble,
    find_checkpoint,
    make_tracker,
    make_trainer,
    prepare_rewards,
    sampling,
)
from common.pictures import readable
from common.progress import progress
from common.recorder import Recorder
from common.result import describe, paired
from common.run_folder import RunFolder
from common.schedule import total_updates
from common.schema import GRPO, Config
from common.types import Result, Trainer, UserError

EMBEDDINGS = "embeddings"  # beside the weights


def run(config: Config, values: dict[str, Any], folder: Path) -> Result:
    """Train and evaluate one configuration; what an earlier attempt in the same folder finished is not done again.

    Args:
        config: Validated configuration.
        values: The same as plain values, for the run folder and the tracker.
        folder: Run folder, already claimed.

    Returns:
        The result, as written to metrics.json.
    """
    began = time.perf_counter()
    device = init_process_group(config.gpus)
    questions, left_out = readable(config)
    if rank() == 0 and not (folder / "manifest.json").is_file():
        manifest.write(questions.manifest, folder / "manifest.json")
    barrier()
    manifest.verify(folder / "manifest.json", questions.manifest)

    place, checkpoints = RunFolder(folder), Checkpoints(folder / "checkpoints", config.checkpoint.max_checkpoints)
    resume = checkpoints.latest()
    state = read_state(resume) if resume else None
    updates = total_updates(config.trainer, len(questions.train))
    learns = isinstance(config.trainer, GRPO) and updates > (state.update if state else 0)
    rewards = prepare_rewards(config) if learns else {}
    checkpoint = find_checkpoint(config)
    seconds = {"model": time.perf_counter() - began}
    embeddings = None if config.trainer.name == "none" else folder / "model" / EMBEDDINGS
    parts = assemble(config, questions, checkpoint, device, rewards, embeddings)
    if state is not None and state.began_from != parts.checkpoint["sha256"]:
        raise UserError(f"the weights of {checkpoint} have changed since this run began; use another run_name")
    evaluator = parts.evaluator
    spent = state.seconds if state else 0.0  # by earlier attempts
    tracker = make_tracker(config, values, folder, questions, state)
    recorder = Recorder(place, tracker, config.tracking.completions_every)
    seconds["load"] = time.perf_counter() - began - seconds["model"]

    result = describe(config, values, parts.checkpoint, questions)
    failed = True
    try:
        if state is None and config.doctor == "auto" and doctor.is_long(updates, config.trainer):
            examine(config, parts)
        recorder.rewind(state.update if state else 0, state.lines if state else {})
        before = after = evaluator.all_splits("zero_shot", recorder)
        if state is None:
            recorder.evaluation(0, before)
        if updates:
            trainer = make_trainer(config, parts, updates, resume)
            try:
                train(config, trainer, parts, updates, state, checkpoints, recorder, began - spent)
                manifest.verify(folder / "manifest.json", task.build(config, left_out).manifest)
                with trainer.whole_weights():
                    save_weights(parts, folder / "model")
                    after = evaluator.all_splits("eval", recorder)
            finally:
                trainer.close()
            recorder.evaluation(updates, after)
        result.zero_shot, result.eval = before.summary, after.summary
        result.overall = {"zero_shot": before.overall, "eval": after.overall}
        seconds |= recorder.seconds()
        seconds["total"] = time.perf_counter() - began + spent
        result.train = {"updates": updates, "seconds": seconds, "paired": paired(before, after) if updates else {}}
        last = checkpoints.latest()
        if last is not None and (best := read_state(last).best):
            watched = spread(after.predictions[evaluator.watched], config.trainer.evaluate_limit)
            best = max(best, (updates, fmean(p.correct for p in watched)), key=lambda found: found[1])
            result.train["best"] = {"update": best[0], "accuracy": best[1], "split": evaluator.watched}
        names = {split: asked.choices for split, asked in questions.task.evaluation.items()}
        recorder.finish(result, after, names)
        checkpoints.keep_weights_only()
        failed = False
    finally:
        recorder.close(failed)
    return result


def examine(config: Config, parts: Parts | None = None) -> None:
    """The doctor (common/doctor.py): its findings as a table, and an error if one of them is a reason not to train.

    Raises:
        UserError: Names the finding and the fix.
    """
    assert isinstance(config.trainer, GRPO)
    if parts is None:
        device = init_process_group(config.gpus)
        rewards = prepare_rewards(config)
        parts = assemble(config, readable(config)[0], find_checkpoint(config), device, rewards)
    findings = doctor.examine(
        vlm=parts.policy,
        encoder=parts.encoder,
        rollout=parts.rollout,
        prompts=parts.questions.train,
        rewards=parts.rewards,
        decoding=sampling(config.rollout),
        config=config.trainer,
        image_size=config.model.image_size,
        updates=total_updates(config.trainer, len(parts.questions.train)),
        ranks=world(),
        deepspeed=config.deepspeed,
        seed=config.seed,
    )
    if rank() == 0:
        Console().print(doctor.report(findings))
    doctor.refuse(findings)


def train(
    config: Config,
    trainer: Trainer,
    parts: Parts,
    updates: int,
    state: State | None,
    checkpoints: Checkpoints,
    recorder: Recorder,
    began: float,
) -> None:
    """The loop over the updates that are still to be done; `began`: when the run did, on the clock of perf_counter."""
    evaluator = parts.evaluator
    seed_generators(config.seed)
    start, best = 0, None
    if state is not None:
        checkpoints.restore_generators(config.seed)
        start, best, trainer.tokens = state.update, state.best, state.tokens
    for update in progress(range(start, updates), f"training ({config.method['name']})", updates - start):
        step = trainer.step(update)
        number, last = update + 1, update + 1 == updates
        check_finite(step.metrics, number)
        due = config.trainer.evaluate_every and number % config.trainer.evaluate_every == 0 and not last
        better = False
        if due:
            clock = time.perf_counter()
            with trainer.whole_weights():
                found = evaluator.during_training(config.trainer.evaluate_limit)
            accuracy = found.summary[evaluator.watched]["accuracy"]
            better = best is None or accuracy > best[1]
            best = (number, accuracy) if better else best
            step.seconds["evaluation during training"] = time.perf_counter() - clock
        recorder.update(number, step, last)
        if due:
            recorder.evaluation(number, found)
        if better or last or (config.checkpoint.every and number % config.checkpoint.every == 0):
            recorder.flush(number)
            here = State(
                update=number,
                tokens=trainer.tokens,
                best=best,
                ranks=world(),
                seed=config.seed,
                tracker=recorder.tracker.id,
                began_from=parts.checkpoint["sha256"],
                lines=recorder.place.lengths(),
                seconds=time.perf_counter() - began,
            )
            checkpoints.write(here, lambda folder: save_all(trainer, parts, folder))


def check_finite(metrics: dict[str, float], number: int) -> None:
    """Stop at the first NaN or infinity; nothing of that update is recorded, and the last checkpoint stays as it is.

    Raises:
        UserError: Names the update and the metrics.
    """
    if bad := sorted(name for name, value in metrics.items() if not math.isfinite(value)):
        raise UserError(
            f"update {number}: {', '.join(bad)} not finite; training stopped, checkpoints before it are good. Lower"
            " trainer.learning_rate or trainer.grad_clip, or use model.dtype=float32, under another run_name"
        )


def save_all(trainer: Trainer, parts: Parts, folder: Path) -> None:
    """What a checkpoint holds of the model: to resume from, and to load elsewhere."""
    trainer.save(folder / "deepspeed")
    with trainer.whole_weights():
        save_weights(parts, folder / "model")


def save_weights(parts: Parts, folder: Path) -> None:
    """A folder that `from_pretrained` loads: model (or adapter) and processor; embeddings beside them."""
    if rank() != 0:
        return
    policy, questions = parts.policy, parts.questions
    with detached(policy.model):
        policy.model.save_pretrained(folder)
    if policy.hub is not None and hasattr(policy.model, "disable_adapter"):
        adapters.name_base(folder, *policy.hub)
    policy.processor.save_pretrained(folder)
    if policy.slots is not None:
        questions.method.export(folder / EMBEDDINGS, policy.slots.entries.detach().cpu(), questions.task)
