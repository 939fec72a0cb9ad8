"""Photos of unknown classes: distances against scikit-learn, p-values by counting, and the promise in simulation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from common.evaluation import novelty
from common.few_shot.heads.folds import stratified
from common.predict.abstention import check_unknown
from common.types import UserError


def photos(seed=0, classes=5, each=30, width=40):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    centres = np.random.default_rng(7).normal(size=(classes + 1, width))
    return (2 * centres[labels] + rng.normal(size=(len(labels), width))).astype(np.float32), labels, centres, rng


def parts(labels):
    return stratified(labels.tolist(), 5, "1")


def plain(features, labels, new):
    """Relative Mahalanobis distances, photo by photo."""
    reduce = PCA(min(64, len(features) // 3, features.shape[1]), random_state=0).fit(features.astype(float))
    rows = reduce.transform(features)
    centres = {label: rows[labels == label].mean(0) for label in set(labels.tolist())}
    inner = np.array([row - centres[label] for row, label in zip(rows, labels.tolist(), strict=True)])
    within = LedoitWolf(assume_centered=True).fit(inner).covariance_
    overall = within + sum(np.outer(centres[label], centres[label]) for label in labels.tolist()) / len(labels)
    found = []
    for row in reduce.transform(new):
        nearest = min((row - c) @ np.linalg.solve(within, row - c) for c in centres.values())
        found.append(nearest - row @ np.linalg.solve(overall, row))
    return np.array(found)


def test_scores_are_relative_mahalanobis_distances():
    features, labels, _, rng = photos()
    new = rng.normal(size=(20, features.shape[1])).astype(np.float32)
    assert novelty.fit(features, labels).scores(new) == pytest.approx(plain(features, labels, new), rel=1e-3)


def test_known_scores_are_of_detectors_that_have_not_seen_the_photo():
    features, labels, _, _ = photos(classes=3, each=10, width=8)
    where = np.array([-1, *parts(labels)[1:]])
    expected = [
        plain(features[where != where[n]], labels[where != where[n]], features[n : n + 1])[0]
        for n in range(1, len(labels))
    ]
    detector = novelty.calibrated(features, labels, where.tolist())
    assert detector.known == pytest.approx(np.sort(expected), rel=1e-2, abs=1e-2)


def test_p_values_count_the_photos_that_look_as_unusual(monkeypatch):
    detector = novelty.Detector(*(np.zeros(1, np.float32),) * 5, known=np.array([1, 2, 2, 5], np.float32))
    monkeypatch.setattr(novelty.Detector, "scores", lambda self, features: features)
    found = detector.p_values(np.array([0, 1, 2, 3, 5, 6], np.float32))
    assert found.tolist() == [1, 1, 4 / 5, 2 / 5, 2 / 5, 1 / 5]


def test_known_photos_are_called_unknown_as_often_as_is_said_and_others_more_often():
    wrongly, rightly = [], []
    for seed in range(20):
        features, labels, centres, rng = photos(seed)
        detector = novelty.calibrated(features, labels, parts(labels))
        new = 2 * centres[rng.integers(0, 5, 400)] + rng.normal(size=(400, 40))
        other = 2 * centres[5] + rng.normal(size=(100, 40))
        wrongly.append((detector.p_values(new) <= 0.1).mean())
        rightly.append((detector.p_values(other) <= 0.1).mean())
    assert np.mean(wrongly) == pytest.approx(0.1, abs=0.03) and np.mean(rightly) > 0.7


def test_a_class_that_is_left_out_is_measured():
    features, labels, _, _ = photos()
    features[labels == 4] = features[labels == 3][::-1]  # the same things under two names cannot be told apart
    found = novelty.measure(features, labels, "abcde", parts)
    assert found["share"] == 0.05 and set(found["found"]) == set("abcde")
    assert min(found["found"][name] for name in "abc") > 0.8 and max(found["found"][name] for name in "de") < 0.2
    assert "least" in novelty.line(found) and novelty.line({}) == ""
    few = labels < 2
    assert novelty.measure(features[few], labels[few], "ab", parts) == {}, "one class left is no task"
    rare = np.concatenate([np.flatnonzero(labels == label)[:5] for label in range(4)])
    assert novelty.measure(features[rare], labels[rare], "abcde", parts) == {}, "15 photos are too few for 5 %"


def test_it_is_kept_beside_the_model(tmp_path):
    features, labels, _, _ = photos()
    detector = novelty.calibrated(features, labels, parts(labels))
    assert novelty.Detector.load(tmp_path) is None
    detector.save(tmp_path)
    again = novelty.Detector.load(tmp_path)
    assert again.p_values(features).tolist() == detector.p_values(features).tolist()
    check_unknown(tmp_path, 0.05)
    with pytest.raises(UserError, match="unknown=0.001 needs 999 cross-validated photos, and .* has 150"):
        check_unknown(tmp_path, 0.001)
    with pytest.raises(UserError, match="unknown=5.0 must be a share"):
        check_unknown(tmp_path, 5.0)
    with pytest.raises(UserError, match="cannot tell unknown classes; .*experiment=photos"):
        check_unknown(tmp_path / "other", 0.05)
