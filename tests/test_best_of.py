"""The best of several learners by cross-validation, against plain loops over scikit-learn."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from common.few_shot.heads.base import Pictures, Support, Text
from common.few_shot.heads.best_of import BestOf
from common.few_shot.heads.folds import stratified
from common.types import UserError

HEADS = "common.few_shot.heads"
LEARNERS = {
    "nearest_mean": {"_target_": f"{HEADS}.nearest_mean.NearestMean"},
    "linear_probe": {"_target_": f"{HEADS}.linear_probe.LinearProbe", "grid": {"strength": [0.01, 1.0, 100.0]}},
}
SIZES = (12, 7, 3, 1)


def features(seed=0, sizes=SIZES, width=6, noise=1.2):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(sizes), width, generator=generator)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return Pictures(centres[labels] + noise * torch.randn(len(labels), width, generator=generator), labels)


def begun(pictures, learners=LEARNERS, folds=3, repeats=2, seed=1):
    head = BestOf(seed=seed, learners=learners, folds=folds, repeats=repeats)
    names = tuple(f"class {n}" for n in range(int(pictures.labels.max()) + 1))
    head.begin(Support(pictures, lambda _: pictures, None), None, Text(names))
    return head


def fitted(pictures, **how):
    head = begun(pictures, **how)
    for number in range(head.steps):
        head.step(number)
    return head


@functools.cache
def by_seed(seed):
    return fitted(features(seed))


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_every_part_has_its_share_of_every_class(folds):
    labels = [0] * 23 + [1] * 10 + [2] * 4 + [3]
    parts = stratified(labels, folds, "1")
    assert parts == stratified(labels, folds, "1") != stratified(labels, folds, "2")
    assert parts[-1] == -1, "the only one of its class is always trained on"
    for label, count in Counter(labels).items():
        shares = Counter(part for part, of in zip(parts, labels, strict=True) if of == label and part >= 0)
        if count > 1:
            assert sum(shares.values()) == count and max(shares.values()) <= -(-count // folds)
            assert len(shares) == min(folds, count) and max(shares.values()) < count, "each fit has one of the class"
    sizes = Counter(part for part in parts if part >= 0).values()
    assert max(sizes) - min(sizes) <= 1


def plain(pictures, head, strength):
    """Held-out predictions of a logistic regression, repeat after repeat, by a loop."""
    images, labels = pictures.images.numpy(), pictures.labels.numpy()
    found = []
    for parts in map(np.array, head.parts):
        answers = np.full(len(labels), -1)
        for fold in range(3):
            model = LogisticRegression(C=strength, max_iter=1000).fit(images[parts != fold], labels[parts != fold])
            answers[parts == fold] = model.predict(images[parts == fold])
        found.append(answers[parts >= 0])
    return np.concatenate(found)


def test_held_out_predictions_are_those_of_a_plain_loop():
    pictures = features()
    head = fitted(pictures)
    for which, strength in ((1, 0.01), (2, 1.0), (3, 100.0)):
        logits, labels = head.predictions(which)
        expected = plain(pictures, head, strength)
        assert logits.argmax(1).tolist() == expected.tolist()
        assert len(labels) == 2 * (sum(SIZES) - 1), "all but the only one of its class, in both repeats"
        assert head.measured(which)["right"] == int((expected == labels.numpy()).sum())
    assert head.out_of_fold()[1].shape == (2, sum(SIZES), len(SIZES))
    assert head.out_of_fold()[1][:, -1].isnan().all() and not head.out_of_fold()[1][:, :-1].isnan().any()


@pytest.mark.parametrize("seed", range(6))
def test_the_best_setting_is_fitted_on_all_images(seed):
    """By hand: a learner's setting by cross entropy; the first learner, unless another is ahead by a standard error."""
    pictures = features(seed)
    head = by_seed(seed)
    probe = min((1, 2, 3), key=lambda which: head.measured(which)["nll"])
    right = []
    for which in (0, probe):
        logits, labels = head.predictions(which)
        right.append((logits.argmax(1) == labels).numpy().reshape(2, -1).mean(0))
    ahead = right[1] - right[0]
    assert head.chosen == (probe if ahead.mean() > ahead.std(ddof=1) / np.sqrt(len(ahead)) else 0)
    new = features(seed + 10)
    if head.chosen:
        strength = head.settings[head.chosen].varied["strength"]
        model = LogisticRegression(C=strength, max_iter=1000).fit(pictures.images.numpy(), pictures.labels.numpy())
        assert head.logits(new, head.text).argmax(1).tolist() == model.predict(new.images.numpy()).tolist()
    told = head.end()
    assert told["learner"] == head.settings[head.chosen].name
    rows = told["cross_validated"]["learners"]
    assert [row["learner"] for row in rows] == [*LEARNERS]
    assert rows[1] == {
        "learner": "linear_probe",
        **head.settings[probe].varied,
        "accuracy": pytest.approx(right[1].mean()),
    }
    assert told["cross_validated"]["images"] == sum(SIZES) - 1


def test_both_outcomes_of_the_rule_are_among_the_cases():
    assert {bool(by_seed(seed).chosen) for seed in range(6)} == {True, False}


def test_an_interrupted_search_ends_as_an_undisturbed_one():
    pictures = features()
    whole = fitted(pictures)
    first = begun(pictures)
    for number in range(11):
        first.step(number)
    again = begun(pictures)
    again.restore(first.state())
    for number in range(11, again.steps):
        again.step(number)
    assert again.chosen == whole.chosen and torch.equal(again.out_of_fold()[1][:, :-1], whole.out_of_fold()[1][:, :-1])
    assert again.end() == whole.end()
    new = BestOf(seed=1, learners=LEARNERS, folds=3, repeats=2)
    new.ready(whole.head(), whole.text)
    torch.testing.assert_close(new.logits(pictures, whole.text), whole.logits(pictures, whole.text))


def test_one_image_of_each_class_is_fitted_and_nothing_is_compared():
    head = fitted(features(sizes=(1, 1, 1)))
    assert head.chosen == 0 and head.out_of_fold() is None and head.end() == {"learner": "nearest_mean"}
    assert head.logits(head.train.seen, head.text).argmax(1).tolist() == [0, 1, 2]


def test_two_of_each_are_compared():
    head = fitted(features(sizes=(2, 2, 2)), folds=5)
    assert head.out_of_fold()[1].shape == (2, 6, 3) and not head.out_of_fold()[1].isnan().any()


def test_a_fit_without_numbers_is_never_the_best(monkeypatch):
    head = begun(features())
    for number in range(head.steps - 1):
        head.step(number)
    head.held_out[1:3] = torch.nan  # two of the probe's three strengths
    assert head._candidates() == [0, 3]


@pytest.mark.parametrize(
    ("learners", "folds", "said"),
    [
        ({}, 3, "few_shot.learners is empty"),
        (LEARNERS, 1, "few_shot.folds=1 must be 2 or more"),
        ({"probe": {}}, 3, "few_shot.learners.probe._target_ is missing"),
        (
            {"probe": {"_target_": f"{HEADS}.linear_probe.LinearProbe", "strenght": 1}},
            3,
            "few_shot.learners.probe._target_=.*unexpected keyword argument 'strenght'",
        ),
        (
            {"probe": {"_target_": f"{HEADS}.linear_probe.LinearProbe", "grid": {"strength": [1, -1]}}},
            3,
            "must be above 0",
        ),
    ],
)
def test_bad_learners_are_refused_at_once(learners, folds, said):
    with pytest.raises(UserError, match=said):
        BestOf(seed=1, learners=learners, folds=folds, repeats=1)
