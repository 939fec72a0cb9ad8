"""The name of a run: `<label>-<preset>-<method>-<data>-<setting>-<protocol>-<model>-s<shots>-seed<seed>-<hash>`.

conf/config.yaml writes it out; this module gives the two ends. In front stand the user's label and the chosen presets.
Behind stand the first six digits of the configuration's signature, so the points of any sweep have names of their own,
and the same configuration has the same name on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.types import UserError

CONF = Path(__file__).parent.parent.parent / "conf"
WORD = re.compile(r"\w[\w.+=-]*")  # part of a folder's name on every system
DIGITS = 6
REFERS = "a value of the run refers to run_name, which depends on it"
_being_named: set[int] = set()


def register(signature: Callable[[dict[str, Any]], str]) -> None:
    """Make `${run_prefix:}`, `${run_suffix:}` and, the same for all seeds, `${group_suffix:}` known to OmegaConf.

    Args:
        signature: From a plain configuration to its signature.
    """

    def suffix(*, _root_: DictConfig) -> str:
        return f"-{signature(_plain(_root_))[:DIGITS]}"

    def of_any_seed(*, _root_: DictConfig) -> str:
        if id(_root_) in _being_named:  # the group itself is among the values
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


def _plain(root: DictConfig) -> dict[str, Any]:
    """The configuration as nested dicts, without Hydra's own part and the name.

    What cannot be resolved stays as it is written: a value that refers to the name itself, or a mistake, which the
    check of the configuration names afterwards.
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
