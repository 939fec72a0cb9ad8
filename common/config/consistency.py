"""Check combinations of values that are valid one by one but not together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.schema import REPLACED, Config, GRPOConfig
from common.types import UserError

# keys passed on to DeepSpeed; batch sizes, clipping and precision follow from other values
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
    """Check that checkpoints fall between two rollout batches, since a partly used batch is not saved."""
    if not isinstance(config.trainer, GRPOConfig):
        return
    several = config.trainer.updates_per_rollout
    for key, value in (
        ("checkpoint.every", config.checkpoint.every),
        ("trainer.evaluate_every", config.trainer.evaluate_every),
    ):
        if value % several:
            raise UserError(
                f"{key}={value} must be divisible by the updates on a rollout batch, {several}"
                " (trainer.steps_per_rollout x trainer.num_iterations)"
            )


def check_overlap(config: Config) -> None:
    """Check that `rollout.overlap`, which samples with weights one update old, comes with importance correction."""
    trainer = config.trainer
    if not config.rollout.overlap or not isinstance(trainer, GRPOConfig):
        return
    if trainer.importance_correction == "none":
        raise UserError(
            "rollout.overlap=true samples with weights that are one update old; set"
            " trainer.importance_correction=token_truncate, or another that is not none"
        )
    if trainer.updates_per_rollout > 1 or trainer.zero_variance in REPLACED:
        raise UserError(
            "rollout.overlap=true needs trainer.num_iterations=1, trainer.steps_per_rollout=1, and"
            " trainer.zero_variance=keep or skip: the sampler"
            " works while the update does"
        )


def check_deepspeed(values: dict[str, Any]) -> None:
    """Check the keys of the DeepSpeed configuration; DeepSpeed would ignore unknown ones."""
    if unknown := sorted(values.keys() - DEEPSPEED_KEYS):
        raise UserError(f"unknown config key deepspeed.{unknown[0]}; known are {', '.join(sorted(DEEPSPEED_KEYS))}")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed.zero_optimization.stage={stage}: choose 0, 1, 2 or 3")


@dataclass(frozen=True)
class Overruled:
    """Rule about a key that has no effect because of another value.

    key: the key, with all keys below it.
    by: function from a configuration to the other value as `key=value`, or to None if the key has an effect.
    fix: how to give it an effect.
    """

    key: str
    by: Callable[[Config], str | None]
    fix: str


def _if(key: str, holds: Callable[[Any], bool]) -> Callable[[Config], str | None]:
    """Return a function for `Overruled.by`: it gives `key=value` if the key exists and the condition holds."""

    def by(config: Config) -> str | None:
        value: Any = config
        for part in key.split("."):
            value = value.get(part, _NOTHING) if isinstance(value, dict) else getattr(value, part, _NOTHING)
        return f"{key}={value}" if value is not _NOTHING and holds(value) else None

    return by


_NOTHING = object()


def _given(value: Any) -> bool:
    return value is not None


def _not_fitted(config: Config) -> str | None:
    """Return the value because of which a run fits no few-shot learner, as `key=value`; None: it fits one."""
    if "learner" in config.method or config.method.get("draft") == "few_shot":
        return None
    return f"method.draft={config.method['draft']}" if "draft" in config.method else f"method={config.method['name']}"


def _judged(config: Config) -> str | None:
    """Return the judge that verifies in place of a taxonomy, as `key=value`."""
    judge = config.method.get("judge")
    return None if judge is None else f"method.judge.backend={judge.get('backend')}"


def _differs(key: str, other: Callable[[Config], Any]) -> Callable[[Config], str | None]:
    return lambda config: _if(key, lambda value: value != other(config))(config)


OVERRULED = (
    Overruled("trainer.epochs", _if("trainer.updates", _given), "add trainer.updates=null"),
    Overruled("trainer.evaluate_limit", _if("trainer.evaluate_every", lambda n: n == 0), "set trainer.evaluate_every"),
    Overruled("trainer.final_ratio", _if("trainer.schedule", lambda s: s == "constant"), "choose another schedule"),
    Overruled(
        "trainer.importance_cap", _if("trainer.importance_correction", lambda c: c == "none"), "choose a correction"
    ),
    Overruled(
        "trainer.importance_floor", _if("trainer.importance_correction", lambda c: c == "none"), "choose a correction"
    ),
    Overruled(
        "trainer.resample_rounds",
        _if("trainer.zero_variance", lambda z: z not in REPLACED),
        "set trainer.zero_variance=resample or refill",
    ),
    Overruled(
        "trainer.zero_variance_by",
        _if("trainer.zero_variance", lambda z: z == "keep"),
        "set trainer.zero_variance=skip, resample or refill",
    ),
    Overruled("model.recipe", _if("model.path", _given), "leave one of the two out"),
    Overruled(
        "model.revision", _if("model.path", lambda p: p is None or Path(p).expanduser().is_dir()), "give a hub id"
    ),
    Overruled("model.lora.alpha", _if("model.lora.r", lambda r: r == 0), "set model.lora.r"),
    Overruled("model.lora.targets", _if("model.lora.r", lambda r: r == 0), "set model.lora.r"),
    Overruled("protocol.sampler", _differs("sampler", lambda config: config.protocol.sampler), "set sampler alone"),
    Overruled(
        "setting.list_share",
        _differs("method.list_share", lambda config: config.setting.list_share),
        "set setting.list_share alone",
    ),
    Overruled(
        "data.question", _if("method.list_share", lambda share: share == 0), "open questions are data.open_question"
    ),
    Overruled("data.open_question", _if("method.list_share", lambda share: share > 0), "use setting=open_set"),
    Overruled(
        "data.open_question", _if("method.question", lambda asked: asked == "general"), "add method.question=data"
    ),
    Overruled("data.folder", _if("data.source", lambda source: source == "hub"), "use data.source=local"),
    Overruled("data.reader", _if("data.source", lambda source: source == "hub"), "use data.source=local"),
    Overruled("data.hub", _if("data.source", lambda source: source == "local"), "use data.source=hub"),
    Overruled("clip.templates", _if("clip.prompts", _given), "add clip.prompts=null"),
    Overruled("method.draft_file", _if("method.draft", lambda draft: draft != "file"), "add method.draft=file"),
    Overruled(
        "few_shot",
        _not_fitted,
        "a learner is fitted by the method of its name, or by method=alert with method.draft=few_shot",
    ),
    Overruled("method.taxonomy", _judged, "add method.judge=null, or leave rewards=speciarl_judge out"),
    Overruled("method.initialisation", _if("method.bank", _given), "add method.bank=null"),
)


def check_typed(config: Config, typed: Sequence[str]) -> None:
    """Check that every override of the user has an effect.

    Args:
        config: Validated configuration.
        typed: Overrides of the command line, or of one run of a sweep.

    Raises:
        UserError: Names the value that makes an override meaningless.
    """
    given = {key.lstrip("+"): value for key, _, value in (each.partition("=") for each in typed) if key[:1] != "~"}
    if "run_name" in given and given.get("label", "null") != "null":
        raise UserError(f"label={given['label']} has no effect: run_name={given['run_name']} goes first; leave one out")
    for rule in OVERRULED:
        for key, value in given.items():
            if value in ("null", "") or not f"{key}.".startswith(f"{rule.key}."):
                continue
            if (by := rule.by(config)) is not None:
                chosen = "" if by.partition("=")[0] in given else ", from a file of conf/,"
                raise UserError(f"{key}={value} has no effect: {by}{chosen} goes first; {rule.fix}")
