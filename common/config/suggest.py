"""Suggest corrections for misspelt keys, groups and options.

Hydra advises to append any unknown key with `+`, which then fails. The functions here suggest the most similar key,
also for names from other frameworks (aliases.py), and a `+` only where it works.
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
CLOSE = 0.75  # lowest similarity of two words that may differ by a typing error


def explain(error: Exception, arguments: Sequence[str]) -> str | None:
    """Return one line about an unknown key, group or option of command line or YAML files; None for other errors.

    Args:
        error: Error of Hydra's composition.
        arguments: Command line arguments.
    """
    text = f"{error} {error.__cause__ or ''}"
    # OmegaConf fails with an assertion if a value is set in a group that is null
    if isinstance(error, AssertionError):
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
    if isinstance(error, RuntimeError):  # from a launcher, or from the run itself
        advice = (
            "hydra/launcher=slurm: there is no srun here; submit from a cluster, or try hydra/launcher=submitit_local"
        )
        if refused := re.findall(r"sbatch: error: (.+?)(?=\.?\s+(?:sbatch: error:|Command ')|\s*$)", text):
            return f"SLURM takes no such job ({'; '.join(refused)}); change the values of hydra.launcher"
        return advice if 'Could not detect "srun"' in text else None
    # unknown options and keys: the patterns match the messages of Hydra and OmegaConf
    where = file[0] if (file := re.match(r"In '[^']*/[^']*': ", text)) else ""
    if missing := re.search(r"Could not find '(\S+)/([^'/]+)'\s+Available options in '[^']+':((?:\n\t\S+)+)", text):
        return where + unknown_option(missing[1], missing[2], missing[3].split())
    key = re.search(r"Could not override '([^']+)'|'([^']+)' does not exist|full_key: (\S+)", text)
    if key is None or (key[3] and " not in '" not in text):
        return None
    return where + unknown_key(next(filter(None, key.groups())), _composed(arguments), arguments)


def no_option(arguments: Sequence[str]) -> str | None:
    """Return one line about the first group whose value is not the name of an option, but null or a list, say."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        if group in GROUPS and not re.match(r"[A-Za-z_]", value.replace("null", "")):
            return (
                f"{argument}: give one option: {', '.join(options(group))}; several as a sweep: -m {group}=one,another"
            )
    return None


def below_nothing(arguments: Sequence[str]) -> str | None:
    """Return one line about the first argument that sets a value in a group without a chosen option."""
    keys = [key for key in (each.lstrip("+~").partition("=")[0] for each in arguments) if "." in key]
    # In a sweep, `_composed` shows the first run, which may have a group that another run lacks.
    for cfg in (_composed(arguments), _composed([])):
        for key in keys:
            if _lacks_group(key, cfg):
                return unknown_key(key, cfg, arguments)
    return None


def _lacks_group(key: str, cfg: DictConfig) -> bool:
    """Return whether the key's group is null, as encoders and few-shot learners are in runs without them."""
    group = key.partition(".")[0]
    return group in GROUPS and group in cfg and cfg[group] is None


def unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    """Return one line about an option that a group does not have."""
    near = get_close_matches(option, options, 1)
    hint = f"; did you mean {group}={near[0]}?" if near else ";"
    return f"Could not find '{group}/{option}'{hint} Available options in '{group}': {' '.join(options)}"


def unknown_key(key: str, cfg: DictConfig, arguments: Sequence[str] = ()) -> str:
    """Return one line about a key that is in no schema, with a suggestion.

    Args:
        key: Dotted name.
        cfg: Composed configuration, without the key or, if a `+` has appended it, with it.
        arguments: Command line arguments, for the value that was given.
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
    """Return the most similar keys and groups, the best first; those that must be appended begin with `+`."""
    # candidates: keys of this run, groups, keys that may be appended, names from other frameworks
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
    # more than three candidates mean a word that occurs everywhere, such as `name`: suggest none
    return (best if len(best) <= 3 else []) + ([f"+{key}"] if _takes_any(key, cfg) else [])


def needs(key: str, cfg: DictConfig) -> str:
    """Return a phrase about the other options of the key's group that have the key; empty if none has."""
    group, _, rest = key.partition(".")
    having = owners(group, rest)
    chosen = OmegaConf.select(cfg, f"{group}.name", default=None)
    here = f", not {group}={chosen}" if chosen else ""
    return f"it belongs to {group}={'|'.join(having)}{here}" if having else ""


def owners(group: str, key: str) -> list[str]:
    """Return the options of a group whose files contain a key."""
    return [option for option in options(group) if key and key in _keys(_written(group, option))]


def _shown(name: str, cfg: DictConfig, value: str) -> str:
    """Return a suggestion as text: a group with its options, a key that this run lacks with the option it needs."""
    if name in GROUPS:
        return f"{name}={value if value in options(name) else '|'.join(options(name))}"
    if name == "hydra.run.dir":
        return "hydra.run.dir (of a sweep: hydra.sweep.dir)"
    needed = "" if name.startswith("+") or name in _keys(cfg) else needs(name, cfg)
    return f"{name} ({needed})" if needed else name


def _keys(values: Any, path: str = "") -> list[str]:
    """Return the dotted names of all keys in nested dicts."""
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
    """Return the options of a group in conf/, sorted; empty if there is no such group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml")) if group in GROUPS else []


def _written(group: str, option: str) -> dict[str, Any]:
    """Return the values that the file of an option sets in its group."""
    text = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text) or {}
    return values.get(group, {}) if "@package _global_" in text else values


def _appendable(parent: str, cfg: DictConfig) -> list[str]:
    """Return keys, with their `+`, that may be appended to an entry: further arguments of the function it names."""
    if parent == "deepspeed":
        return [f"+deepspeed.{name}" for name in sorted(DEEPSPEED_KEYS - cfg.deepspeed.keys())]
    node = OmegaConf.select(cfg, parent, default=None) if parent else None
    if not isinstance(node, DictConfig) or not (path := node.get("_target_") or node.get("fn")):
        return []
    try:
        parameters = inspect.signature(locate(path, parent)).parameters.values()
    except (UserError, ValueError):
        return []  # the check of the call reports it
    return [f"+{parent}.{p.name}" for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in node]


def _takes_any(key: str, cfg: DictConfig) -> bool:
    """Return whether the key is in a dictionary to which a `+` may add any name."""
    parent = key.rpartition(".")[0]
    node = (
        OmegaConf.select(cfg, parent, default=None) if parent == "rewards" or parent.startswith("deepspeed.") else None
    )
    return isinstance(node, DictConfig) and key.rpartition(".")[2] not in node


def _may_be_deleted(name: str, cfg: DictConfig) -> bool:
    """Return whether `~name` works: only keys of dictionaries without a schema can be deleted."""
    node = OmegaConf.select(cfg, name.rpartition(".")[0], default=None) if "." in name and name[0] != "+" else None
    return isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict


def _composed(arguments: Sequence[str]) -> DictConfig:
    """Return the configuration with the groups that the command line chooses, without its values; else the default."""
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
        except HydraException:  # one of the chosen options does not exist
            return hydra.compose("config", [], return_hydra_config=True)
