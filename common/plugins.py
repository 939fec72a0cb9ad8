"""Finding the code a config points at, and checking the call before anything expensive happens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from common.types import UserError


def locate(path: str, key: str) -> Callable[..., Any]:
    """Import `package.module.name`.

    Raises:
        UserError: Nothing callable is there; the message names the config `key`.
    """
    module, _, attribute = str(path).rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}={path} cannot be imported ({error}); give the dotted path of a function") from error
    if not callable(found):
        raise UserError(f"{key}={path} is not a function")
    return found


def check_call(path: str, key: str, arguments: dict[str, Any], given: int = 0) -> None:
    """Bind `arguments` (after `given` positional ones) to the function's signature, as a call would.

    Raises:
        UserError: An argument is unknown, missing, or not of the annotated plain type.
    """
    function = locate(path, key)
    try:
        bound = inspect.signature(function, eval_str=True).bind(*[None] * given, **arguments)
    except TypeError as error:
        raise UserError(f"{key}={path}: {error}; its parameters are {inspect.signature(function)}") from error
    parameters = bound.signature.parameters
    for name, value in arguments.items():
        expected = parameters[name].annotation if name in parameters else None
        if expected in (bool, int, float, str) and not _is_a(value, expected):
            raise UserError(f"{key}={path}: {name}={value!r} should be of type {expected.__name__}")


def _is_a(value: Any, expected: type) -> bool:
    if isinstance(value, bool) or expected is bool:
        return isinstance(value, bool) and expected is bool
    return isinstance(value, (int, float) if expected is float else expected)
