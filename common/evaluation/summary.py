"""What metrics.json says about one split, as types. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class ProbabilitySummary:
    """How good the probabilities of the offered classes are; see `metrics.probability_metrics`.

    raw: the same without length normalisation. seconds: spent on the probabilities.
    """

    top1: float
    top5: float
    ece: float
    brier: float
    aurc: float
    risk_coverage: list[list[float]]
    raw: ProbabilitySummary | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Without what is not there."""
        values = {**vars(self), "raw": None if self.raw is None else self.raw.to_json()}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ProbabilitySummary:
        """The inverse of `to_json`."""
        raw = values.get("raw")
        return cls(**{**values, "raw": None if raw is None else cls.from_json(raw)})


@dataclass(frozen=True)
class Summary:
    """One split in numbers; shares are of 1, intervals hold 95 %.

    accuracy_macro: mean of the classes' accuracies; None where all have equally many images: it is the accuracy.
    accuracy_official, accuracy_aliases, well_formed, mean_tokens, truncated, probability: None where there is nothing
    to say, as about the replies of a classifier. per_class: accuracy by class name; images_per_class: of how many.
    facts: what the method adds (see `Accounts.facts`); in metrics.json its keys stand beside the others.
    """

    n: int
    accuracy: float
    ci95: list[float]
    per_class: dict[str, float]
    seconds: float
    images_per_class: dict[str, int] = field(default_factory=dict)
    accuracy_macro: float | None = None
    accuracy_official: float | None = None
    ci95_official: list[float] | None = None
    accuracy_aliases: float | None = None
    well_formed: float | None = None
    mean_tokens: float | None = None
    truncated: float | None = None
    probability: ProbabilitySummary | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As metrics.json has it, without what is not there."""
        own = {name: value for name, value in vars(self).items() if name not in ("facts", "probability")}
        if self.probability is not None:
            own["probability"] = self.probability.to_json()
        return {name: value for name, value in own.items() if value is not None} | self.facts

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Summary:
        """The inverse of `to_json`: what is no field of its own is a fact."""
        known = {each.name for each in fields(cls)} - {"facts", "probability"}
        own = {name: value for name, value in values.items() if name in known}
        probability = values.get("probability")
        return cls(
            **own,
            probability=None if probability is None else ProbabilitySummary.from_json(probability),
            facts={name: value for name, value in values.items() if name not in known | {"probability"}},
        )
