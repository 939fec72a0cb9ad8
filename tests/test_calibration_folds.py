"""`calibration=folds`: confidences of any few-shot learner from fits that had not seen the image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from common.config.composition import validate
from common.data import task
from common.few_shot import doubts
from common.few_shot.heads.base import FewShotHead, Pictures, Support, Text, accuracy, fit
from common.few_shot.heads.folds import out_of_fold, out_of_selection, stratified
from common.few_shot.heads.linear_probe import LinearProbe
from common.few_shot.heads.tip_adapter import TipAdapter, TipAdapterF
from common.learner import Check
from common.plugins import locate
from common.run.result import Result
from common.types import UserError


def head(**changes):
    values = {"epochs": 2, "batch": 8, "learning_rate": 1e-3, "weight_decay": 0.01, "alpha": 1.0, "beta": 5.0}
    return TipAdapterF(seed=1, search_scale=[7, 3], key_views=1, **values | changes)


def images(count=18, seed=0):
    """Views of images of three classes; the last one is the test view."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1, 2] * (count // 3))
    return [torch.randn(count, 8, generator=generator) + 2 * torch.eye(8)[labels] for _ in range(4)], labels


def support(views, labels, kept):
    return Support(Pictures(views[3][kept], labels[kept]), lambda n: Pictures(views[n % 3][kept], labels[kept]), 3)


TEXT = Text(("a", "b", "c"))
PARTS = [number // 3 % 3 if number < 15 else -1 for number in range(18)]


@pytest.mark.parametrize("with_val", [False, True])
def test_each_image_is_classified_by_a_fit_on_the_others_in_all_their_views(with_val):
    """Against a loop over supports built by hand: the chosen alpha and beta, and the finished fit's spread on val."""
    views, labels = images()
    val = Pictures(images(30, 5)[0][3], images(30, 5)[1]) if with_val else None
    finished = head()
    fit(finished, support(views, labels, torch.ones(18, dtype=torch.bool)), val, TEXT)
    found = out_of_fold(finished, head, PARTS)
    assert found[15:].isnan().all()
    for part in range(3):
        there = torch.tensor(PARTS) == part
        learner = head()
        fit(learner, support(views, labels, ~there), val, TEXT)
        learner.mix.alpha, learner.mix.beta = finished.mix.alpha, finished.mix.beta
        with torch.no_grad():
            expected = learner.logits(Pictures(views[3][there], labels[there]), TEXT)
            if with_val:
                expected *= finished.logits(val, TEXT).std(1).mean() / learner.logits(val, TEXT).std(1).mean()
        assert torch.allclose(found[there], expected, rtol=1e-5)


def test_validation_images_are_classified_by_fits_that_chose_without_them():
    """Against a loop over fits by hand, at the finished fit's spread; an image that is the only one of its class, too."""
    views, labels = images()
    val = Pictures(images(30, 5)[0][3], images(30, 5)[1]).take(slice(0, 28))
    train = support(views, labels, torch.ones(18, dtype=torch.bool))
    finished = head()
    fit(finished, train, val, TEXT)
    found = out_of_selection(finished, head, 1)
    parts = torch.tensor(stratified(val.labels.tolist(), 5, "1", least=1))
    assert sorted(parts.bincount().tolist()) == [5, 5, 6, 6, 6]
    for part in range(5):
        learner = head()
        fit(learner, train, val.take(parts != part), TEXT)
        with torch.no_grad():
            logits, whole = learner.logits(val, TEXT), finished.logits(val, TEXT)
        expected = logits * whole.std(1).mean() / logits.std(1).mean()
        assert torch.allclose(found[parts == part], expected[parts == part], rtol=1e-5)
    alone = val.take(torch.tensor([0, 1, 2]))  # one image of each class, as with one shot
    fit(finished, train, alone, TEXT)
    assert out_of_selection(finished, head, 1).shape == (3, 3)


class Luckiest(FewShotHead):
    """Chooses, of 200 random maps, the one that is right on most validation images."""

    steps = 1

    def end(self):
        maps = torch.randn(200, 3, 8, generator=torch.Generator().manual_seed(self.seed))
        right = (torch.einsum("nd,mcd->mnc", self.val.images, maps).argmax(2) == self.val.labels).sum(1)
        self.map = maps[right.argmax()]
        return {}

    def logits(self, pictures, text):
        return pictures.images @ self.map.T


def test_a_choice_by_luck_is_not_taken_for_skill():
    """Labels without any relation to the images: the luckiest map is right on far more than a third of them."""
    chosen, honest = [], []
    for seed in range(20):
        val = Pictures(torch.randn(30, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(30) % 3)
        learner = Luckiest(seed=seed)
        fit(learner, Support(val, lambda _, same=val: same, 1), val, TEXT)
        chosen.append(accuracy(learner, val, TEXT))
        logits = out_of_selection(learner, lambda s=seed: Luckiest(seed=s), 1)
        honest.append(float((logits.argmax(1) == val.labels).float().mean()))
    assert np.mean(chosen) > 0.5 and np.mean(honest) == pytest.approx(1 / 3, abs=0.06)


def test_learners_follow_what_a_fit_has_chosen():
    """Nothing is searched anew: the values are those of the finished fit, even on images that would choose others."""
    views, labels = images()
    everyone = torch.ones(18, dtype=torch.bool)
    val = Pictures(images(30, 5)[0][3], images(30, 5)[1])
    for build in (
        head,
        lambda: TipAdapter(seed=1, alpha=1.0, beta=5.0, search_scale=[7, 3], key_views=1),
    ):
        finished, follower = build(), build()
        finished.mix.alpha, finished.mix.beta = 0.7, 3.3
        follower.follow(finished)
        fit(follower, support(views, labels, everyone), val, TEXT)
        assert (follower.mix.alpha, follower.mix.beta) == (0.7, 3.3)
    probe = LinearProbe(seed=1)
    fit(probe, support(views, labels, everyone), val, TEXT)
    follower = LinearProbe(seed=1)
    follower.follow(probe)
    fit(follower, support(views, labels, everyone), None, TEXT)
    assert follower.facts["strength"] == probe.facts["strength"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=clip_zero_shot"], "calibration=folds: clip_zero_shot fits nothing"),
        (["method=nothinking"], "calibration=folds fits a few-shot learner five times more, and method=nothinking"),
    ],
)
def test_what_cannot_be_fitted_again_is_refused(compose, words, said):
    config = validate(compose(*words, "calibration=folds"))
    check: Check = locate(config.learner.check, "learner.check")
    with pytest.raises(UserError, match=said):
        check(config, task.build(config))


@pytest.mark.slow
def test_a_run_is_calibrated_by_its_training_images(runner, tmp_path):
    words = ["method=linear_probe", "clip=none", "visual=pixels", "tracking=none", "setting.test_per_class=20"]
    assert runner(tmp_path / "run", [*words, "calibration=folds", "shots=8"]) == 0
    result = Result.load(tmp_path / "run")
    assert result.calibration["source"] == "folds" and result.calibration["n"] == 80
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    held_out = np.array([row[0] for row in manifest["splits"]["train"]["rows"]])
    assert len(held_out) == 80 and result.novelty["share"] == 0.05
    # the digits' keys are their rows, without the dataset's name in front
    found = doubts.read(tmp_path / "run" / "doubts.csv")
    assert found and all(doubt.path.isdecimal() for doubt in found)
    assert (tmp_path / "run" / "model" / "novelty.npz").is_file()
