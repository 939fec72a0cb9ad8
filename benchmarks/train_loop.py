"""Compare whole updates (sampling, rewards, training) on the tiny model with `trl.GRPOTrainer`.

    python -m benchmarks.train_loop                  # 100 updates; --updates 20 for a quick look

Direct answers (method=nothinking) and thinking ones (method=clsrl) on the real digits, with the demo's configuration
on both sides: 16 prompts per update in the same order, 8 completions of at most 40 tokens at temperature 1 without
truncation, the same banned ids, rewards, AdamW, learning rates and beta = 0. Accuracy is greedy, on the same test
images and by the same evaluation, after the last update.

Each side has its own process, and they alternate update by update; CPU seconds of one thread. TRL has its fastest
settings: one forward for the whole batch, no gradient checkpointing, its head on completion tokens only as on GPUs
(`benchmarks.setup.completion_rows_only`), no logging or saving. Our side skips zero-variance groups, as in every run
with beta = 0.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.setup import completion_rows_only, prepare, show

if TYPE_CHECKING:
    from common.vlm.learner import VLMLearner

METHODS = {"direct": "nothinking", "think": "clsrl"}
SIDES = ("ours", "trl")
WARM_UP = 5  # updates that are not counted


@dataclass(frozen=True)
class Plan:
    """Settings of both sides."""

    method: str
    updates: int
    images: int


def compose(plan: Plan) -> Any:
    """Return the demo's configuration, as from the command line."""
    import hydra

    from common.config import composition as config

    config.register()
    overrides = [f"method={plan.method}", f"trainer.updates={plan.updates}", "tracking=none"]
    with hydra.initialize_config_dir(str(Path(__file__).parent.parent / "conf"), version_base="1.3"):
        return config.validate(hydra.compose("config", overrides))


def load(config: Any, folder: str) -> VLMLearner:
    """Build the learner as common/pipeline.py does; `folder`: run folder, which may be empty."""
    from common.data import task
    from common.run.checkpoint import Checkpoints
    from common.vlm.learner import VLMLearner

    run = Path(folder)
    return VLMLearner(config, task.build(config), torch.device("cpu"), run, Checkpoints(run / "checkpoints", 1))


def accuracy(learner: VLMLearner, images: int) -> float:
    """Return the greedy accuracy on test images spread over the classes."""
    return statistics.fmean(each.correct for each in learner.predict("test", images).predictions)


def ours(pipe: Connection, plan: Plan) -> None:
    """Run our side: one update per message, then the accuracy."""
    from common.runtime.group import init_process_group

    prepare()
    init_process_group(gpus=0)
    with tempfile.TemporaryDirectory() as folder:
        learner = load(compose(plan), folder)
        learner.trainer = trainer = learner.make_trainer()
        for update in range(plan.updates):
            pipe.recv()
            start = time.process_time()
            step = trainer.step(update)
            pipe.send((time.process_time() - start, step.metrics["completions/mean_length"]))
        score = accuracy(learner, plan.images)
        learner.close()
    pipe.send(score)


def trl(pipe: Connection, plan: Plan) -> None:
    """Run TRL's side: one update per message, then the accuracy."""
    from transformers import AutoModelForImageTextToText, PrinterCallback, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from common.runtime.group import init_process_group
    from common.training.base import learning_rate

    prepare()
    init_process_group(gpus=0)
    config = compose(plan)
    settings, sampling = config.trainer, config.rollout
    with tempfile.TemporaryDirectory() as folder:
        learner = load(config, folder)
    source = learner.weights["path"]
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=tuple(settings.betas), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: learning_rate(settings, update, plan.updates) / settings.learning_rate
    )
    rows = settings.prompts_per_update * settings.group_size

    class TakeTurns(TrainerCallback):
        """Wait for a message before every update and report its CPU seconds after it."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pipe.recv()
            self.start = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = time.process_time() - self.start
            pipe.send((seconds, trainer._metrics["train"]["completions/mean_length"][-1]))
            if state.global_step < plan.updates:
                pipe.recv()
                self.start = time.process_time()

    with tempfile.TemporaryDirectory() as workdir, completion_rows_only():
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward_function(learner),
            args=GRPOConfig(
                output_dir=workdir,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_steps=plan.updates + 1,
                disable_tqdm=True,
                seed=config.seed,
                max_steps=plan.updates,
                per_device_train_batch_size=rows,
                num_generations=settings.group_size,
                max_completion_length=sampling.max_completion_tokens,
                shuffle_dataset=False,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                generation_kwargs={"suppress_tokens": list(learner.policy.banned)},
                max_grad_norm=settings.grad_clip,
                loss_type="grpo",
                beta=settings.beta,
                epsilon=settings.epsilon,
            ),
            train_dataset=trl_dataset(config, learner, plan.updates),
            processing_class=learner.policy.processor,
            optimizers=(optimizer, schedule),
            callbacks=[TakeTurns()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # evaluate TRL's weights with our evaluation
    learner.policy.model.load_state_dict(trainer.accelerator.unwrap_model(trainer.model).state_dict())
    pipe.send(accuracy(learner, plan.images))


def trl_dataset(config: Any, learner: VLMLearner, updates: int) -> Any:
    """Return every prompt of every update in our order, with images enlarged as by our encoder."""
    from datasets import Dataset
    from PIL.Image import Resampling

    from common.training.base import batch

    train, settings = learner.prompts.train, config.trainer
    size = (config.model.image_size,) * 2
    order = [
        number
        for update in range(updates)
        for _, number in batch(update, settings.prompts_per_update, len(train), config.seed)
    ]
    pictures = [learner.task.images.open(p.image).convert("RGB").resize(size, Resampling.LANCZOS) for p in train]

    def rows() -> Iterator[dict[str, Any]]:
        for number in order:
            message = {"role": "user", "content": train[number].text}
            yield {"prompt": [message], "image": pictures[number], "number": number}

    return Dataset.from_list(list(rows()))


def reward_function(learner: VLMLearner) -> Callable[..., list[float | None]]:
    """Return our reward mix as a reward function for TRL."""
    from common.rewards import score
    from common.types import Sample

    rewards, train = learner.rewards, learner.prompts.train

    def reward(completions: list[Any], number: list[int], **_: Any) -> list[float | None]:
        samples = [Sample(train[i], reply[0]["content"]) for i, reply in zip(number, completions, strict=True)]
        return [*score(samples, rewards).total]

    return reward


def measure(plan: Plan) -> dict[str, Any]:
    """Measure both sides of one method, alternating update by update."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        workers.append(context.Process(target=globals()[side], args=(theirs, plan), daemon=True))
        workers[-1].start()
        theirs.close()  # so that a worker that dies ends the benchmark instead of hanging it
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    lengths: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(plan.updates):
        for side in SIDES:
            pipes[side].send(None)
            spent, length = pipes[side].recv()
            seconds[side].append(spent)
            lengths[side].append(length)
    accuracies = {side: pipes[side].recv() for side in SIDES}
    for worker in workers:
        worker.join()
    counted = {side: seconds[side][WARM_UP:] for side in SIDES}
    medians = {side: statistics.median(counted[side]) for side in SIDES}
    return {
        "ratio": medians["trl"] / medians["ours"],
        "ratio_of_means": sum(counted["trl"]) / sum(counted["ours"]),
        "accuracy": accuracies["ours"],
        "trl_accuracy": accuracies["trl"],
        "seconds": medians,
        "range": {side: [min(counted[side]), max(counted[side])] for side in SIDES},
        "mean_length": {side: statistics.fmean(lengths[side]) for side in SIDES},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--images", type=int, default=1000, help="test images for the accuracy")
    parser.add_argument("--case", choices=METHODS, action="append", help="one of the two, default both")
    options = parser.parse_args()
    if options.updates <= WARM_UP:
        parser.error(f"--updates must be above {WARM_UP}, which are not counted")
    cases = {}
    for case in options.case or METHODS:
        cases[case] = measure(Plan(METHODS[case], options.updates, options.images))
    rows = []
    for case, numbers in cases.items():
        for side in SIDES:
            low, high = numbers["range"][side]
            rows.append(
                (
                    case,
                    side,
                    f"{numbers['seconds'][side]:.3f} [{low:.3f}, {high:.3f}]",
                    "" if side == "ours" else f"{numbers['ratio']:.2f}",
                    f"{numbers['mean_length'][side]:.1f}",
                    f"{100 * numbers['accuracy' if side == 'ours' else 'trl_accuracy']:.1f}",
                )
            )
    columns = ("case", "side", "CPU s per update: median [min, max]", "x ours", "mean tokens", "accuracy %")
    show(f"Whole updates on the tiny model, {options.updates} updates, one thread", columns, rows, {"cases": cases})


if __name__ == "__main__":
    main()
