"""Types of the configuration, and the checks that run before anything expensive.

YAML files in conf/ hold the values; these dataclasses hold the types, so a misspelt key or a wrong type is refused while
Hydra composes. They are registered under `schema/`, apart from the groups a user chooses from. `validate` does what
Hydra leaves out: keys appended with `+`, unresolved values, rules across values, and calls to configured functions.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.models.families import FAMILIES
from common.plugins import check_call, locate
from common.types import UserError


@dataclass
class Data:
    """A dataset. `reader` is the function that finds its images and labels."""

    name: str = MISSING
    reader: str = MISSING
    question: str = MISSING
    root: str | None = None


@dataclass
class Setting:
    """What the model is tested on relative to what it was trained on."""

    name: str = MISSING


@dataclass
class Protocol:
    """Choices in which the CLS-RL authors' code and a sound evaluation differ, each a switch of its own."""

    name: str = MISSING
    accuracy_match: str = MISSING
    format_match: str = MISSING
    evaluation_prompt: str = MISSING
    sft_loss: str = MISSING
    sft_system_prompt: str = MISSING

    def __post_init__(self) -> None:
        for key in ("accuracy_match", "format_match"):
            one_of(f"protocol.{key}", getattr(self, key), ("strict", "official"))
        one_of("protocol.evaluation_prompt", self.evaluation_prompt, ("train", "official"))
        one_of("protocol.sft_loss", self.sft_loss, ("answer", "everything"))
        one_of("protocol.sft_system_prompt", self.sft_system_prompt, ("default", "think"))


@dataclass
class Lora:
    """Low-rank adapters on the modules whose full name matches the regular expression `targets`."""

    r: int = 16
    alpha: int = 32
    targets: str = MISSING


@dataclass
class Model:
    """A checkpoint: a folder or hub id (`path`), or a module with `build` and `meter` that makes one (`recipe`)."""

    name: str = MISSING
    family: str = MISSING
    path: str | None = None
    revision: str | None = None
    recipe: str | None = None
    dtype: str = "bfloat16"
    image_size: int = MISSING
    max_prompt_tokens: int = MISSING
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    gpus: int = 1

    def __post_init__(self) -> None:
        one_of("model.family", self.family, tuple(FAMILIES))
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        if (self.path is None) == (self.recipe is None):
            raise UserError("model: set either model.path (folder or hub id) or model.recipe (module), the other to null")


@dataclass
class Trainer:
    """Optimisation shared by GRPO and SFT; an update is one optimiser step over `prompts_per_update` prompts."""

    name: str = MISSING
    learning_rate: float = 0.0
    schedule: str = "linear"
    final_ratio: float = 0.0
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    grad_clip: float = 1.0
    epochs: float = 0.0
    updates: int | None = None
    prompts_per_update: int = 16
    prompts_per_forward: int = 1
    evaluate_every: int = 0
    evaluate_limit: int | None = None

    def __post_init__(self) -> None:
        one_of("trainer.schedule", self.schedule, ("linear", "cosine", "constant"))
        if self.name == "none":
            return
        for key in ("learning_rate", "prompts_per_update", "prompts_per_forward"):
            positive(f"trainer.{key}", getattr(self, key))
        if self.updates is None:
            positive("trainer.epochs", self.epochs)
        else:
            positive("trainer.updates", self.updates)


@dataclass
class GRPO(Trainer):
    """Group Relative Policy Optimization (arXiv 2402.03300)."""

    group_size: int = MISSING
    beta: float = MISSING
    epsilon: float = MISSING
    forward: str = "shared"
    self_check: bool = True
    head_chunk: int = 1024
    shuffle_rewards: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("trainer.forward", self.forward, ("shared", "plain"))
        if self.group_size < 2:
            raise UserError(
                f"trainer.group_size={self.group_size}: GRPO compares completions of one prompt, use at least 2"
            )
        if self.beta < 0 or self.epsilon <= 0:
            raise UserError(f"trainer.beta={self.beta} must be >= 0 and trainer.epsilon={self.epsilon} > 0")


@dataclass
class Rollout:
    """How completions are sampled for training, and how many tokens evaluation may use."""

    name: str = MISSING
    backend: str = MISSING
    temperature: float = MISSING
    top_k: int = MISSING
    top_p: float = MISSING
    max_completion_tokens: int = MISSING
    evaluation_batch: int = MISSING

    def __post_init__(self) -> None:
        positive("rollout.temperature", self.temperature)
        positive("rollout.max_completion_tokens", self.max_completion_tokens)
        positive("rollout.evaluation_batch", self.evaluation_batch)
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"rollout.top_k={self.top_k} must be >= 0 (0: off), rollout.top_p={self.top_p} in (0, 1]")


@dataclass
class Tracking:
    """Weights & Biases. `mode: auto` is online with an API key and offline without one."""

    name: str = MISSING
    project: str = MISSING
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str = "auto"
    completions_every: int = 10
    completions_rows: int = 8

    def __post_init__(self) -> None:
        one_of("tracking.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass
class Config:
    """One run."""

    method: dict[str, Any] = field(default_factory=dict)
    data: Data = MISSING
    setting: Setting = MISSING
    protocol: Protocol = MISSING
    model: Model = MISSING
    rewards: dict[str, Any] = field(default_factory=dict)
    trainer: Trainer = MISSING
    rollout: Rollout = MISSING
    deepspeed: dict[str, Any] = field(default_factory=dict)
    tracking: Tracking = MISSING
    shots: int = 16
    seed: int = 1
    gpus: int = MISSING
    cache_dir: str = MISSING
    run_name: str = MISSING


SCHEMAS = {
    "config": Config,
    "data": Data,
    "setting": Setting,
    "protocol": Protocol,
    "model": Model,
    "trainer": Trainer,
    "grpo": GRPO,
    "rollout": Rollout,
    "tracking": Tracking,
}
# Keys that do not change a result: where it goes, how it is watched, how many processes compute it.
NOT_IN_SIGNATURE = ("tracking", "run_name", "gpus", "cache_dir")


def register() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(group="schema", name=name, node=schema)


def one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: choose one of {', '.join(allowed)}")


def positive(key: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{key}={value} must be above 0")


def validate(cfg: DictConfig) -> Config:
    """Check a composed configuration and return it as plain dataclasses.

    Raises:
        UserError: With the key at fault.
    """
    if unknown := list(_unknown_keys(cfg)):
        raise UserError(f"unknown config key: {', '.join(unknown)}; `python run.py --cfg job` shows all keys")
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from error
    assert isinstance(config, Config)
    positive("shots", config.shots)
    if config.gpus < 0:
        raise UserError(f"gpus={config.gpus}: give the number of GPUs, 0 to compute on the CPU")
    ranks = max(1, config.gpus)
    if config.trainer.name != "none" and config.trainer.prompts_per_update % ranks:
        raise UserError(
            f"trainer.prompts_per_update={config.trainer.prompts_per_update} must be divisible by gpus={ranks}"
        )
    if config.trainer.name == "grpo" and not config.rewards:
        raise UserError("rewards is empty, but trainer=grpo learns from rewards; choose e.g. rewards=nothinking")
    _check_calls(config)
    return config


def _check_calls(config: Config) -> None:
    for key in ("_target_", "name"):
        if key not in config.method:
            raise UserError(f"method.{key} is missing; see conf/method/ for examples")
    check_call(config.method["_target_"], "method._target_", method_arguments(config))
    locate(config.data.reader, "data.reader")
    for name, entry in config.rewards.items():
        if not isinstance(entry, dict) or not {"weight", "fn"} <= entry.keys():
            raise UserError(f"rewards.{name} must be {{weight: number, fn: dotted.path, ...}}, got {entry}")
        if isinstance(entry["weight"], bool) or not isinstance(entry["weight"], int | float):
            raise UserError(f"rewards.{name}.weight={entry['weight']!r} must be a number")
        arguments = {key: value for key, value in entry.items() if key not in ("weight", "fn")}
        check_call(entry["fn"], f"rewards.{name}.fn", arguments, given=1)


def method_arguments(config: Config) -> dict[str, Any]:
    """Keyword arguments of the method: its config entry without the entry's own bookkeeping."""
    return {key: value for key, value in config.method.items() if key not in ("_target_", "name")}


def _unknown_keys(node: DictConfig, path: str = "") -> Iterator[str]:
    """Dotted names of keys that were appended with `+` and that no schema knows."""
    schema = OmegaConf.get_type(node)
    known = {f.name for f in fields(schema)} if is_dataclass(schema) else None
    for key in node:
        here = f"{path}.{key}".lstrip(".")
        if known is not None and key not in known:
            yield here
        elif OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        elif isinstance(node[key], DictConfig):
            yield from _unknown_keys(node[key], here)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as nested dicts; this is what ranks, W&B and the run folder get."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def decides_result(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a plain configuration that a result depends on."""
    return {key: value for key, value in values.items() if key not in NOT_IN_SIGNATURE}


def signature(values: dict[str, Any]) -> str:
    """Twelve hex digits that name a configuration; equal for equal results."""
    text = json.dumps(decides_result(values), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Every value that differs between two nested dicts.

    >>> differences({"shots": 4, "data": {"name": "dtd"}}, {"shots": 8, "data": {"name": "dtd"}})
    ['shots: 4 -> 8']
    """
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{path}{key}.")
        elif before != after:
            found.append(f"{path}{key}: {before} -> {after}")
    return found
