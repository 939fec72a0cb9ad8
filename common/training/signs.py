"""Detect signs that a training goes wrong from the metrics of its updates, and name the probable cause.

Pure functions: the same rows of metrics.jsonl give the same signs, whether they come one by one or are read again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import fmean

# Rewards without a learning signal: those that give every completion the same value. The metrics of a reward are its
# mean and deviation over the samples of an update (`rewards/<name>/mean`, `.../std`).

LOW_REWARD = 0.02  # mean reward below which it counts as hardly ever paid: one completion of fifty was right
CUT = 0.1  # share of completions cut at the token limit above which there is a warning
MOSTLY = 0.5  # share above which being cut explains a reward that is never paid
FIX = {
    "always 0": "the model never does what it asks for, so raising its weight changes nothing: begin with SFT on"
    " replies that earn it (model.path=<that run>/model), use an easier reward first or another method, or leave it out"
    " with ~rewards.{name}",
    "always the same": "there is nothing left to learn from it; leave it out with ~rewards.{name}, or ask for more",
}


def constant_rewards(updates: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return rewards that gave all samples of all these updates one value: `always 0`, or `always the same`.

    >>> first = {"rewards/format/mean": 0.0, "rewards/format/std": 0.0, "rewards/a/mean": 0.5, "rewards/a/std": 0.5}
    >>> constant_rewards([first, {**first, "rewards/a/mean": 1.0, "rewards/a/std": 0.0}])
    {'format': 'always 0'}
    >>> constant_rewards([{"rewards/b/mean": 1.0, "rewards/b/std": 0.0}]), constant_rewards([{"loss": 0.0}])
    ({'b': 'always the same'}, {})
    """
    means = {key for row in updates for key in row if key.startswith("rewards/") and key.endswith("/mean")}
    constant = {}
    for name in sorted(key.split("/")[1] for key in means):
        mean, std = (f"rewards/{name}/{which}" for which in ("mean", "std"))
        rows = [(row[mean], row[std]) for row in updates if mean in row]
        if all(deviation == 0 for _, deviation in rows) and len({mean for mean, _ in rows}) == 1:
            constant[name] = "always the same" if rows[0][0] else "always 0"
    return constant


def low_rewards(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return rewards with a mean close to 0 in these updates, and that mean. Rewards with a negative mean are left out.

    >>> low_rewards([{"rewards/equality/mean": 0.03}, {"rewards/equality/mean": 0.0}]), low_rewards([{"loss": 1.0}])
    ({'equality': 0.015}, {})
    >>> low_rewards([{"rewards/format/mean": 0.9, "rewards/length/mean": -0.1}])
    {}
    """
    keys = sorted({key for row in updates for key in row if key.startswith("rewards/") and key.endswith("/mean")})
    means = {key.split("/")[1]: fmean(row[key] for row in updates if key in row) for key in keys}
    return {name: mean for name, mean in means.items() if 0 <= mean < LOW_REWARD}


def fix(name: str, value: str, cut: float = 0.0) -> str:
    """Return advice on a reward that was `always 0` or `always the same`. `cut`: share of completions that were cut."""
    first = "most completions are cut, so raise rollout.max_completion_tokens first; if they do end, "
    return (first if value == "always 0" and cut >= MOSTLY else "") + FIX[value].format(name=name)


def cut_line(share: float, limit: int | None, what: str = "completions") -> str:
    """Return the warning about completions that were cut.

    >>> cut_line(0.921, 64)
    '92 % of completions were cut at rollout.max_completion_tokens=64: raise it, since what is cut off counts as wrong'
    """
    key = "rollout.max_completion_tokens" + ("" if limit is None else f"={limit}")
    return f"{100 * share:.0f} % of {what} were cut at {key}: raise it, since what is cut off counts as wrong"


# Signs over the whole training: cut completions, zero-variance groups, collapsing entropy or length, falling accuracy.

WINDOW = 10  # rollout batches that are averaged, at the beginning and at the end
FAR = 0.1  # smallest drop of accuracy that is a sign, as a share of 1
SURE = 2.0  # and smallest drop in standard errors of the difference, since few images vary by chance
# Factors of the initial value beyond which a measure has fallen or jumped. A policy that learns becomes more certain
# and often briefer, so the entropy may fall further, and neither is a sign while the reward rises.
BOUNDS = {"entropy": (0.1, 3.0), "completions/mean_length": (1 / 3, 3.0)}
WORDS = {"entropy": "the entropy of the tokens", "completions/mean_length": "the length of completions"}
RATE = "trainer.learning_rate is probably too high: lower it to a third or a tenth, under another run_name"


class Signs:
    """Signs found so far, by name, each as one line with the probable cause.

    cut: share of all completions that were cut. flat: number of rollout batches in a row, up to the last one, in
    which all groups had zero variance.
    """

    def __init__(self, rows: Iterable[Mapping[str, float]] = (), limit: int | None = None) -> None:
        """
        Args:
            rows: Rows of metrics.jsonl, in order.
            limit: Value of `rollout.max_completion_tokens`.
        """
        self.found: dict[str, str] = {}
        self.limit, self.flat, self.number, self.cut = limit, 0, 0, 0.0
        self.start: dict[str, float] = {}
        self.first: list[Mapping[str, float]] = []
        self.last: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        for row in rows:
            self.see(row)

    def see(self, row: Mapping[str, float]) -> dict[str, str]:
        """Add one row, and return the signs that it shows for the first time."""
        signs = self._accuracy(row)
        if "reward" in row:  # only the first update of a rollout batch reports rewards
            self._take(row)
            if self.number >= WINDOW:
                signs |= self._cut() | self._no_differences() | self._moved()
        new = {name: line for name, line in signs.items() if name not in self.found}
        self.found |= new
        return new

    def _take(self, row: Mapping[str, float]) -> None:
        self.number += 1
        self.flat = self.flat + 1 if row.get("frac_reward_zero_std") == 1 else 0
        # running mean over all batches
        self.cut += (row.get("completions/clipped_ratio", 0.0) - self.cut) / self.number
        if len(self.first) < WINDOW:
            self.first.append(row)
        self.last.append(row)

    def _mean(self, name: str, rows: Iterable[Mapping[str, float]]) -> float | None:
        """Return the mean over the batches that report a metric; a batch without any loss reports no entropy."""
        values = [row[name] for row in rows if name in row]
        return fmean(values) if values else None

    @property
    def _reward(self) -> tuple[float, float]:
        """Return the mean reward of the first batch, and of the last ones."""
        return self.first[0]["reward"], fmean(row["reward"] for row in self.last)

    def _cut(self) -> dict[str, str]:
        share = self._mean("completions/clipped_ratio", self.last) or 0.0
        return {"cut": cut_line(share, self.limit)} if share >= CUT else {}

    def _no_differences(self) -> dict[str, str]:
        if self.flat < WINDOW:
            return {}
        before, now = self._reward
        went = f"the mean reward went from {before:.3f} to {now:.3f}"
        if self.number == self.flat:
            more = "raise trainer.group_size or rollout.temperature, or add a reward in which completions differ"
            cause = "raise rollout.max_completion_tokens first" if self.cut >= MOSTLY else more
        else:
            cause = f"{went}, so there is little left to learn" if now > before else f"{went}; {RATE}"
        return {"flat": f"no group's completions have differed in their reward for {WINDOW} updates: {cause}"}

    def _moved(self) -> dict[str, str]:
        before, now = self._reward
        signs = {}
        for name, (low, high) in BOUNDS.items():
            start, end = self._mean(name, self.first[:WINDOW]), self._mean(name, self.last)
            if start is None or end is None or self.number < 2 * WINDOW or now > before:
                continue
            if not low * start <= end <= high * start:
                what = "fell" if end < start else "jumped"
                signs[name] = (
                    f"{WORDS[name]} {what} from {start:.3g} to {end:.3g}, and the mean reward went from {before:.3f} to"
                    f" {now:.3f}; {RATE}"
                )
        return signs

    def _accuracy(self, row: Mapping[str, float]) -> dict[str, str]:
        signs = {}
        for key in row:
            split = key.removeprefix("eval/").removesuffix("/accuracy")
            if key != f"eval/{split}/accuracy":
                continue
            accuracy, images = row[key], row.get(f"eval/{split}/n", 0.0)
            if row.get("step") == 0:
                self.start |= {key: accuracy, f"{key} n": images}
            elif key in self.start:
                before, error = self.start[key], _error(self.start[key], self.start[f"{key} n"], accuracy, images)
                if before - accuracy >= max(FAR, SURE * error):
                    signs[key] = (
                        f"accuracy on {split} fell from {100 * before:.2f} % before training to {100 * accuracy:.2f} %"
                        f" after update {row['step']}: {self._why()}"
                    )
        return signs

    def _why(self) -> str:
        if self.first and self._reward[1] > self._reward[0]:
            return (
                "the rewards have risen meanwhile, so they pay for something else than right answers; read completions"
            )
        return f"{RATE}; with validation images, evaluate=best tests the best evaluation"


def at(update: int) -> str:
    """Return in words when an evaluation was made.

    >>> at(0), at(20)
    ('before training', 'after update 20')
    """
    return f"after update {update}" if update else "before training"


def _error(before: float, n_before: float, after: float, n_after: float) -> float:
    """Return the standard error of the difference of two accuracies on independent images."""
    return sqrt(before * (1 - before) / max(1.0, n_before) + after * (1 - after) / max(1.0, n_after))
