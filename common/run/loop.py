"""Run the updates of a training: step, record, evaluate regularly, write checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common.config.schema import Config, GRPOConfig
from common.counted import counted
from common.evaluation.evaluate import Evaluation, Predictor, during_training, evenly_spaced, monitor_split
from common.run.checkpoint import Checkpoints, State, seed_generators
from common.run.recorder import Recorder
from common.runtime.distributed import gather, rank, world
from common.runtime.interrupt import Interrupted, requested
from common.runtime.progress import bar
from common.training.base import Step, Trainer
from common.training.signs import CUT, WINDOW, Signs, at, constant_rewards, fix, low_rewards
from common.types import Task, UserError
from common.vlm.check import INSTEAD, unknown_classes

log = logging.getLogger(__name__)


def train(
    predictor: Predictor,
    trainer: Trainer,
    updates: int,
    config: Config,
    checkpoints: Checkpoints,
    recorder: Recorder,
    save: Callable[[Path], None],
) -> int:
    """Make the remaining updates and return the number of all. All ranks call it together.

    Args:
        predictor: Predictor to evaluate during training, with the trainer's weights.
        trainer: Trainer, set to the state that `checkpoints` resumes from.
        updates: Updates of the whole training.
        config: Configuration of the run.
        checkpoints: Checkpoints of the run.
        recorder: Recorder of updates and evaluations.
        save: Function that writes weights and optimizer state of this rank into a folder.
    """
    # start or resume
    state, done = checkpoints.state, 0
    seed_generators(config.seed)
    if state is None:
        best = untrained(predictor, config, recorder)
    else:
        checkpoints.restore_generators(config.seed)
        done, best, trainer.tokens = state.update, state.best, state.tokens
    iterations = config.trainer.updates_per_rollout if isinstance(config.trainer, GRPOConfig) else 1
    limit, stranger = config.rollout.max_completion_tokens, is_stranger(config, predictor.task)
    watch = Watch(recorder.files.read_log("metrics.jsonl"), limit, stranger)
    if is_over(config, done, best):  # an earlier attempt stopped early here, but was killed before its result
        return done

    def write(number: int) -> None:
        recorder.flush(number)
        here = State(
            update=number,
            tokens=trainer.tokens,
            best=best,
            ranks=world(),
            seed=config.seed,
            tracker=recorder.tracker.id,
            began_from=checkpoints.began_from,
            lines=recorder.files.lengths(),
            seconds=recorder.clock.elapsed(),
        )
        checkpoints.write(here, save)

    if state is None and best is not None and config.evaluate == "best":
        write(0)  # the untrained weights may turn out to be the best
    with bar(f"training ({config.method['name']})", updates, done) as shown, requested() as interruption:
        for number in range(done + 1, updates + 1):
            # one update, and an evaluation if it is due
            step = trainer.step(number - 1)
            check_finite(step.metrics, number, step.rows)
            last, evaluation = number == updates, None
            if is_due(config, number, last):
                evaluation = _evaluate(predictor, step, config.trainer.evaluate_limit)
            # record both, and keep the best evaluation
            recorder.update(number, step, last)
            watch.see(step.metrics)
            better = False
            if evaluation is not None:
                recorder.evaluation(number, evaluation)
                watch.see({"step": number, **evaluation.scalars})
                accuracy = evaluation.summary[monitor_split(predictor.task)].accuracy
                better = best is None or accuracy > best[1]
                best = (number, accuracy) if better else best
            shown.advance(note(step.metrics, best, watch.constant, watch.signs.flat))
            # a batch that is used for several updates is not saved, so a requested stop waits for its last update
            stopping = any(gather(interruption.made)) and number % iterations == 0
            # stop early, write a checkpoint, leave on request
            last = last or is_over(config, number, best)
            if better or last or stopping or (config.checkpoint.every and number % config.checkpoint.every == 0):
                write(number)
            if stopping and not last:
                raise Interrupted(f"stopped after update {number} of {updates}; the same command continues it")
            if last and number < updates and best is not None:
                log.info(
                    "stopped by patience after %d of %d updates: none was better than %s", number, updates, at(best[0])
                )
                return number
    return updates


def untrained(predictor: Predictor, config: Config, recorder: Recorder) -> tuple[int, float] | None:
    """Return update 0 and the accuracy of the evaluation before training, as the best so far.

    None if nothing is evaluated during training. All ranks call it together.
    """
    if not config.trainer.evaluate_every:
        return None
    # only rank 0 has the predictions; the result is sent to all
    answers = recorder.kept("before", monitor_split(predictor.task)) if rank() == 0 else None
    right = None
    if answers is not None:
        right = fmean(p.correct for p in evenly_spaced(answers.predictions, config.trainer.evaluate_limit))
    right = gather(right)[0]
    return None if right is None else (0, right)


def is_over(config: Config, number: int, best: tuple[int, float] | None) -> bool:
    """Tell whether training stops early: `patience` evaluations since the best one, after this update."""
    patience = config.trainer.patience
    return bool(patience) and best is not None and number - best[0] >= patience * config.trainer.evaluate_every


def is_due(config: Config, number: int, last: bool) -> bool:
    """Tell whether the monitored split is evaluated after this update.

    All splits are evaluated after the last update anyway; it needs an evaluation here only to choose the best.
    """
    every = config.trainer.evaluate_every
    return bool(every) and (config.evaluate == "best" if last else number % every == 0)


def note(
    metrics: dict[str, float], best: tuple[int, float] | None, constant: Mapping[str, str] | None = None, flat: int = 0
) -> str:
    """Return the text beside the bar: share of truncated completions if large, mean reward or loss of the update, best
    accuracy so far, number of updates in which no group differed, and constant rewards.

    >>> note({"reward": 0.5312, "loss": 0.1}, (20, 0.8123), {"format": "always 0"}), note({"loss": 1.25}, None)
    ('reward 0.531 · best accuracy 81.2 % · format always 0', 'loss 1.250')
    >>> note({"reward": 0.0, "completions/clipped_ratio": 0.92}, None, {}, 12)
    '92 % cut at max_completion_tokens · reward 0.000 · no group differs for 12 updates'
    """
    name, cut = "reward" if "reward" in metrics else "loss", metrics.get("completions/clipped_ratio", 0.0)
    said = [f"{100 * cut:.0f} % cut at max_completion_tokens"] if cut >= CUT else []
    said += [f"{name} {metrics[name]:.3f}"] if name in metrics else []
    said += [f"best accuracy {100 * best[1]:.1f} %" + ("" if best[0] else " (untrained)")] if best else []
    said += [f"no group differs for {counted(flat, 'update')}"] if flat >= WINDOW else []
    return " · ".join(said + [f"{name} {value}" for name, value in (constant or {}).items()])


def is_stranger(config: Config, task: Task) -> bool:
    """Tell whether training should stop if it earns nothing: own photos of classes that the model was never taught."""
    return config.data.own_photos and config.doctor is not False and unknown_classes(config, task) is not None


def hopeless(poor: Mapping[str, float]) -> str:
    """Return why a training on unknown classes stops, and what to do instead. `poor`: from `low_rewards`."""
    means = ", ".join(f"reward '{name}' had a mean of {mean:.3f}" for name, mean in poor.items())
    return (
        f"the training has stopped: in {WINDOW} updates {means}, and the model was never taught"
        f" these classes. Instead, {INSTEAD}; or train it all the same with doctor=false"
    )


class Watch:
    """Warns once of every sign that the training goes wrong, and, after WINDOW batches of completions, of rewards that
    were the same for all completions.

    constant: these rewards, as long as that holds; empty before.
    """

    def __init__(
        self, earlier: Sequence[dict[str, float]], limit: int | None = None, is_stranger: bool = False
    ) -> None:
        """
        Args:
            earlier: Metrics reported so far, including earlier attempts.
            limit: `rollout.max_completion_tokens`.
            is_stranger: The model was never taught the classes: training that earns nothing is stopped.
        """
        self.signs, self.is_stranger = Signs(earlier, limit), is_stranger
        self.seen = [row for row in earlier if "reward" in row]
        self.constant = constant_rewards(self.seen) if len(self.seen) >= WINDOW else {}

    def see(self, metrics: dict[str, float]) -> None:
        """Check the metrics of one update or one evaluation.

        Raises:
            UserError: A model that was never taught the classes has earned next to nothing.
        """
        for line in self.signs.see(metrics).values():
            _warn(line)
        if "reward" not in metrics:  # an evaluation, or another update on the same batch
            return
        self.seen.append(metrics)
        if len(self.seen) > WINDOW:  # a reward that differed once is no longer constant
            still = constant_rewards([self.seen[0], metrics])
            self.constant = {name: value for name, value in self.constant.items() if name in still}
        elif len(self.seen) == WINDOW:
            if self.is_stranger and (poor := low_rewards(self.seen)):
                raise UserError(hopeless(poor))
            self.constant = constant_rewards(self.seen)
            for name, value in self.constant.items():
                _warn(f"reward '{name}' was {value} in {WINDOW} updates: {fix(name, value, self.signs.cut)}")


def _warn(line: str) -> None:
    if rank() == 0:
        log.warning("%s", line)


def _evaluate(predictor: Predictor, step: Step, limit: int | None) -> Evaluation:
    """Evaluate the monitored split; the time is added to the step."""
    clock = time.perf_counter()
    evaluation = during_training(predictor, limit)
    step.seconds["evaluation during training"] = time.perf_counter() - clock
    return evaluation


def check_finite(metrics: dict[str, float], number: int, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Stop at the first NaN or infinity; nothing of that update is recorded, and the last checkpoint is not changed.

    Args:
        metrics: Metrics of the update.
        number: Number of the update.
        rows: Completions of the update.

    Raises:
        UserError: Names the update, the metrics, and the reward that gave such a value, if one did.
    """
    bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    if not bad:
        return
    stopped = f"update {number}: {', '.join(bad)} not finite; training stopped, checkpoints before it are good."
    if culprits := [name.split("/")[1] for name in bad if name.startswith("rewards/") and name.endswith("/mean")]:
        key = f"rewards/{culprits[0]}"
        row = next(row for row in rows if row[key] is not None and not math.isfinite(row[key]))
        raise UserError(
            f"{stopped} The cause is reward '{culprits[0]}': it gave {row[key]} for {row['completion'][:80]!r} to image"
            f" {row['image']}; correct the function that rewards.{culprits[0]}.fn names"
        )
    fix = "Lower trainer.learning_rate or trainer.grad_clip, or use model.dtype=float32, under another run_name"
    raise UserError(f"{stopped} {fix}")
