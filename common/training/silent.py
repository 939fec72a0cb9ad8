"""Rewards that say nothing: what pays everybody or nobody cannot teach. Pure functions of what updates report.

A reward's metrics are its mean and deviation over the samples of an update (`rewards/<name>/mean`, `.../std`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

HARDLY = 0.02  # of a reward's 1: about one completion of fifty was right
CUT = 0.1  # share of completions cut at the limit from which on it is said
MOSTLY = 0.5  # and from which on it explains a reward that pays nobody
FIX = {
    "nobody": "the model never does what it asks for, so raising its weight changes nothing: begin with SFT on replies"
    " that earn it (model.path=<that run>/model), use an easier reward first or another method, or leave it out with"
    " ~rewards.{name}",
    "everybody": "there is nothing left to learn from it; leave it out with ~rewards.{name}, or ask for more",
}


def silent_rewards(updates: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Rewards that paid all samples of all these updates the same: `nobody` if that was 0, else `everybody`.

    >>> first = {"rewards/format/mean": 0.0, "rewards/format/std": 0.0, "rewards/a/mean": 0.5, "rewards/a/std": 0.5}
    >>> silent_rewards([first, {**first, "rewards/a/mean": 1.0, "rewards/a/std": 0.0}])
    {'format': 'nobody'}
    >>> silent_rewards([{"rewards/b/mean": 1.0, "rewards/b/std": 0.0}]), silent_rewards([{"loss": 0.0}])
    ({'b': 'everybody'}, {})
    """
    means = {key for row in updates for key in row if key.startswith("rewards/") and key.endswith("/mean")}
    silent = {}
    for name in sorted(key.split("/")[1] for key in means):
        mean, std = (f"rewards/{name}/{which}" for which in ("mean", "std"))
        rows = [(row[mean], row[std]) for row in updates if mean in row]
        if all(deviation == 0 for _, deviation in rows) and len({mean for mean, _ in rows}) == 1:
            silent[name] = "everybody" if rows[0][0] else "nobody"
    return silent


def hardly_paid(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Rewards that paid next to nothing in these updates, with their mean. One that also takes away is none of them.

    >>> hardly_paid([{"rewards/equality/mean": 0.03}, {"rewards/equality/mean": 0.0}]), hardly_paid([{"loss": 1.0}])
    ({'equality': 0.015}, {})
    >>> hardly_paid([{"rewards/format/mean": 0.9, "rewards/length/mean": -0.1}])
    {}
    """
    keys = sorted({key for row in updates for key in row if key.startswith("rewards/") and key.endswith("/mean")})
    means = {key.split("/")[1]: fmean(row[key] for row in updates if key in row) for key in keys}
    return {name: mean for name, mean in means.items() if 0 <= mean < HARDLY}


def fix(name: str, whom: str, cut: float = 0.0) -> str:
    """What would help against a reward that paid `nobody` or `everybody`, where so large a share of completions was cut
    at `rollout.max_completion_tokens`.
    """
    first = "most completions are cut, so raise rollout.max_completion_tokens first; if they do end, "
    return (first if whom == "nobody" and cut >= MOSTLY else "") + FIX[whom].format(name=name)


def cut_line(share: float, limit: int | None, what: str = "completions") -> str:
    """What is said of completions that were cut.

    >>> cut_line(0.921, 64)
    '92 % of completions were cut at rollout.max_completion_tokens=64: raise it, since what is cut off counts as wrong'
    """
    key = "rollout.max_completion_tokens" + ("" if limit is None else f"={limit}")
    return f"{100 * share:.0f} % of {what} were cut at {key}: raise it, since what is cut off counts as wrong"
