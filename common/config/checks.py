"""What configuration types refuse."""

from __future__ import annotations

from common.types import UserError


def one_of(key: str, value: object, allowed: tuple[str | bool, ...]) -> None:
    """Refuse a value that is not among `allowed`."""
    if value not in allowed:
        names = [str(choice).lower() if isinstance(choice, bool) else choice for choice in allowed]
        raise UserError(f"{key}={value}: choose one of {', '.join(names)}")


def positive(key: str, value: float) -> None:
    """Refuse zero and below."""
    if not value > 0:
        raise UserError(f"{key}={value} must be above 0")
