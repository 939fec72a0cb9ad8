"""Attribute errors to the draft's list or to the choice from it (ALERT sections 3.1 and 3.3, Table 5).

ALERT over k candidates can never be better than the draft's recall@k; that bound and the two rates that explain the
rest are always reported. Names are compared like answers (`common.parsing.normalize`). Pure Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.few_shot.candidates import place_of, recall
from common.parsing import normalize

RIGHT = "right"
NOT_SHOWN = "not_among_candidates"
CHOSEN_WRONG = "chosen_wrong"
NONE_NAMED = "no_candidate_named"

PUBLISHED_K = 2
# ALERT's published accuracies over two candidates; recall@2 of the candidates is their upper bound.
PUBLISHED: dict[str, dict[int | str, float]] = {
    "imagenet": {1: 76.95, 2: 77.80, 4: 78.63, 8: 78.69, 16: 78.74},  # Table 1
    "imagenet_v2": {16: 76.70},  # Table 2
    "imagenet_sketch": {16: 69.12},
    "oxford_pets": {16: 92.3},  # figure 4
    "caltech101": {16: 96.8},
    "dtd": {16: 75.5},
    "food101": {16: 89.7},
    "eurosat": {16: 85.6},
}


@dataclass(frozen=True)
class Case:
    """One test image.

    truth: Name of the true class.
    shown: Names of the candidates in the order of the prompt.
    ranking: Names in the draft's own order, best first, no name twice; as many as are known.
    answer: Final answer; empty if the reply gives none or several.
    """

    truth: str
    shown: tuple[str, ...]
    ranking: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Outcome:
    """Result of a case.

    kind: right, or the kind of error.
    rank: of the true class in the draft's ranking;
    position: among the shown candidates; both from 1, None if missing.
    named_unseen: the answer is the true class although it was not shown.
    """

    kind: str
    rank: int | None
    position: int | None
    named_unseen: bool


def outcome(case: Case) -> Outcome:
    """Classify one answer. If the true class is not shown, the answer counts as wrong, even if it names that class.

    Raises:
        ValueError: The draft's first candidate is the truth, yet it is not shown.

    >>> outcome(Case("ox", shown=("fox", "ox"), ranking=("ox", "fox", "cow"), answer="Ox"))
    Outcome(kind='right', rank=1, position=2, named_unseen=False)
    >>> outcome(Case("cow", shown=("fox", "ox"), ranking=("ox", "fox", "cow"), answer="cow"))
    Outcome(kind='not_among_candidates', rank=3, position=None, named_unseen=True)
    """
    truth, answer = normalize(case.truth), normalize(case.answer)
    shown = [normalize(name) for name in case.shown]
    rank = place_of(truth, [normalize(name) for name in case.ranking])
    position = place_of(truth, shown)
    if position is None:
        if rank == 1:
            raise ValueError(f"the draft's first candidate '{case.truth}' is not shown: {', '.join(case.shown)}")
        return Outcome(NOT_SHOWN, rank, None, answer == truth)
    kind = RIGHT if answer == truth else CHOSEN_WRONG if answer in shown else NONE_NAMED
    return Outcome(kind, rank, position, False)


def analyse(cases: Sequence[Case]) -> dict[str, Any]:
    """Return how often the draft and the choice from it are right, for the images of one split.

    Returns:
        Shares of 1 unless said otherwise; None where there is no image to take a share of.
        `n`: images (a count). `accuracy`. `presence`: the true class is shown; accuracy cannot be higher.
        `accuracy_given_presence`. `recall@k`: of the draft. `errors`: shares of all images by kind; together with
        `accuracy` they add up to 1. `fix_rate`: share of right answers where the true class is shown but not ranked
        first by the draft. `break_rate`: share of wrong answers where it is ranked first. `fixed`, `broken`: their
        counts. `by_position`: `n` and `accuracy` by the true class's position in the prompt, from the first.
        `truth_named_unseen`: a count of images that are wrong here although the answer is the label.

    Raises:
        ValueError: There is no case.

    So accuracy = recall@1 (1 - break_rate) + (presence - recall@1) fix_rate: here 1/2 * 1/2 + 1/4 * 1.

    >>> ranking, shown = ("a", "b", "c"), ("a", "b")
    >>> pairs = (("a", "a"), ("a", "b"), ("b", "b"), ("c", "a"))
    >>> found = analyse([Case(truth, shown, ranking, answer) for truth, answer in pairs])
    >>> [found[key] for key in ("accuracy", "recall@1", "presence", "break_rate", "fix_rate")]
    [0.5, 0.5, 0.75, 0.5, 1.0]
    >>> found["errors"]
    {'not_among_candidates': 0.25, 'chosen_wrong': 0.25, 'no_candidate_named': 0.0}
    """
    if not cases:
        raise ValueError("no images to analyse")
    outcomes = [outcome(case) for case in cases]
    n, kinds = len(outcomes), Counter(each.kind for each in outcomes)
    shown = [each for each in outcomes if each.position is not None]
    # The draft ranks the true class first, or lower among the shown ones. True where the answer is right.
    first = [each.kind == RIGHT for each in shown if each.rank == 1]
    lower = [each.kind == RIGHT for each in shown if each.rank != 1]
    return {
        "n": n,
        "accuracy": kinds[RIGHT] / n,
        "presence": len(shown) / n,
        "accuracy_given_presence": _share(kinds[RIGHT], len(shown)),
        **recall([each.rank for each in outcomes], min(len(case.ranking) for case in cases)),
        "errors": {kind: kinds[kind] / n for kind in (NOT_SHOWN, CHOSEN_WRONG, NONE_NAMED)},
        "fix_rate": _share(sum(lower), len(lower)),
        "break_rate": _share(len(first) - sum(first), len(first)),
        "fixed": sum(lower),
        "broken": len(first) - sum(first),
        "by_position": _by_position(shown, max(len(case.shown) for case in cases)),
        "truth_named_unseen": sum(each.named_unseen for each in outcomes),
    }


def ranking_from(shown: Sequence[str], ranking: Sequence[str], order: str) -> tuple[str, ...]:
    """Return a ranking that starts with the candidates in an image's prompt, even if the draft has changed since.

    Args:
        shown: Names, as the prompt listed them.
        ranking: Names, best first.
        order: Order of the prompt. With `shuffle` the prompt does not tell the ranks, so they are taken from `ranking`.

    >>> ranking_from(("b", "a"), ("a", "b", "c"), "rank"), ranking_from(("b", "a"), ("a", "b", "c"), "shuffle")
    (('b', 'a', 'c'), ('a', 'b', 'c'))
    """
    rank = {name: number for number, name in enumerate(ranking)}
    best = shown if order == "rank" else sorted(shown, key=lambda name: rank.get(name, len(rank)))
    return tuple(dict.fromkeys((*best, *ranking)))


def published_above(dataset: str, shots: int | str, recall: Mapping[str, float]) -> dict[str, Any]:
    """Return a sentence if ALERT's published accuracy exceeds the upper bound of these candidates; else nothing.

    Args:
        dataset: Name of the tested dataset.
        shots: Shots of the training.
        recall: Recall of the candidates with the key `recall@2`, a share of 1.

    >>> published_above("imagenet_sketch", 16, {"recall@2": 0.53})["published_above_bound"]
    "ALERT's published 69.12 % lies above recall@2 of these candidates, 53.00 %: it was not reached over such ones"
    >>> published_above("imagenet_sketch", 16, {"recall@2": 0.7}), published_above("dtd", 4, {"recall@2": 0.1})
    ({}, {})
    """
    bound, accuracy = recall.get(f"recall@{PUBLISHED_K}"), PUBLISHED.get(dataset, {}).get(shots)
    if bound is None or accuracy is None or accuracy <= 100 * bound:
        return {}
    said = (
        f"ALERT's published {accuracy:.2f} % lies above recall@{PUBLISHED_K} of these candidates, {100 * bound:.2f} %:"
        " it was not reached over such ones"
    )
    return {"published_above_bound": said}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _by_position(shown: Sequence[Outcome], longest: int) -> list[dict[str, float | None]]:
    table: list[dict[str, float | None]] = []
    for position in range(1, longest + 1):
        right = [each.kind == RIGHT for each in shown if each.position == position]
        table.append({"n": len(right), "accuracy": _share(sum(right), len(right))})
    return table
