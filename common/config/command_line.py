"""Rewrite command line arguments that Hydra's grammar would refuse although their meaning is clear.

In an unquoted value Hydra accepts no `~`, no `=` and no letter beyond ASCII, but the shell has already removed quotes:
`data.folder=~/photos` would be an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from common.types import UserError

GRAMMAR = frozenset("'\"[]{}(),$\\")  # characters with a meaning in Hydra's grammar


def literal(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with quotes around values that Hydra could not parse otherwise.

    Raises:
        UserError: Hydra cannot parse a value with brackets or quotes, so its meaning is unclear.

    >>> literal(["data=folder", "data.folder=~/photos", "shots=4", "--cfg", "job"])
    ['data=folder', "data.folder='~/photos'", 'shots=4', '--cfg', 'job']
    """
    if "task=predict" in arguments:
        raise UserError("task=predict is a command of its own now: python -m common.predict outputs/<run> <pictures>")
    parser = OverridesParser.create()
    return [_quoted(parser, argument) for argument in arguments]


def of_each_run(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a sweep, with single values of few-shot learners written as `choice(value)`.

    Before the runs of a sweep, Hydra composes a configuration from the command line without the swept arguments. There
    `few_shot`, `clip` and `visual` may be null although all runs have them; a `choice` is applied only to the runs.

    >>> of_each_run(["-m", "method=coop,cafo", "few_shot.epochs=2,3", "clip.views=2", "seed=1"])
    ['-m', 'method=coop,cafo', 'few_shot.epochs=2,3', 'clip.views=choice(2)', 'seed=1']
    """
    if not _is_sweep(arguments):
        return list(arguments)
    parser = OverridesParser.create()
    return [f"{a.replace('=', '=choice(', 1)})" if _is_of_some(parser, a) else a for a in arguments]


def _is_of_some(parser: OverridesParser, argument: str) -> bool:
    """Return whether an argument sets a single value of few-shot learners or encoders, which only some runs have."""
    key, _, value = argument.partition("=")
    if not value or key.lstrip("+").partition(".")[0] not in ("few_shot", "clip", "visual") or "." not in key:
        return False
    override = parser.parse_override(argument)
    return not override.is_sweep_override() and override.value() is not None  # Hydra has no `choice` of null


def _is_sweep(arguments: Sequence[str]) -> bool:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-dir", "-cd")
    known, _ = parser.parse_known_args(arguments)
    named = known.config_name is not None and known.config_dir is not None
    return known.multirun or (named and _sweeps(Path(known.config_dir), known.config_name))


def _sweeps(folder: Path, name: str) -> bool:
    """Return whether a configuration file, or one in its defaults list, sets Hydra's mode to MULTIRUN."""
    path = folder / f"{name.removesuffix('.yaml')}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        mode, begins = values.get("hydra", {}).get("mode"), values.get("defaults", [])
    except (OSError, yaml.YAMLError, AttributeError):
        return False  # Hydra reports the mistake
    return mode == "MULTIRUN" or any(_sweeps(folder, each) for each in begins if isinstance(each, str))


def _quoted(parser: OverridesParser, argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    try:
        parser.parse_override(argument)
    except HydraException as error:
        if not GRAMMAR.intersection(value):
            return f"{key}='{value}'"
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key}={value} cannot be read ({reason}); a value with such characters needs quotes inside those of the"
            f" shell: '{key}=\"...\"'"
        ) from error
    return argument
