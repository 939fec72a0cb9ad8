"""Accounts of ALERT's answers: by hand, by identity, and the reasoning's conclusion."""

from __future__ import annotations

import random

import pytest

from alert.error_analysis import Case, analyse, outcome
from common.evaluation.consistency import reasoning_agrees
from common.few_shot.candidates import recall

RANKING = ("ox", "fox", "cow", "cat")

# truth, shown, answer: kind, rank of the truth, position
OUTCOMES = {
    "draft kept": ("ox", "ox fox", "ox", "right", 1, 1),
    "draft broken": ("ox", "ox fox", "fox", "chosen_wrong", 1, 1),
    "draft fixed": ("fox", "ox fox", "FOX ", "right", 2, 2),
    "draft followed": ("fox", "fox ox", "ox", "chosen_wrong", 2, 1),
    "nothing said": ("fox", "ox fox", "", "no_candidate_named", 2, 2),
    "something else said": ("fox", "ox fox", "cat", "no_candidate_named", 2, 2),
    "both said": ("fox", "ox fox", "ox or fox", "no_candidate_named", 2, 2),
    "truth not shown": ("cow", "ox fox", "ox", "not_among_candidates", 3, None),
    "truth not ranked, nothing said": ("dog", "ox fox", "", "not_among_candidates", None, None),
    "truth not shown but said": ("cow", "ox fox", "cow", "not_among_candidates", 3, None),
}


@pytest.mark.parametrize(
    ("truth", "shown", "answer", "kind", "rank", "position"), OUTCOMES.values(), ids=OUTCOMES.keys()
)
def test_outcome(truth, shown, answer, kind, rank, position):
    found = outcome(Case(truth, tuple(shown.split()), RANKING, answer))
    assert (found.kind, found.rank, found.position) == (kind, rank, position)
    assert found.named_unseen is (answer == "cow")


def test_the_drafts_first_candidate_must_be_shown():
    with pytest.raises(ValueError, match="first candidate 'ox' is not shown: fox, cow"):
        outcome(Case("ox", ("fox", "cow"), RANKING, "fox"))


def test_shares_by_hand():
    found = analyse(
        [Case(truth, tuple(shown.split()), RANKING, answer) for truth, shown, answer, *_ in OUTCOMES.values()]
    )
    assert found == {
        "n": 10,
        "accuracy": 0.2,
        "presence": 0.7,
        "accuracy_given_presence": 2 / 7,
        "recall@1": 0.2,
        "recall@2": 0.7,
        "recall@3": 0.9,
        "recall@4": 0.9,
        "errors": {"not_among_candidates": 0.3, "chosen_wrong": 0.2, "no_candidate_named": 0.3},
        "fix_rate": 0.2,
        "break_rate": 0.5,
        "fixed": 1,
        "broken": 1,
        "by_position": [{"n": 3, "accuracy": 1 / 3}, {"n": 4, "accuracy": 0.25}],
        "truth_named_unseen": 1,
    }


def some_cases(seed, k, oracle, number=400):
    """Random rankings, lists and answers; an answer may also be empty or a name that is not shown."""
    rng = random.Random(seed)
    names = [f"class {label}" for label in range(9)]
    made = []
    for _ in range(number):
        ranking = tuple(rng.sample(names, len(names)))
        truth = ranking[min(int(rng.expovariate(0.7)), 8)]
        shown = list(ranking[:k])
        if oracle and truth not in shown:
            shown[-1] = truth
        rng.shuffle(shown)
        answer = rng.choice([*shown, truth, truth, "", rng.choice(names)])
        made.append(Case(truth, tuple(shown), ranking, answer))
    return made


@pytest.mark.parametrize("oracle", [False, True], ids=["top k", "oracle"])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_identity_of_accuracy_and_rates(k, oracle):
    cases = some_cases(k, k, oracle)
    found = analyse(cases)
    right = sum(case.answer == case.truth and case.truth in case.shown for case in cases)
    assert found["accuracy"] == right / len(cases)
    first = found["recall@1"]
    kept = first * (1 - (found["break_rate"] or 0))
    gained = (found["presence"] - first) * (found["fix_rate"] or 0)
    assert found["accuracy"] == pytest.approx(kept + gained)
    assert found["accuracy"] == pytest.approx(found["presence"] * found["accuracy_given_presence"])
    assert found["accuracy"] == pytest.approx(first + (found["fixed"] - found["broken"]) / len(cases))
    assert sum(found["errors"].values()) + found["accuracy"] == pytest.approx(1)
    assert found["presence"] == (1 if oracle else found[f"recall@{k}"])
    places = found["by_position"]
    assert len(places) == k and sum(place["n"] for place in places) == pytest.approx(found["presence"] * len(cases))
    assert sum(p["n"] * (p["accuracy"] or 0) for p in places) == pytest.approx(right)


def test_shares_of_nothing_are_none():
    found = analyse([Case("cow", ("ox", "fox"), RANKING, "ox")])
    assert found["accuracy_given_presence"] is found["fix_rate"] is found["break_rate"] is None
    assert found["by_position"] == [{"n": 0, "accuracy": None}] * 2
    with pytest.raises(ValueError, match="no images"):
        analyse([])


def test_recall_needs_known_ranks():
    assert recall([1, None], 2) == {"recall@1": 0.5, "recall@2": 0.5}
    assert recall([1, 2], 2, (2, 8)) == {"recall@2": 1, "recall@8": 1}  # all found, so a longer list changes nothing
    assert recall([None], 16, (1, 16)) == {"recall@1": 0, "recall@16": 0}


FOX = ("fox", "arctic fox", "red fox", "ant", "elephant")
# reasoning, answer, whether they agree; candidates are FOX
REASONING = {
    "named last": ("Not an ant. It has tusks: an elephant.", "elephant", True),
    "another named last": ("It could be an elephant, but it is an ant.", "elephant", False),
    "none named": ("It has tusks.", "elephant", None),
    "empty": ("", "elephant", None),
    "ant is not in elephant": ("An elephant.", "ant", False),
    "fox is not in arctic fox": ("An Arctic Fox.", "fox", False),
    "longer name": ("A fox, more exactly an arctic fox", "arctic fox", True),
    "short name after the long one": ("Like an arctic fox, but a fox.", "fox", True),
    "underscores and line breaks": ("It is an arctic\n_fox", "Arctic_Fox", True),
    "plural is another word": ("foxes", "fox", None),
    "quoted": ("The class is 'fox'.", "fox", True),
    "answer is no candidate": ("So it is a fox.", "wolf", False),
    "no answer": ("So it is a fox.", "", False),
    "denied at the end": ("Like a fox, but not an ant.", "fox", True),
    "another clause": ("Not a fox, an ant.", "ant", True),
    "different": ("It is a red fox. Different from an ant: it has fur.", "red fox", True),
    "isn't": ("It is a fox and isn't an ant", "fox", True),
    "all denied": ("It is not an ant; unlike an elephant.", "fox", None),
    "not after it": ("A fox could not look so", "fox", True),
    "a denied name answered": ("It is a fox rather than an ant.", "ant", False),
    "a word that begins alike": ("Note the fox; notably red fox.", "red fox", True),
}


@pytest.mark.parametrize(("think", "answer", "agrees"), REASONING.values(), ids=REASONING.keys())
def test_reasoning_and_answer(think, answer, agrees):
    assert reasoning_agrees(think, answer, FOX) is agrees
    assert reasoning_agrees(think, answer, FOX[::-1]) is agrees, "the order of the candidates does not matter"


@pytest.mark.parametrize(
    ("think", "candidates", "answer"),
    [
        ("a kite (bird of prey)!", ("kite (bird of prey)", "kite"), "kite (bird of prey)"),
        ("2012 Ram C/V Cargo Van Minivan.", ("Ram C/V", "2012 Ram C/V Cargo Van Minivan"), None),
        ("a red fox terrier", ("red fox", "fox terrier", "terrier"), "fox terrier"),
        ("an arctic fox trot", ("fox trot", "arctic fox"), "arctic fox"),
        ("it is c++", ("c", "c++"), "c++"),
        ("the digit 1 or 10", ("1", "10"), "10"),
    ],
    ids=["parentheses", "within a longer one", "ends last", "overlap: the longer wins", "signs", "numbers"],
)
def test_names_with_signs(think, candidates, answer):
    assert reasoning_agrees(think, answer or candidates[-1], candidates) is True
