"""One run, top to bottom. Every rank executes this; rank 0 writes.

task -> model -> zero-shot evaluation -> training -> evaluation -> weights, tables, figures
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import metrics, task
from common.data import manifest
from common.distributed import rank
from common.engine import init_process_group
from common.evaluate import evaluate
from common.grpo.trainer import GRPOTrainer
from common.models import files, vlm
from common.plugins import locate
from common.progress import progress
from common.report import figures
from common.result import describe, paired
from common.rewards import build_rewards
from common.rollout.base import Decoding, Rollout
from common.run_folder import RunFolder
from common.schedule import total_updates
from common.schema import GRPO, Config
from common.sft import SFTTrainer
from common.task import Questions
from common.tracking import NullTracker, Tracker, WandbTracker
from common.types import Prediction, Result, Trainer

COMPLETIONS_EVERY = 25  # updates between two writes of sampled completions


def run(config: Config, values: dict[str, Any], folder: Path) -> Result:
    """Train and evaluate one configuration.

    Args:
        config: Validated configuration.
        values: The same as plain values, for the run folder and the tracker.
        folder: Run folder, already claimed.

    Returns:
        The result, as written to metrics.json.
    """
    began = time.perf_counter()
    device = init_process_group(config.gpus)
    torch.manual_seed(config.seed)
    place = RunFolder(folder)
    questions = task.build(config)
    if rank() == 0:
        manifest.write(questions.manifest, folder / "manifest.json")

    checkpoint = find_checkpoint(config)
    seconds = {"model": time.perf_counter() - began}
    policy = vlm.load(checkpoint, config.model, device)
    encoder = vlm.Encoder(policy, questions.task.open, config.model.image_size, config.model.max_prompt_tokens)
    rollout: Rollout = locate(config.rollout.backend, "rollout.backend")(policy)
    result = describe(config, values, checkpoint, questions)
    seconds["load"] = time.perf_counter() - began - seconds["model"]

    def evaluate_all(phase: str) -> dict[tuple[str, str], list[Prediction]]:
        return {
            (phase, split): timed_evaluation(config, rollout, encoder, questions, split, phase, result)
            for split in questions.evaluation
        }

    predictions = evaluate_all("zero_shot")
    tracker = make_tracker(config, values, folder, questions)
    failed = True
    try:
        if config.trainer.name == "none":
            result.eval = result.zero_shot
            predictions |= {("eval", split): found for (_, split), found in predictions.items()}
            updates = 0
        else:
            updates = total_updates(config.trainer, len(questions.train))
            trainer = make_trainer(config, policy, encoder, rollout, questions, updates)
            trained = train(
                config, trainer, updates, place, tracker, lambda: evaluate_during(config, rollout, encoder, questions)
            )
            seconds |= trained
            manifest.verify(folder / "manifest.json", task.build(config).manifest)
            predictions |= evaluate_all("eval")
            trainer.close()
            save_weights(policy, folder / "model")
        seconds |= {
            "evaluation": sum(s["seconds"] for phase in (result.zero_shot, result.eval) for s in phase.values())
        }
        seconds["total"] = time.perf_counter() - began
        result.train = {"updates": updates, "seconds": seconds}
        if updates:
            result.train["paired"] = paired(predictions)
        if rank() == 0:
            write_reports(place, result, predictions, questions)
        failed = False
    finally:
        summary = {f"eval/{split}/accuracy": s["accuracy"] for split, s in result.eval.items()}
        tracker.close(summary, failed)
        place.close()
    return result


def find_checkpoint(config: Config) -> Path:
    """The checkpoint folder of the run's model; built or fetched on first use."""
    model = config.model
    if model.recipe is not None:
        return files.build(model.recipe, config.cache_dir)
    assert model.path is not None
    return files.find(model.path, model.revision)


def make_trainer(
    config: Config, policy: vlm.VLM, encoder: vlm.Encoder, rollout: Rollout, questions: Questions, updates: int
) -> Trainer:
    """The trainer that `trainer.name` asks for."""
    if isinstance(config.trainer, GRPO):
        sampling = config.rollout
        return GRPOTrainer(
            vlm=policy,
            encoder=encoder,
            rollout=rollout,
            prompts=questions.train,
            rewards=build_rewards(config.rewards),
            decoding=Decoding(sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_completion_tokens),
            config=config.trainer,
            deepspeed=config.deepspeed,
            updates=updates,
            seed=config.seed,
        )
    return SFTTrainer(
        vlm=policy,
        encoder=encoder,
        prompts=questions.train,
        loss=config.protocol.sft_loss,
        config=config.trainer,
        deepspeed=config.deepspeed,
        updates=updates,
        seed=config.seed,
    )


def train(
    config: Config,
    trainer: Trainer,
    updates: int,
    place: RunFolder,
    tracker: Tracker,
    evaluate_now: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """The loop over updates. Returns the seconds of each phase."""
    seconds: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for update in progress(range(updates), f"training ({config.method['name']})", updates):
        step = trainer.step(update)
        number = update + 1
        for phase, value in step.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + value
        found = {**step.metrics, **{f"time/{phase}_s": value for phase, value in step.seconds.items()}}
        every = config.trainer.evaluate_every
        if every and number % every == 0 and number < updates:
            start = time.perf_counter()
            found |= evaluate_now()
            seconds["evaluation during training"] = (
                seconds.get("evaluation during training", 0.0) + time.perf_counter() - start
            )
        rows += step.rows
        if rank() == 0:
            place.log_metrics({"step": number, **found})
            tracker.log(found, number)
            if number % config.tracking.completions_every == 0 or number == updates:
                tracker.completions(step.rows, number)
            if rows and (number % COMPLETIONS_EVERY == 0 or number == updates):
                place.write_completions(rows, number)
                rows = []
    if rank() == 0:
        place.merge_completions()
    return seconds


def timed_evaluation(
    config: Config, rollout: Rollout, encoder: vlm.Encoder, questions: Questions, split: str, phase: str, result: Result
) -> list[Prediction]:
    """Evaluate a split and put its summary into the result under `phase`."""
    start = time.perf_counter()
    found = evaluate(
        rollout,
        encoder,
        questions.method,
        questions.evaluation[split],
        config.rollout.max_completion_tokens,
        config.rollout.evaluation_batch,
        f"evaluating {split} ({phase.replace('_', '-')})",
    )
    getattr(result, phase)[split] = metrics.summarize(found, questions.task.names, time.perf_counter() - start)
    return found


def evaluate_during(config: Config, rollout: Rollout, encoder: vlm.Encoder, questions: Questions) -> dict[str, float]:
    """Accuracy between two updates: on val where the task has one, else on test, at most `evaluate_limit` images."""
    split = "val" if "val" in questions.evaluation else "test"
    prompts = questions.evaluation[split][: config.trainer.evaluate_limit]
    found = evaluate(
        rollout,
        encoder,
        questions.method,
        prompts,
        config.rollout.max_completion_tokens,
        config.rollout.evaluation_batch,
        f"evaluating {split}",
    )
    summary = metrics.summarize(found, questions.task.names, seconds=0.0)
    return {f"eval/{split}/{key}": summary[key] for key in ("accuracy", "accuracy_official", "n")}


def save_weights(policy: vlm.VLM, folder: Path) -> None:
    """A folder that `from_pretrained` loads: model (or adapter) and processor."""
    if rank() == 0:
        policy.model.save_pretrained(folder)
        policy.processor.save_pretrained(folder)


def make_tracker(config: Config, values: dict[str, Any], folder: Path, questions: Questions) -> Tracker:
    """W&B on rank 0, nothing elsewhere."""
    if rank() != 0 or config.tracking.mode == "disabled":
        return NullTracker()
    tags = [config.method["name"], config.data.name, config.setting.name, f"s{config.shots}"]
    job_type = "eval" if config.trainer.name == "none" else "train"
    return WandbTracker(config.tracking, folder, job_type, tags, values, questions.evaluation, questions.task.open)


def write_reports(
    place: RunFolder, result: Result, predictions: dict[tuple[str, str], list[Prediction]], questions: Questions
) -> None:
    """Predictions, pictures, and last the result, whose presence means that the run is finished."""
    place.write_predictions(predictions)
    title = (
        f"{result.method}, {result.data}, {result.shots} shots, seed {result.seed} ({result.model}, {result.protocol})"
    )
    before, after = result.zero_shot["test"], result.eval["test"]
    figures.curves(place.metrics(), before["accuracy"], after["accuracy"], title, place.path / "curves.png")
    table = metrics.confusion(predictions["eval", "test"], questions.task.names)
    label = f"{title}\ntest accuracy {100 * after['accuracy']:.1f} % of {after['n']}"
    figures.confusion(table, questions.task.names, label, place.path / "confusion.png")
    place.write_result(result)
