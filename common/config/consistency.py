"""Values that do not go together, each in range by itself."""

from __future__ import annotations

from typing import Any

from common.config.schema import Config, GRPOConfig
from common.types import UserError

# Handed to DeepSpeed as they are; batch sizes, clipping and precision follow from other values.
DEEPSPEED_KEYS = {
    *(
        "zero_optimization",
        "zero_force_ds_cpu_optimizer",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
    ),
    *("wall_clock_breakdown", "memory_breakdown", "flops_profiler", "comms_logger", "dump_state", "steps_per_print"),
}


def check_iterations(config: Config) -> None:
    """A checkpoint falls between two rollout batches: a batch that is half used is not saved."""
    if not isinstance(config.trainer, GRPOConfig):
        return
    several = config.trainer.num_iterations
    for key, value in (
        ("checkpoint.every", config.checkpoint.every),
        ("trainer.evaluate_every", config.trainer.evaluate_every),
    ):
        if value % several:
            raise UserError(f"{key}={value} must be divisible by trainer.num_iterations={several}")


def check_overlap(config: Config) -> None:
    """What is sampled an update ahead has to be weighed by how far the policy has moved since."""
    trainer = config.trainer
    if not config.rollout.overlap or not isinstance(trainer, GRPOConfig):
        return
    if trainer.importance_correction == "none":
        raise UserError(
            "rollout.overlap=true samples with weights that are one update old; set"
            " trainer.importance_correction=token_truncate, or another that is not none"
        )
    if trainer.num_iterations > 1 or trainer.zero_variance == "resample":
        raise UserError(
            "rollout.overlap=true needs trainer.num_iterations=1, and trainer.zero_variance=keep or skip: the sampler"
            " works while the update does"
        )


def check_deepspeed(values: dict[str, Any]) -> None:
    """Keys that DeepSpeed would pass over in silence."""
    if unknown := sorted(values.keys() - DEEPSPEED_KEYS):
        raise UserError(f"unknown config key deepspeed.{unknown[0]}; known are {', '.join(sorted(DEEPSPEED_KEYS))}")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed.zero_optimization.stage={stage}: choose 0, 1, 2 or 3")
