"""What a misspelt key, group or option probably means.

Hydra says of every unknown key that a `+` would append it, which then fails. Here the nearest key that exists is named,
also for the words of other frameworks, and a `+` only where it works.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from common.config.aliases import ALIASES
from common.config.consistency import DEEPSPEED_KEYS
from common.config.schema import CONF
from common.plugins import locate
from common.types import UserError

GROUPS = sorted({file.parent.name for file in CONF.glob("*/*.yaml")})
CLOSE = 0.75  # of two words that differ by a slip of the finger


def explain(error: Exception, arguments: Sequence[str]) -> str | None:
    """One line about an unknown key, group or option of the command line or of a YAML file; None for other errors.

    Args:
        error: From Hydra's composition.
        arguments: Of the command line.
    """
    text = f"{error} {error.__cause__ or ''}"
    if isinstance(error, AssertionError):  # OmegaConf's own, of a value below a group that is null
        return below_nothing(arguments) if "Unexpected type" in text else None
    if "Config group override must be" in text or "Error resolving interpolation" in text:
        return no_option(arguments)
    if several := re.search(r"Ambiguous value for argument '([^=']+)=(.*?)'\n", text):
        return (
            f"{several[1]}: {several[2]} are several values because of its comma; quote one twice:"
            f""" '{several[1]}="{several[2]}"'; or let a sweep take all: -m"""
        )
    if bare := re.search(r"Error parsing override '([^']*)'\s+missing EQUAL", text):
        return f"{bare[1]}: this is no key=value; a value with blanks needs quotes: 'key=two words'"
    if "Could not load 'hydra/launcher/submitit_" in text:
        return "hydra/launcher=slurm needs a package: uv pip install hydra-submitit-launcher (docs/scaling.md)"
    if isinstance(error, RuntimeError):  # of a launcher, or of what a run does
        advice = (
            "hydra/launcher=slurm: there is no srun here; submit from a cluster, or try hydra/launcher=submitit_local"
        )
        if refused := re.findall(r"sbatch: error: (.+?)(?=\.?\s+(?:sbatch: error:|Command ')|\s*$)", text):
            return f"SLURM takes no such job ({'; '.join(refused)}); change the values of hydra.launcher"
        return advice if 'Could not detect "srun"' in text else None
    where = file[0] if (file := re.match(r"In '[^']*/[^']*': ", text)) else ""
    if missing := re.search(r"Could not find '(\S+)/([^'/]+)'\s+Available options in '[^']+':((?:\n\t\S+)+)", text):
        return where + unknown_option(missing[1], missing[2], missing[3].split())
    key = re.search(r"Could not override '([^']+)'|'([^']+)' does not exist|full_key: (\S+)", text)
    if key is None or (key[3] and " not in '" not in text):
        return None
    return where + unknown_key(next(filter(None, key.groups())), _composed(arguments), arguments)


def no_option(arguments: Sequence[str]) -> str | None:
    """One line about the first group that was given something else than a name, such as null or a list."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        if group in GROUPS and not re.match(r"[A-Za-z_]", value.replace("null", "")):
            return (
                f"{argument}: give one option: {', '.join(options(group))}; several as a sweep: -m {group}=one,another"
            )
    return None


def below_nothing(arguments: Sequence[str]) -> str | None:
    """One line about the first value of a group of which nothing is chosen."""
    keys = [key for key in (each.lstrip("+~").partition("=")[0] for each in arguments) if "." in key]
    for cfg in (_composed(arguments), _composed([])):  # of a sweep, the first run may have what another has not
        for key in keys:
            if _lacks_group(key, cfg):
                return unknown_key(key, cfg, arguments)
    return None


def _lacks_group(key: str, cfg: DictConfig) -> bool:
    """Whether the key's group is null: encoders and values of few-shot learners, where a run has none."""
    group = key.partition(".")[0]
    return group in GROUPS and group in cfg and cfg[group] is None


def unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    """One line about an option that a group does not have."""
    near = get_close_matches(option, options, 1)
    hint = f"; did you mean {group}={near[0]}?" if near else ";"
    return f"Could not find '{group}/{option}'{hint} Available options in '{group}': {' '.join(options)}"


def unknown_key(key: str, cfg: DictConfig, arguments: Sequence[str] = ()) -> str:
    """One line about a key that no schema knows, with what is probably meant.

    Args:
        key: Dotted.
        cfg: The composed configuration, without the key or with it where a `+` has appended it.
        arguments: Of the command line, for the value that was given.
    """
    parts = key.split(".")
    if parts[0] == "few_shot" and parts[-1] and set(parts[1:-1]) & set(options("few_shot")):
        return f"unknown config key {key}; it is now few_shot.{parts[-1]}"
    if _lacks_group(key, cfg):
        return (
            f"unknown config key {key}; it is of few-shot learners, and this run has none: choose one, as method=cafo"
        )
    if needed := needs(key, cfg):
        return f"unknown config key {key}; {needed}"
    given = next((a for a in arguments if a.lstrip("+~").partition("=")[0] == key), "")
    names = [name for name in nearest(key, cfg) if not given.startswith("~") or _may_be_deleted(name, cfg)]
    if names:
        meant = dict.fromkeys(_shown(name, cfg, given.partition("=")[2]) for name in names)
        return f"unknown config key {key}; did you mean {' or '.join(meant)}?"
    parent = key.rpartition(".")[0]
    node = OmegaConf.select(cfg, parent, default=None) if parent else None
    if isinstance(node, DictConfig):
        beside = [*(name for name in map(str, node) if f"{parent}.{name}" != key), *_appendable(parent, cfg)]
        return f"unknown config key {key}; {parent} has {', '.join(beside)}"
    return f"unknown config key {key}; `python run.py --cfg job` shows all keys"


def nearest(key: str, cfg: DictConfig) -> list[str]:
    """The keys and groups that are probably meant, the likeliest first; with a `+` what has to be appended."""
    parent, _, leaf = key.partition("@")[0].lower().replace("-", "_").rpartition(".")
    known = [name for name in _keys(cfg) if name != key and name.startswith("hydra.") == key.startswith("hydra.")]
    words = [(_leaf(name), name) for name in (*known, *GROUPS, *_appendable(key.rpartition(".")[0], cfg))]
    words += ALIASES.items()
    scores: dict[str, float] = {}
    for word, name in words:
        likeness = SequenceMatcher(None, leaf, word).ratio()
        if likeness == 1 or (likeness >= CLOSE and len(leaf) > 2):
            same_parent = SequenceMatcher(None, parent, name.lstrip("+").rpartition(".")[0]).ratio()
            scores[name] = max(scores.get(name, 0.0), likeness + same_parent / 3)
    best = sorted(scores, key=lambda name: (-scores[name], name))
    best = [name for name in best if scores[name] > scores[best[0]] - 0.05]
    # a word that stands everywhere, such as `name`, does not say what is meant
    return (best if len(best) <= 3 else []) + ([f"+{key}"] if _takes_any(key, cfg) else [])


def needs(key: str, cfg: DictConfig) -> str:
    """Which other options of the key's group have the key, in words; empty if none has."""
    group, _, rest = key.partition(".")
    having = owners(group, rest)
    chosen = OmegaConf.select(cfg, f"{group}.name", default=None)
    here = f", not {group}={chosen}" if chosen else ""
    return f"it belongs to {group}={'|'.join(having)}{here}" if having else ""


def owners(group: str, key: str) -> list[str]:
    """The options of a group whose own files have a key."""
    return [option for option in options(group) if key and key in _keys(_written(group, option))]


def _shown(name: str, cfg: DictConfig, value: str) -> str:
    """How a suggestion is printed: a group with its options, a key that this run does not have with what it needs."""
    if name in GROUPS:
        return f"{name}={value if value in options(name) else '|'.join(options(name))}"
    if name == "hydra.run.dir":
        return "hydra.run.dir (of a sweep: hydra.sweep.dir)"
    needed = "" if name.startswith("+") or name in _keys(cfg) else needs(name, cfg)
    return f"{name} ({needed})" if needed else name


def _keys(values: Any, path: str = "") -> list[str]:
    """The dotted names of everything in nested dicts."""
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values, resolve=False)
    names = []
    for key, value in values.items():
        names.append(f"{path}{key}")
        if isinstance(value, dict):
            names += _keys(value, f"{path}{key}.")
    return names


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].lstrip("+")


def options(group: str) -> list[str]:
    """The options of a group in conf/, by the alphabet; empty if there is no such group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml")) if group in GROUPS else []


def _written(group: str, option: str) -> dict[str, Any]:
    """What an option's own file says of its group."""
    text = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text) or {}
    return values.get(group, {}) if "@package _global_" in text else values


def _appendable(parent: str, cfg: DictConfig) -> list[str]:
    """Keys that an entry takes besides those it has, with their `+`: further arguments of the function it names."""
    if parent == "deepspeed":
        return [f"+deepspeed.{name}" for name in sorted(DEEPSPEED_KEYS - cfg.deepspeed.keys())]
    node = OmegaConf.select(cfg, parent, default=None) if parent else None
    if not isinstance(node, DictConfig) or not (path := node.get("_target_") or node.get("fn")):
        return []
    try:
        parameters = inspect.signature(locate(path, parent)).parameters.values()
    except (UserError, ValueError):
        return []  # the function itself is at fault, which is said where it is called
    return [f"+{parent}.{p.name}" for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in node]


def _takes_any(key: str, cfg: DictConfig) -> bool:
    """Whether the key stands in a dictionary to which a `+` may add any name."""
    parent = key.rpartition(".")[0]
    node = (
        OmegaConf.select(cfg, parent, default=None) if parent == "rewards" or parent.startswith("deepspeed.") else None
    )
    return isinstance(node, DictConfig) and key.rpartition(".")[2] not in node


def _may_be_deleted(name: str, cfg: DictConfig) -> bool:
    """Whether `~name` works: only what lies in a free dictionary can go."""
    node = OmegaConf.select(cfg, name.rpartition(".")[0], default=None) if "." in name and name[0] != "+" else None
    return isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict


def _composed(arguments: Sequence[str]) -> DictConfig:
    """The configuration of the groups that the command line chooses, without its values; else the default one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    known, rest = parser.parse_known_args(arguments)
    chosen = [] if known.config_dir is None else [f"hydra.searchpath=[file://{Path(known.config_dir).resolve()}]"]
    for argument in rest:
        group, _, options = argument.partition("=")
        if group in GROUPS and "(" not in options:
            chosen.append(argument if options.startswith("[") else argument.partition(",")[0])
    with (
        nullcontext()
        if GlobalHydra.instance().is_initialized()
        else hydra.initialize_config_dir(str(CONF), version_base="1.3")
    ):
        try:
            return hydra.compose("config", chosen, return_hydra_config=True)
        except HydraException:  # one of the options is the mistake
            return hydra.compose("config", [], return_hydra_config=True)
