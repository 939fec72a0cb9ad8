"""Arguments that Hydra's grammar does not take as they are, although a user may mean nothing else by them.

In a value it knows no `~`, no `=` and no letter beyond ASCII unless they are quoted, and the shell has already taken
the quotes away: `data.folder=~/photos` would be an error.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from common.types import UserError

GRAMMAR = frozenset("'\"[]{}(),$\\")  # what has a meaning in a value


def literal(arguments: Sequence[str]) -> list[str]:
    """The arguments, those values quoted that Hydra could not read otherwise.

    Raises:
        UserError: Hydra cannot read a value, and what is meant by its brackets or quotes is not to be guessed.

    >>> literal(["data=folder", "data.folder=~/photos", "shots=4", "--cfg", "job"])
    ['data=folder', "data.folder='~/photos'", 'shots=4', '--cfg', 'job']
    """
    if "task=predict" in arguments:
        raise UserError("task=predict is a command of its own now: python -m common.predict outputs/<run> <pictures>")
    parser = OverridesParser.create()
    return [_quoted(parser, argument) for argument in arguments]


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
