"""The name of a run: `<label>-<preset>-<method>-<data>-<setting>-<protocol>-<model>-s<shots>-seed<seed>-<hash>`.

conf/config.yaml writes it out; this module gives the two ends. In front stand the user's label and the chosen presets.
Behind stand six hex digits of every value that decides the result and is not what the named options, shots and seed
give by themselves; nothing stands there if there is no such value. So the points of any sweep have names of their own,
and the same configuration has the same name on every machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.types import UserError

CONF = Path(__file__).parent.parent.parent / "conf"
NAMED = ("method", "data", "setting", "protocol", "model")  # the groups whose options stand in every name
WORD = re.compile(r"\w[\w.+=-]*")  # part of a folder's name on every system
KEPT = 64  # compositions
_being_named: set[int] = set()
_composed: dict[tuple[tuple[str, ...], tuple[str, ...]], DictConfig | None] = {}  # by options and sources


def register(decides_result: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Make `${run_prefix:}` and `${run_suffix:}` known to OmegaConf.

    Args:
        decides_result: From a plain configuration to the part that a result depends on.
    """

    def suffix(*, _root_: DictConfig) -> str:
        return run_suffix(_root_, decides_result)

    def prefix(*, _root_: DictConfig) -> str:
        return run_prefix(_root_)

    OmegaConf.register_new_resolver("run_prefix", prefix, replace=True)
    OmegaConf.register_new_resolver("run_suffix", suffix, replace=True)


def run_prefix(root: DictConfig) -> str:
    """The label and the presets, a dash behind each.

    Raises:
        UserError: The label cannot be part of a folder's name.
    """
    label = root.get("label")
    if label is not None and not WORD.fullmatch(str(label)):
        raise UserError(f"label={label} begins a folder's name: use letters, digits and _ . + = - only")
    words = [*presets(root)] if label is None else [str(label), *presets(root)]
    return "".join(f"{word}-" for word in words)


def presets(root: DictConfig) -> list[str]:
    """The chosen options of the group `experiment` but `none`; empty where only Hydra's compose API made the config."""
    if "hydra" not in root and not HydraConfig.initialized():
        return []
    facts = root["hydra"] if "hydra" in root else HydraConfig.get()
    chosen = facts.runtime.choices.get("experiment")
    if chosen is None:  # Hydra records a choice of one option, not of a list
        lists = [given.partition("=")[2] for given in facts.overrides.task if given.startswith("experiment=")]
        chosen = lists[-1] if lists else ""
    names = (name.strip() for name in str(chosen).strip("[]").split(","))
    return [name.replace("/", "_") for name in names if name not in ("", "none")]


def run_suffix(root: DictConfig, decides_result: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """Six hex digits of what differs, behind a dash; empty if nothing does."""
    values = _plain(root)
    options = tuple(str(OmegaConf.select(root, f"{group}.name")) for group in NAMED)
    usual = _usual(options, json.dumps([values["shots"], values["seed"]]), _sources())
    given, expected = _leaves(decides_result(values)), _leaves(decides_result(usual))
    changed: list[list[str | None]] = [[*path, text] for path, text in given.items() if expected.get(path) != text]
    changed += [[*path, None] for path in expected.keys() - given.keys()]
    if not changed:
        return ""
    return "-" + hashlib.sha256(json.dumps(sorted(changed, key=str)).encode()).hexdigest()[:6]


def usual(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the named options, shots and seed of a plain configuration give by themselves; empty if none of ours do."""
    options = tuple(str(values[group]["name"]) for group in NAMED)
    return _usual(options, json.dumps([values["shots"], values["seed"]]), _sources())


def _plain(root: DictConfig) -> dict[str, Any]:
    """The configuration as nested dicts, without Hydra's own part and the name.

    What cannot be resolved stays as it is written: a value that refers to the name itself, or a mistake, which the
    check of the configuration names afterwards.
    """
    if id(root) in _being_named:
        raise UserError("a value of the run refers to run_name, which depends on it")
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


def _sources() -> tuple[str, ...]:
    """Where Hydra looks for configurations at present."""
    if not GlobalHydra.instance().is_initialized():
        return ()
    return tuple(str(source.path) for source in GlobalHydra.instance().config_loader().get_sources())


@lru_cache(maxsize=64)
def _usual(options: tuple[str, ...], draw: str, sources: tuple[str, ...]) -> dict[str, Any]:
    """What options of NAMED give by themselves; empty if there are no such options, so that everything differs.

    Args:
        options: By their names, in the order of NAMED.
        draw: Shots and seed, as JSON.
        sources: From `_sources`.
    """
    composed = _compose(options, sources)
    if composed is None:
        return {}
    composed.shots, composed.seed = json.loads(draw)
    return _plain(composed)


def _compose(options: tuple[str, ...], sources: tuple[str, ...]) -> DictConfig | None:
    """What Hydra makes of options of NAMED, of any shots and seed; None if there are none."""
    if (options, sources) in _composed:
        return _composed[options, sources]
    if not sources:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return _compose(options, _sources())
    try:
        found = hydra.compose("config", [f"{group}={option}" for group, option in zip(NAMED, options, strict=True)])
    except HydraException:
        found = None
    return _keep(options, sources, found)


def already_composed(task: DictConfig) -> None:
    """Spare a composition: in this one only options of NAMED, shots and seed were chosen. It will be changed."""
    _keep(tuple(str(OmegaConf.select(task, f"{group}.name")) for group in NAMED), _sources(), task)


def _keep(options: tuple[str, ...], sources: tuple[str, ...], found: DictConfig | None) -> DictConfig | None:
    if len(_composed) >= KEPT:
        del _composed[next(iter(_composed))]
    _composed[options, sources] = found
    return found


def _leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Every value of nested dicts as JSON, by its path. As in the signature, 1 and 1.0 are two values."""
    if not isinstance(value, dict) or not value:
        return {path: json.dumps(value, sort_keys=True, default=str)}
    return {where: text for key, inner in value.items() for where, text in _leaves(inner, (*path, str(key))).items()}
