"""Finding the code a config points at, and checking the call before anything expensive happens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
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
    signature = _signature(locate(path, key), f"{key}={path}")
    try:
        bound = signature.bind(*[None] * given, **arguments)
    except TypeError as error:
        raise UserError(f"{key}={path}: {error}; its parameters are {signature}") from error
    parameters = bound.signature.parameters
    for name, value in arguments.items():
        expected = parameters[name].annotation if name in parameters else None
        if expected in (bool, int, float, str) and not _is_a(value, expected):
            raise UserError(f"{key}={path}: {name}={value!r} should be of type {expected.__name__}")


def check_module(path: str, key: str) -> None:
    """Check that the module of `path` exists without importing it, for code that needs torch."""
    module = str(path).rpartition(".")[0]
    try:
        found = find_spec(module) if module else None
    except ImportError:
        found = None
    if found is None:
        raise UserError(f"{key}={path}: there is no module '{module}'; give the dotted path of a class")


def _signature(function: Callable[..., Any], key: str) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:  # an annotation that is imported for type checkers only
        return inspect.signature(function)
    except ValueError as error:
        raise UserError(f"{key} is a built-in without a signature; wrap it in a function of your own") from error


def _is_a(value: Any, expected: type) -> bool:
    if isinstance(value, bool) or expected is bool:
        return isinstance(value, bool) and expected is bool
    return isinstance(value, (int, float) if expected is float else expected)
