"""One run, top to bottom. Every rank executes this; rank 0 writes.

task -> model -> zero-shot evaluation -> training -> evaluation -> weights, tables, figures
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from common import task
from common.data import manifest
from common.distributed import barrier, rank
from common.engine import init_process_group
from common.evaluate import Evaluator
from common.grpo.trainer import GRPOTrainer
from common.label_scores import LabelScorer
from common.models import files, vlm
from common.plugins import locate
from common.progress import progress
from common.recorder import Recorder
from common.result import describe, paired
from common.rewards import build_rewards
from common.rollout.base import Decoding, Rollout
from common.run_folder import RunFolder
from common.schedule import total_updates
from common.schema import GRPO, Config
from common.sft import SFTTrainer
from common.task import Questions
from common.tracking import NullTracker, Tracker, WandbTracker
from common.types import Result, Trainer


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
    questions = task.build(config)
    if rank() == 0:
        manifest.write(questions.manifest, folder / "manifest.json")
    barrier()

    checkpoint = find_checkpoint(config)
    seconds = {"model": time.perf_counter() - began}
    policy = vlm.load(checkpoint, config.model, device)
    encoder = vlm.Encoder(policy, questions.task.open, config.model.image_size, config.model.max_prompt_tokens)
    rollout: Rollout = locate(config.rollout.backend, "rollout.backend")(policy)
    labels = LabelScorer(policy) if config.label_scoring else None
    evaluator = Evaluator(rollout, encoder, questions, config.rollout, labels)
    tracker = make_tracker(config, values, folder, questions)
    recorder = Recorder(RunFolder(folder), tracker, config.tracking.completions_every)
    seconds["load"] = time.perf_counter() - began - seconds["model"]

    result = describe(config, values, checkpoint, questions)
    failed = True
    try:
        manifest.verify(folder / "manifest.json", questions.manifest)
        before = after = evaluator.all_splits("zero-shot")
        recorder.evaluation(0, before)
        updates = total_updates(config.trainer, len(questions.train))
        if updates:
            trainer = make_trainer(config, policy, encoder, rollout, questions, updates)
            try:
                seconds |= train(config, trainer, updates, recorder, evaluator)
            finally:
                trainer.close()
            save_weights(policy, folder / "model")
            manifest.verify(folder / "manifest.json", task.build(config).manifest)
            after = evaluator.all_splits("trained")
            recorder.evaluation(updates, after)
        result.zero_shot, result.eval = before.summary, after.summary
        seconds["total"] = time.perf_counter() - began
        result.train = {"updates": updates, "seconds": seconds, "paired": paired(before, after) if updates else {}}
        recorder.finish(result, before, after, questions.task.names)
        failed = False
    finally:
        recorder.close(failed)
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


def train(config: Config, trainer: Trainer, updates: int, recorder: Recorder, evaluator: Evaluator) -> dict[str, float]:
    """The loop over updates. Returns the seconds of each phase."""
    seconds: dict[str, float] = {}
    every = config.trainer.evaluate_every
    for update in progress(range(updates), f"training ({config.method['name']})", updates):
        step = trainer.step(update)
        number = update + 1
        recorder.update(number, step, last=number == updates)
        spent = dict(step.seconds)
        if every and number % every == 0 and number < updates:
            start = time.perf_counter()
            recorder.evaluation(number, evaluator.during_training(config.trainer.evaluate_limit))
            spent["evaluation during training"] = time.perf_counter() - start
        seconds = {phase: seconds.get(phase, 0.0) + spent.get(phase, 0.0) for phase in seconds | spent}
    return seconds


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
