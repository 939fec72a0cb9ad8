"""Rule-checked rewards and their weighted mix.

A reward is a function from samples to one float per sample, plus keyword arguments from its config entry
`name: {weight, fn, **arguments}`. Add one by writing such a function anywhere importable and one YAML line.

One that keeps something between calls (a connection, counts) is a class: the arguments go to its constructor, and its
instance is called with the samples. The constructor also runs when the configuration is checked, so it checks its
arguments, begins its `UserError` with the argument at fault, and opens nothing. What has to be fetched or reached is
tried in its method `prepare`, if it has one, before a run computes anything; a run builds it once. The argument
`runtime` says how the reward gets its values and not which: a result does not depend on it (common/config.py).

Shapes: N samples (all completions of one update).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from common import parsing
from common.plugins import locate
from common.types import Sample, UserError

RewardFunction = Callable[[Sequence[Sample]], list[float]]


def strict_format(samples: Sequence[Sample], *, match: str = "strict") -> list[float]:
    """1 when the reply is `<think>…</think><answer>…</answer>` (CLS-RL section 3.2, first equation), else 0.

    Args:
        samples: The completions. Length: N.
        match: `strict` (each tag once) or `official` (the authors' full match, which lets tags repeat).
    """
    check = {"strict": parsing.is_strict_format, "official": parsing.is_official_format}[match]
    return [float(check(s.completion)) for s in samples]


def accuracy(samples: Sequence[Sample], *, match: str = "strict") -> list[float]:
    """1 when the answer is the label (CLS-RL section 3.2, second equation), else 0.

    Args:
        samples: The completions. Length: N.
        match: `strict` (normalised equality of the one answer) or `official` (the authors' reward: symbolic
            verification by `math_verify` first, which accepts some wrong names, then lower-cased equality of the first
            `<answer>`) or `tagged` (normalised equality of the one answer in tags, whatever stands around it: ALERT
            section 3.5).
    """
    checks = {
        "strict": parsing.matches_strictly,
        "official": _official_reward_match,
        "tagged": lambda completion, label: parsing.tagged_answer(completion) == parsing.normalize(label),
    }
    return [float(checks[match](s.completion, s.label)) for s in samples]


def equality(samples: Sequence[Sample]) -> list[float]:
    """1 when the whole completion is the label to the letter (CLS-RL section 3.3), else 0.

    >>> from common.types import Prompt
    >>> equality([Sample(Prompt("0", "?", "six"), text) for text in ("six", "Six", "six ", "")])
    [1.0, 0.0, 0.0, 0.0]
    """
    return [float(s.completion == s.label) for s in samples]


def _official_reward_match(completion: str, label: str) -> bool:
    from math_verify import parse, verify

    if verify(parse(completion), parse(label)):
        return True
    return parsing.first_answer(completion).lower() == label.strip().lower()


@dataclass(frozen=True)
class Scores:
    """Each reward by name, and their weighted sum. Length of every list: N.

    missing: of rewards that may be, which samples go without it; their value in `parts` is 0.
    """

    parts: dict[str, list[float]]
    total: list[float]
    missing: dict[str, list[bool]] = field(default_factory=dict)

    @property
    def known(self) -> dict[str, list[float | None]]:
        """Each reward by name, None where it is missing."""
        found = {}
        for name, values in self.parts.items():
            gaps = self.missing.get(name, [False] * len(values))
            found[name] = [None if gap else value for value, gap in zip(values, gaps, strict=True)]
        return found


@dataclass(frozen=True)
class Reward:
    """One entry of the reward mix."""

    weight: float
    function: RewardFunction


def score(samples: Sequence[Sample], rewards: dict[str, Reward]) -> Scores:
    """Evaluate every reward on every sample and add them up by weight.

    With accuracy 1 and format 0 at weights 1.0 and 0.5, the total is 1.0.
    """
    parts = {name: [float(value) for value in reward.function(samples)] for name, reward in rewards.items()}
    for name, values in parts.items():
        if len(values) != len(samples):
            raise ValueError(f"reward '{name}' returned {len(values)} values for {len(samples)} samples")
    weights = {name: reward.weight for name, reward in rewards.items()}
    return Scores(parts, weighted(parts, weights) if parts else [0.0] * len(samples))


def weighted(parts: dict[str, list[float]], weights: dict[str, float]) -> list[float]:
    """The weighted sum of every sample.

    >>> weighted({"a": [1.0, 0.0], "b": [1.0, 1.0]}, {"a": 2.0, "b": 0.5})
    [2.5, 0.5]
    """
    columns = [[weights[name] * value for value in values] for name, values in parts.items()]
    return [sum(row) for row in zip(*columns, strict=True)]


def build_rewards(mix: dict[str, dict[str, Any]]) -> dict[str, Reward]:
    """Turn the config's `rewards` into functions with their arguments bound, and into instances of classes.

    Raises:
        UserError: `rewards.<name>.fn` cannot be found, or a class refuses its arguments.
    """
    built = {}
    for name, entry in mix.items():
        arguments = {key: value for key, value in entry.items() if key not in ("weight", "fn")}
        found = locate(entry["fn"], f"rewards.{name}.fn")
        function = _instance(found, name, arguments) if isinstance(found, type) else partial(found, **arguments)
        built[name] = Reward(float(entry["weight"]), function)
    return built


def _instance(kind: type, name: str, arguments: dict[str, Any]) -> RewardFunction:
    try:
        found = kind(**arguments)
    except UserError as error:
        raise UserError(f"rewards.{name}.{error}") from error
    if not callable(found):
        raise UserError(f"rewards.{name}.fn: {kind.__name__} objects cannot be called; give a class with __call__")
    return found
