"""Import the code that a configuration names, and check the call before anything expensive happens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args, get_origin

from common.types import UserError


def locate(path: str, key: str) -> Callable[..., Any]:
    """Import `package.module.name`.

    Raises:
        UserError: There is nothing callable; the message names the config `key`.
    """
    module, _, attribute = str(path).rpartition(".")
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{key}={path} cannot be imported ({error}); give the dotted path of what Python finds beside"
            " run.py, in the current folder or among installed packages"
        ) from error
    if not callable(function):
        raise UserError(f"{key}={path} is not a function")
    return function


def check_call(path: str, key: str, arguments: dict[str, Any], given: int = 0) -> None:
    """Bind `arguments` (after `given` positional ones) to the function's signature, as a call would.

    Raises:
        UserError: An argument is unknown, missing, or not of the annotated plain type or literal values.
    """
    signature = _signature(locate(path, key), f"{key}={path}")
    try:
        bound = signature.bind(*[None] * given, **arguments)
    except TypeError as error:
        raise UserError(f"{key}={path}: {error}; its parameters are {signature}") from error
    parameters = bound.signature.parameters
    for name, value in arguments.items():
        expected = parameters[name].annotation if name in parameters else None
        if get_origin(expected) is Literal and value not in get_args(expected):
            raise UserError(f"{key}={path}: {name}={value}: choose one of {', '.join(map(str, get_args(expected)))}")
        if expected in (bool, int, float, str) and not _is_a(value, expected):
            raise UserError(f"{key}={path}: {name}={value!r} should be of type {expected.__name__}")


def check_module(path: str, key: str) -> None:
    """Check that the module of `path` exists without importing it, for code that needs torch."""
    module = str(path).rpartition(".")[0]
    try:
        spec = find_spec(module) if module else None
    except (ImportError, TypeError, ValueError):
        spec = None
    if spec is None:
        raise UserError(f"{key}={path}: there is no module '{module}'; give the dotted path of a class")


def unknown_arguments(path: str, key: str, arguments: dict[str, Any]) -> list[str]:
    """Return the names among `arguments` that the function does not take."""
    parameters = _signature(locate(path, key), f"{key}={path}").parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return []
    return [name for name in arguments if name not in {parameter.name for parameter in parameters}]


def _signature(function: Callable[..., Any], key: str) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:  # an annotation is imported only for type checkers
        return inspect.signature(function)
    except ValueError as error:
        raise UserError(f"{key} is a built-in without a signature; wrap it in a function of your own") from error


def _is_a(value: Any, expected: type) -> bool:
    # bool is a subclass of int, and an int is accepted for a float
    if isinstance(value, bool) or expected is bool:
        return isinstance(value, bool) and expected is bool
    return isinstance(value, (int, float) if expected is float else expected)
