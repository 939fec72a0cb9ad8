"""Check which code the configuration of a run folder or an export may name.

Such folders are passed on, and their config.yaml names functions and classes that are imported and called. Only those
of this project are allowed, and each only at its proper key. Configurations from conf/ and the command line are not
restricted.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from common.config.schema import ADAMW, FAMILIES, NO_FAMILY
from common.types import UserError

OWN = ("common", "alert", "clsrl")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # with libyaml ten times as fast; neither creates objects


@dataclass(frozen=True)
class Kind:
    """Kind of code that a key of the configuration may name.

    members: names that a class must have, itself or from its bases.
    parameters: names of a function's first parameters.
    returns: return annotation; None: any. With both members and parameters, either a function or a class with such
        a `__call__`.
    module: a module with these members as functions.
    """

    what: str
    members: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    returns: str | None = None
    module: bool = False


METHOD = Kind("method", ("train_prompts", "evaluation_prompts", "well_formed", "answer", "label_response"))
FAMILY = Kind("model family", ("model_type", "vision", "positions", "blocks", "images", "placeholder_tokens"))
OPTIMIZER = Kind("optimizer", ("step", "state_dict", "load_state_dict"))
SAMPLER = Kind("sampler", ("generate", "refresh", "rest", "wake", "close"))
LEARNER = Kind("few-shot learner", ("check_val", "begin", "step", "end", "logits", "state", "restore"))
READER = Kind("reader of a dataset", parameters=("location",), returns="Source")
# Keys whose values name code; `*` is any name. tests/test_trust.py checks that no other key in the source does.
PLACES: dict[tuple[str, ...], Kind] = {
    ("method", "_target_"): METHOD,
    ("model", "family"): FAMILY,
    ("model", "recipe"): Kind("recipe of a model", ("build", "meter"), module=True),
    ("setting", "build"): Kind("setting", parameters=("data", "targets", "how"), returns="Splits"),
    ("rollout", "backend"): SAMPLER,
    ("rollout", "check"): Kind("check of a sampler", parameters=("config",), returns="None"),
    ("learner", "build"): Kind("learner", ("predict", "train", "save", "load", "set_task", "close")),
    ("learner", "check"): Kind("check of a learner", parameters=("config", "data")),
    ("trainer", "loss"): Kind("loss", parameters=("inputs", "config"), returns="LossOutputs"),
    ("trainer", "advantages"): Kind("advantages", parameters=("parts", "weights", "config"), returns="torch.Tensor"),
    ("trainer", "optimizer"): OPTIMIZER,
    ("tracking", "tracker"): Kind("tracker", ("log", "completions", "result", "close")),
    ("clip", "load"): (ENCODER := Kind("encoder", parameters=("key", "device", "cache_dir", "dtype"))),
    ("visual", "load"): ENCODER,
    ("few_shot", "_target_"): LEARNER,
    ("few_shot", "learners", "*", "_target_"): LEARNER,
    ("rewards", "*", "fn"): Kind("reward", ("__call__",), ("samples",), "list[float]"),
    **{
        (*data, source, *place): kind
        for data in (("data",), ("setting", "targets", "*"))
        for source in ("reader", "hub")
        for place, kind in {
            ("_target_",): READER,
            ("reader",): READER,  # the reader that common.data.noisy wraps
            ("fallback", "_target_"): Kind("split", parameters=("location", "images", "rng"), returns="Parts"),
        }.items()
    },
}
ANYTHING = Kind("part")  # for `_target_` and `fn` at any other key


def read(path: Path) -> dict[str, Any]:
    """Read the configuration of a run: plain YAML values only, since tags could create objects.

    Raises:
        UserError: The file is damaged, or was not written by a run.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} was not written by a run")
    return values


def check(values: Mapping[str, Any], source: Path, trust_code: bool = False) -> None:
    """Refuse a loaded configuration that would run foreign code or read this machine's environment.

    Args:
        values: Values as they will be used.
        source: Configuration file, for errors.
        trust_code: Allow any code, because the user trusts the author of the folder.

    Raises:
        UserError: Lists the code that would be run.
    """
    # an interpolation such as ${oc.env:HOME} would be resolved here
    if key := next(_interpolations(values), None):
        raise UserError(
            f"{source}: {key} holds ${{…}}, which would be looked up on this machine; a run writes every value out, so"
            " the file was changed: make it anew"
        )
    if trust_code:
        return
    foreign = [f"{key}={value} {why}" for key, value, kind in _named(values) if (why := _foreign(value, kind))]
    if foreign:
        raise UserError(
            f"{source} names code that would be run here: {'; '.join(foreign)}. If you know and trust who made this"
            " folder, give --trust-code (in Python trust_code=True)"
        )


def kind_of(path: tuple[str, ...]) -> Kind | None:
    """Return the kind of code that a key may name; None: its value names no code."""
    for place, kind in PLACES.items():
        if len(place) == len(path) and all(part in ("*", name) for part, name in zip(place, path, strict=True)):
            return kind
    return ANYTHING if path[-1] in ("_target_", "fn") else None


def _named(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Kind]]:
    """Yield every key whose value names code, with the value and the kind allowed there."""
    for name, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        here = (*path, str(name))
        if value is not None and (kind := kind_of(here)):
            yield ".".join(here), value, kind
        elif isinstance(value, (Mapping, list)):
            yield from _named(value, here)


def _foreign(value: Any, kind: Kind) -> str:
    """Return why a value must not be run; empty if it may."""
    if (kind is FAMILY and value in (*FAMILIES, NO_FAMILY)) or (kind is OPTIMIZER and value == ADAMW):
        return ""
    # the name is checked before the import, which already runs code
    if not isinstance(value, str) or not re.fullmatch(r"\w+(\.\w+)+", value) or value.partition(".")[0] not in OWN:
        return "is not of this project"
    try:
        if kind.module:
            module = import_module(value)
            parts = [getattr(module, name) for name in kind.members]
        else:
            parts = [getattr(import_module(value.rpartition(".")[0]), value.rpartition(".")[2])]
    except (ImportError, AttributeError):
        return ""  # nothing would be run; the error follows where it is loaded
    if not all(map(_is_own, parts)):
        return "is not defined in this project"
    if kind.module or kind is ANYTHING or _fits(parts[0], kind):
        return ""
    return f"is no {kind.what}"


def _is_own(thing: object) -> bool:
    """Return whether it is a function or class defined in this project, not one that a module has imported."""
    if not (inspect.isfunction(thing) or isinstance(thing, type)) or thing.__module__.partition(".")[0] not in OWN:
        return False
    return getattr(sys.modules.get(thing.__module__), thing.__qualname__, None) is thing


def _fits(thing: Any, kind: Kind) -> bool:
    if isinstance(thing, type):
        own = {name for each in thing.__mro__ if each is not object for name in vars(each)}
        if not kind.members or not own.issuperset(kind.members):
            return False
        return not kind.parameters or _first(thing.__call__, 1 + len(kind.parameters))[1:] == kind.parameters
    if not kind.parameters or _first(thing, len(kind.parameters)) != kind.parameters:
        return False
    return kind.returns in (None, inspect.signature(thing).return_annotation)


def _first(function: Any, count: int) -> tuple[str, ...]:
    """Return the names of a function's first parameters."""
    return tuple(inspect.signature(function).parameters)[:count]


def _interpolations(values: Any, path: str = "") -> Iterator[str]:
    """Yield keys of texts that OmegaConf would resolve, such as `${oc.env:HOME}`."""
    if isinstance(values, str):
        if "${" in values:
            yield path
    elif isinstance(values, Mapping):
        for name, value in values.items():
            yield from _interpolations(name, f"{path}.{name}".lstrip("."))
            yield from _interpolations(value, f"{path}.{name}".lstrip("."))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _interpolations(value, f"{path}.{number}")
