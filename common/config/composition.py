"""Register, validate, compare and name configurations; the types are in common/config/schema.py. Needs no torch.

Types are registered under `schema/`, apart from the groups a user chooses from. `validate` checks what Hydra does not:
keys appended with `+`, unresolved values, rules across values, and arguments of configured functions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.config import consistency
from common.config.schema import (
    ADAMW,
    FAMILIES,
    GRPO_ADVANTAGES,
    GRPO_LOSS,
    NO_FAMILY,
    SAMPLERS,
    VALIDATIONS,
    ClipConfig,
    Config,
    DataConfig,
    EncoderConfig,
    GRPOConfig,
    LearnerConfig,
    ModelConfig,
    ProtocolConfig,
    RolloutConfig,
    SettingConfig,
    TrackingConfig,
    TrainerConfig,
    one_of,
    positive,
)
from common.config.suggest import unknown_key
from common.plugins import check_call, check_module, locate, unknown_arguments
from common.rewards import build_rewards
from common.types import UserError

SCHEMAS = {
    "config": Config,
    "data": DataConfig,
    "setting": SettingConfig,
    "protocol": ProtocolConfig,
    "learner": LearnerConfig,
    "clip": ClipConfig,
    "encoder": EncoderConfig,
    "model": ModelConfig,
    "trainer": TrainerConfig,
    "grpo": GRPOConfig,
    "rollout": RolloutConfig,
    "tracking": TrackingConfig,
}
# keys that do not change a result: output folder, tracking, number of processes
NOT_IN_SIGNATURE = ("tracking", "label", "run_name", "gpus", "cache_dir", "checkpoint", "doctor", "manifest", "dry")
# A run with bad or duplicate images may resume with other values of these: its manifest lists the images left out.
NOT_IN_SIGNATURE_OF_DATA = ("root", "cache_gb", "skip_bad", "duplicates", "near_duplicates", "own_photos", "licence")
# prompts are never cut, and the kinds of attention differ only in rounding
NOT_IN_SIGNATURE_OF_MODEL = ("licence", "max_prompt_tokens", "attention")
NOT_IN_SIGNATURE_OF_REWARDS = ("runtime",)  # of rewards computed by a server: address, timeouts, cache


def of_shots(shots: int | str, values: list[Any]) -> Any:
    """Resolve `${of_shots:${shots},[…]}`: values for 1, 2, 4, 8 and 16 shots; others take that of the next fewer.

    >>> of_shots(4, [10, 20, 40, 80, 160]), of_shots(5, [10, 20, 40, 80, 160]), of_shots("all", [10, 20, 40, 80, 160])
    (40, 40, 160)
    """
    reached = sum(shots == "all" or int(shots) >= few for few in (1, 2, 4, 8, 16))
    return values[max(0, reached - 1)]


def of_selection(selection: str, val: Any, paper: Any) -> Any:
    """Resolve `${of_selection:${selection},…,…}`: a value for `selection=val`, and one for `selection=paper`."""
    return paper if selection == "paper" else val


def of_trainer(name: str, grpo: Any, sft: Any) -> Any:
    """Resolve `${of_trainer:${trainer.name},…,…}`: a value for `trainer=grpo`, and one for `trainer=sft`."""
    return grpo if name == "grpo" else sft


def register() -> None:
    """Register the schemas with Hydra."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(group="schema", name=name, node=schema)


def validate(cfg: DictConfig, typed: Sequence[str] = ()) -> Config:
    """Check a composed configuration and return it as plain dataclasses.

    Args:
        cfg: Composed configuration without the node `hydra`.
        typed: Overrides that the user gave; each must have an effect.

    Raises:
        UserError: Names the key at fault.
    """
    # unknown keys and types
    if unknown := list(_unknown_keys(cfg)):
        raise UserError("; ".join(unknown_key(key, cfg) for key in unknown))
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise user_error(error) or UserError(" ".join(str(error).split())) from error
    assert isinstance(config, Config)
    # single values that the schema cannot check by itself
    if config.shots != "all" and (
        isinstance(config.shots, bool) or not isinstance(config.shots, int) or config.shots < 1
    ):
        raise UserError(f"shots={config.shots}: give the number of training images per class, 1 or more, or all")
    one_of("sampler", config.sampler, SAMPLERS)
    one_of("validation", config.validation, VALIDATIONS)
    if config.test_share is not None and not 0 < config.test_share < 1:
        raise UserError(f"test_share={config.test_share} must be a share between 0 and 1, such as 0.2, or null")
    positive("min_per_class", config.min_per_class)
    if config.gpus < 0:
        raise UserError(f"gpus={config.gpus}: give the number of GPUs, 0 to compute on the CPU")
    ranks = max(1, config.gpus)
    if config.trainer.name != "none" and config.trainer.prompts_per_update % ranks:
        raise UserError(
            f"trainer.prompts_per_update={config.trainer.prompts_per_update} must be divisible by gpus={ranks}"
        )
    bits = config.model.bits
    if config.trainer.name != "none" and bits and not config.model.lora.wraps:
        raise UserError(
            f"model.load_in_{bits}bit=true needs adapters: {bits}-bit weights cannot be trained; set model.lora.r"
        )
    if config.trainer.name == "grpo" and not config.rewards:
        raise UserError("rewards is empty, but trainer=grpo learns from rewards; choose e.g. rewards=nothinking")
    one_of("selection", config.selection, ("val", "paper"))
    one_of("calibration", config.calibration, ("val", "folds"))
    one_of("label_scoring", config.label_scoring, (True, "direct", False))
    one_of("doctor", config.doctor, ("auto", True, False))
    one_of("evaluate", config.evaluate, ("last", "best"))
    if config.evaluate == "best" and config.trainer.name != "none" and not config.trainer.evaluate_every:
        raise UserError("evaluate=best chooses among the evaluations during training: set trainer.evaluate_every")
    if config.doctor is True and not isinstance(config.trainer, GRPOConfig):
        raise UserError(f"doctor=true examines GRPO trainings, but trainer={config.trainer.name}")
    # rules across values, configured functions, and overrides without an effect
    consistency.check_iterations(config)
    consistency.check_overlap(config)
    consistency.check_deepspeed(config.deepspeed)
    _check_calls(config, cfg)
    consistency.check_typed(config, typed)
    return config


def user_error(error: BaseException) -> UserError | None:
    """Return the UserError of a resolver that an error of OmegaConf or Hydra wraps, if there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _check_calls(config: Config, cfg: DictConfig) -> None:
    if "name" not in config.method:
        raise UserError("method.name is missing; see conf/method/ for examples")
    if "_target_" in config.method:  # missing for learners without prompts
        _check_entry(cfg, config.method["_target_"], "method._target_", method_arguments(config))
    if config.model.family not in (*FAMILIES, NO_FAMILY) and "." not in config.model.family:
        raise UserError(
            f"model.family={config.model.family}: choose one of {', '.join(FAMILIES)}, or give the path of a class"
        )
    if config.model.family != NO_FAMILY:
        locate(FAMILIES.get(config.model.family, config.model.family), "model.family")
    _check_data("data", config.data, cfg)
    for name, target in config.setting.targets.items():
        _check_data(f"setting.targets.{name}", target, cfg)
    check_call(config.setting.build, "setting.build", {}, given=3)
    for key, path in (("rollout.backend", config.rollout.backend), ("learner.build", config.learner.build)):
        check_module(path, key)
    locate(config.learner.check, "learner.check")
    for name, entry in config.rewards.items():
        if not isinstance(entry, dict) or not {"weight", "fn"} <= entry.keys():
            raise UserError(f"rewards.{name} must be {{weight: number, fn: dotted.path, ...}}, got {entry}")
        if isinstance(entry["weight"], bool) or not isinstance(entry["weight"], int | float):
            raise UserError(f"rewards.{name}.weight={entry['weight']!r} must be a number")
        arguments = {key: value for key, value in entry.items() if key not in ("weight", "fn")}
        key = f"rewards.{name}.fn"
        is_class = isinstance(locate(entry["fn"], key), type)
        _check_entry(cfg, entry["fn"], key, arguments, given=0 if is_class else 1)
    build_rewards(config.rewards)  # reward classes check their arguments when created
    check_module(config.tracking.tracker, "tracking.tracker")
    _check_trainer(config.trainer)


def _check_trainer(trainer: TrainerConfig) -> None:
    """Check a user's own functions and classes; the defaults are skipped, since importing torch takes seconds."""
    if trainer.name == "none":
        return
    if trainer.optimizer != ADAMW or trainer.optimizer_options:
        options = trainer.optimizer_options
        if unknown := unknown_arguments(trainer.optimizer, "trainer.optimizer", options):
            raise UserError(f"trainer.optimizer_options.{unknown[0]}: {trainer.optimizer} does not take it")
    if trainer.optimizer != ADAMW and trainer.embeddings == "host":
        raise UserError("trainer.embeddings=host updates rows on the host as AdamW does; set trainer.embeddings=device")
    if not isinstance(trainer, GRPOConfig):
        return
    if trainer.loss != GRPO_LOSS or trainer.loss_options:
        check_call(trainer.loss, "trainer.loss", {"config": trainer, **trainer.loss_options}, given=1)
    if trainer.advantages != GRPO_ADVANTAGES or trainer.advantages_options:
        options = {"config": trainer, **trainer.advantages_options}
        check_call(trainer.advantages, "trainer.advantages", options, given=2)


def _check_entry(cfg: DictConfig, path: str, key: str, arguments: dict[str, Any], given: int = 0) -> None:
    """Apply `check_call` to an entry of `cfg` whose keys are the arguments; report a misspelt one as unknown key."""
    if unknown := unknown_arguments(path, key, arguments):
        raise UserError(unknown_key(f"{key.rpartition('.')[0]}.{unknown[0]}", cfg))
    check_call(path, key, arguments, given)


def _check_data(key: str, data: DataConfig, cfg: DictConfig) -> None:
    for part, entry in (("reader", data.reader), ("hub", data.hub)):
        if part == "hub" and not entry:
            continue
        if "_target_" not in entry:
            raise UserError(f"{key}.{part}._target_ is missing; see conf/data/ for examples")
        arguments = {name: value for name, value in entry.items() if name != "_target_"}
        _check_entry(cfg, entry["_target_"], f"{key}.{part}._target_", arguments, given=1)


def method_arguments(config: Config) -> dict[str, Any]:
    """Return the keyword arguments of the method: its entry without `_target_` and `name`."""
    return {key: value for key, value in config.method.items() if key not in ("_target_", "name")}


def _unknown_keys(node: DictConfig, path: str = "") -> Iterator[str]:
    """Yield dotted names of keys that were appended with `+` and are in no schema."""
    schema = OmegaConf.get_type(node)
    known = {f.name for f in fields(schema)} if is_dataclass(schema) else None
    for name in node:
        key = str(name)
        here = f"{path}.{key}".lstrip(".")
        if known is not None and key not in known:
            yield here
        elif OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        elif isinstance(node[key], DictConfig):
            yield from _unknown_keys(node[key], here)


def values_of(config: Config) -> dict[str, Any]:
    """Return the configuration as nested dicts and lists, as W&B and the run folder get it."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return found


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a composed configuration, resolved, as nested dicts and lists."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def decides_result(values: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a plain configuration that a result depends on."""
    kept = {key: value for key, value in values.items() if key not in NOT_IN_SIGNATURE}
    if "data" in kept:
        kept["data"] = _without(kept["data"], NOT_IN_SIGNATURE_OF_DATA)
    if targets := kept.get("setting", {}).get("targets"):
        targets = {name: _without(one, NOT_IN_SIGNATURE_OF_DATA) for name, one in targets.items()}
        kept["setting"] = kept["setting"] | {"targets": targets}
    if "model" in kept:
        model = _without(kept["model"], NOT_IN_SIGNATURE_OF_MODEL)
        kept["model"] = model if model.get("path") is None else model | {"recipe": None}  # unused if path is given
    if few_shot_of(kept) is None:
        kept = _without(kept, ("clip", "visual", "few_shot", "selection"))
    if rewards := kept.get("rewards"):
        kept["rewards"] = {name: _without(one, NOT_IN_SIGNATURE_OF_REWARDS) for name, one in rewards.items()}
    return kept


def few_shot_of(values: dict[str, Any]) -> str | None:
    """Return the name of the few-shot learner that a run fits, as its method or for drafts; None: it fits none."""
    method = values.get("method", {})
    is_fitted = "learner" in method or method.get("draft") == "few_shot"
    return (values.get("few_shot") or {}).get("name") if is_fitted else None


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def signature(values: dict[str, Any]) -> str:
    """Return 12 hexadecimal digits, equal for configurations with equal results."""
    text = json.dumps(decides_result(values), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Return every value that differs between two nested dicts.

    >>> differences({"shots": 4, "data": {"name": "dtd"}}, {"shots": 8, "data": {"name": "dtd"}})
    ['shots: 4 -> 8']
    """
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{path}{key}.")
        elif before != after:
            lines.append(f"{path}{key}: {before} -> {after}")
    return lines


# Names of runs: `<label>-<preset>-<method>-<data>-<setting>-<protocol>-<model>-s<shots>-seed<seed>-<hash>`.
#
# conf/config.yaml has the pattern; the resolvers here give its beginning (label and presets) and its end, the first
# digits of the signature. So all points of a sweep have different names, and names are equal on all machines.

WORD = re.compile(r"\w[\w.+=-]*")  # allowed in a folder's name on every system
DIGITS = 6
REFERS = "a value of the run refers to run_name, which depends on it"
_being_named: set[int] = set()  # ids of configurations whose suffix is being computed, to detect cycles


def register_resolvers(signature: Callable[[dict[str, Any]], str]) -> None:
    """Register `${run_prefix:}`, `${run_suffix:}` and, the same for all seeds, `${group_suffix:}` with OmegaConf.

    Args:
        signature: Function from a plain configuration to its signature.
    """

    def suffix(*, _root_: DictConfig) -> str:
        return f"-{signature(_letters_only(_root_))[:DIGITS]}"

    def of_any_seed(*, _root_: DictConfig) -> str:
        if id(_root_) in _being_named:  # the group's name would depend on itself
            raise UserError(REFERS)
        alike = _root_.copy()
        alike.seed = 0
        return suffix(_root_=alike)

    def prefix(*, _root_: DictConfig) -> str:
        return run_prefix(_root_)

    OmegaConf.register_new_resolver("run_prefix", prefix, replace=True)
    OmegaConf.register_new_resolver("run_suffix", suffix, replace=True)
    OmegaConf.register_new_resolver("group_suffix", of_any_seed, replace=True)


def run_prefix(root: DictConfig) -> str:
    """Return the label and the presets, with a dash behind each.

    Raises:
        UserError: The label cannot be part of a folder's name.
    """
    label = root.get("label")
    if label is not None and not WORD.fullmatch(str(label)):
        raise UserError(f"label={label} begins a folder's name: use letters, digits and _ . + = - only")
    words = [*presets(root)] if label is None else [str(label), *presets(root)]
    return "".join(f"{word}-" for word in words)


def presets(root: DictConfig) -> list[str]:
    """Return the chosen options of the group `experiment` except `none`; empty without a Hydra application."""
    if "hydra" not in root and not HydraConfig.initialized():
        return []
    facts = root["hydra"] if "hydra" in root else HydraConfig.get()
    chosen = facts.runtime.choices.get("experiment")
    if chosen is None:  # Hydra records the choice of one option, but not of a list
        lists = [given.partition("=")[2] for given in facts.overrides.task if given.startswith("experiment=")]
        chosen = lists[-1] if lists else ""
    names = (name.strip() for name in str(chosen).strip("[]").split(","))
    return [name.replace("/", "_") for name in names if name not in ("", "none")]


def _letters_only(root: DictConfig) -> dict[str, Any]:
    """Return the configuration as nested dicts, without the node `hydra` and the name of the run.

    Values that cannot be resolved stay interpolations: those that refer to the name, and mistakes, which `validate`
    reports later.
    """
    if id(root) in _being_named:
        raise UserError(REFERS)
    written: Any = OmegaConf.to_container(root, resolve=False)
    values = {str(key): value for key, value in written.items() if key not in ("hydra", "run_name")}
    _being_named.add(id(root))
    try:
        for key in values:
            with suppress(OmegaConfBaseException):
                node = root[key]
                values[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    finally:
        _being_named.discard(id(root))
    return values


# at import, because a worker of a Hydra launcher imports this module but does not call `register`
register_resolvers(signature)
OmegaConf.register_new_resolver("of_shots", of_shots, replace=True)
OmegaConf.register_new_resolver("of_selection", of_selection, replace=True)
OmegaConf.register_new_resolver("of_trainer", of_trainer, replace=True)
