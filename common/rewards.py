"""Rule-checked rewards and their weighted mix.

A reward is a function from samples to one float per sample, plus keyword arguments from its config entry
`name: {weight, fn, **arguments}`. Add one by writing such a function anywhere importable and one YAML line.

A reward with a state (a connection, counts) is a class: the arguments go to its constructor, and its instance is called
with the samples. The constructor also runs when the configuration is checked, so it checks its arguments, begins its
`UserError` with the argument at fault, and opens nothing. A reward that downloads or connects to something, or judges
with the run's own model, has all members of `StatefulReward`; a run builds it once. The argument `runtime` is for
settings that cannot change the values: no result depends on it.

Shapes: N samples (all completions of one update).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from common import parsing
from common.counted import counted
from common.plugins import locate
from common.types import Sample, UserError

RewardFunction = Callable[[Sequence[Sample]], list[float]]


@runtime_checkable
class StatefulReward(Protocol):
    """Reward with resources outside a run, or that judges with the run's own model: a class with all of these members.

    may_be_missing: its value may be NaN if it is unavailable; the sample's group is then scored without it.
    needs_base: `bind` gives it the model as it was before training.
    """

    @property
    def may_be_missing(self) -> bool: ...

    @property
    def needs_base(self) -> bool: ...

    def __call__(self, samples: Sequence[Sample], /) -> list[float]:
        """Return one value per sample."""

    def prepare(self) -> None:
        """Download, load or connect to what it needs; called once, before a run computes anything.

        Raises:
            UserError: It is unavailable.
        """

    def bind(self, generate: Callable[[Sequence[str], int], list[str]], identity: str) -> None:
        """Take the run's own model.

        `generate`: function from texts and a limit on tokens to replies. `identity`: name of its weights, for caches.
        """

    def metrics(self) -> dict[str, float]:
        """Return counts since the last call, by names with a `/`."""


STATEFUL = ("may_be_missing", "needs_base", "prepare", "bind", "metrics")


def strict_format(samples: Sequence[Sample]) -> list[float]:
    """Return 1 for `<think>…</think><answer>…</answer>` and nothing else, each tag once; else 0. Length: N."""
    return [float(parsing.is_strict_format(s.completion)) for s in samples]


def accuracy(samples: Sequence[Sample]) -> list[float]:
    """Return 1 when the one answer is the label, up to case, blanks and underscores; else 0. Length: N."""
    return [float(parsing.matches_strictly(s.completion, s.label)) for s in samples]


def equality(samples: Sequence[Sample]) -> list[float]:
    """Return 1 when the whole completion is literally the label (CLS-RL section 3.3), else 0.

    >>> from common.types import Prompt
    >>> equality([Sample(Prompt("0", "?", "six"), text) for text in ("six", "Six", "six ", "")])
    [1.0, 0.0, 0.0, 0.0]
    """
    return [float(s.completion == s.label) for s in samples]


@runtime_checkable
class Explained(Protocol):
    """Reward with reasons: `judge_replies` has a text or None for each sample of the last call."""

    judge_replies: list[str | None]


@dataclass(frozen=True)
class Scores:
    """Each reward by name, and their weighted sum. Length of every list: N.

    missing: for rewards that may be missing, which samples are scored without them; their value in `parts` is 0.
    judge_replies: for rewards with reasons (see `Explained`), the reason of each sample.
    """

    parts: dict[str, list[float]]
    total: list[float]
    missing: dict[str, list[bool]] = field(default_factory=dict)
    judge_replies: dict[str, list[str | None]] = field(default_factory=dict)

    @property
    def known(self) -> dict[str, list[float | None]]:
        """Return each reward by name, with None where it is missing."""
        rewards = {}
        for name, values in self.parts.items():
            gaps = self.missing.get(name, [False] * len(values))
            rewards[name] = [None if gap else value for value, gap in zip(values, gaps, strict=True)]
        return rewards


@dataclass(frozen=True)
class Reward:
    """One entry of the reward mix."""

    weight: float
    function: RewardFunction


def score(samples: Sequence[Sample], rewards: dict[str, Reward]) -> Scores:
    """Evaluate every reward on every sample and add them up by weight.

    With accuracy 1 and format 0 at weights 1.0 and 0.5, the total is 1.0.

    Raises:
        UserError: A reward gives something else than numbers.
        ValueError: A reward gives more or fewer of them than there are samples.
    """
    parts = {name: _numbers(name, reward.function(samples), len(samples)) for name, reward in rewards.items()}
    weights = {name: reward.weight for name, reward in rewards.items()}
    functions: dict[str, object] = {name: reward.function for name, reward in rewards.items()}
    replies = {name: list(each.judge_replies) for name, each in functions.items() if isinstance(each, Explained)}
    return Scores(parts, weighted(parts, weights) if parts else [0.0] * len(samples), judge_replies=replies)


def _numbers(name: str, values: Sequence[Any], count: int) -> list[float]:
    """Convert a reward's values to floats."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise UserError(f"reward '{name}' gave what is no number ({error}); correct rewards.{name}.fn") from error
    if len(numbers) != count:
        raise ValueError(f"reward '{name}' returned {counted(len(numbers), 'value')} for {counted(count, 'sample')}")
    return numbers


def weighted(parts: dict[str, list[float]], weights: dict[str, float]) -> list[float]:
    """Return the weighted sum of every sample.

    >>> weighted({"a": [1.0, 0.0], "b": [1.0, 1.0]}, {"a": 2.0, "b": 0.5})
    [2.5, 0.5]
    """
    columns = [[weights[name] * value for value in values] for name, values in parts.items()]
    return [sum(row) for row in zip(*columns, strict=True)]


def build_rewards(mix: dict[str, dict[str, Any]]) -> dict[str, Reward]:
    """Build the configured `rewards`: functions with their arguments bound, and instances of classes.

    Raises:
        UserError: `rewards.<name>.fn` cannot be found, or a class rejects its arguments.
    """
    built = {}
    for name, entry in mix.items():
        arguments = {key: value for key, value in entry.items() if key not in ("weight", "fn")}
        target = locate(entry["fn"], f"rewards.{name}.fn")
        function = _instance(target, name, arguments) if isinstance(target, type) else partial(target, **arguments)
        built[name] = Reward(float(entry["weight"]), function)
    return built


def _instance(kind: type, name: str, arguments: dict[str, Any]) -> RewardFunction:
    try:
        instance = kind(**arguments)
    except UserError as error:
        raise UserError(f"rewards.{name}.{error}") from error
    if not callable(instance):
        raise UserError(f"rewards.{name}.fn: {kind.__name__} objects cannot be called; give a class with __call__")
    # A class with only some of these members would be called like a plain function, silently without the others.
    own = [member for member in STATEFUL if hasattr(instance, member)]
    if own and (missing := [member for member in STATEFUL if member not in own]):
        raise UserError(
            f"rewards.{name}.fn: {kind.__name__} has {own[0]}, but lacks {', '.join(missing)}; a reward with one of"
            " these has them all (StatefulReward in common/rewards.py)"
        )
    return instance
