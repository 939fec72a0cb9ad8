"""`calibration=folds`: confidences of any few-shot learner from fits that had not seen the image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from common.config.composition import validate
from common.data import task
from common.few_shot.heads.base import Pictures, Support, Text, fit
from common.few_shot.heads.folds import out_of_fold
from common.few_shot.heads.tip_adapter import TipAdapterF
from common.learner import Check
from common.plugins import locate
from common.run.result import Result
from common.types import UserError


def head():
    return TipAdapterF(
        seed=1,
        epochs=2,
        batch=8,
        learning_rate=1e-3,
        weight_decay=0.01,
        alpha=1.0,
        beta=5.0,
        search_scale=[7, 3],
        key_views=1,
    )


def test_each_image_is_classified_by_a_fit_on_the_others_in_all_their_views():
    """Against a loop that fits on supports built by hand."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2] * 6)
    views = [torch.randn(18, 8, generator=generator) + 3 * torch.eye(8)[labels] for _ in range(4)]
    parts = [number // 3 % 3 if number < 15 else -1 for number in range(18)]
    text = Text(("a", "b", "c"))

    def support(kept):
        return Support(
            Pictures(views[3][kept], labels[kept]), lambda n: Pictures(views[n % 3][kept], labels[kept]), 3, None, ()
        )

    everyone = torch.ones(18, dtype=torch.bool)
    found = out_of_fold(head, support(everyone), parts, None, text)
    assert found[15:].isnan().all()
    for part in range(3):
        there = torch.tensor(parts) == part
        learner = head()
        fit(learner, support(~there), None, text)
        with torch.no_grad():
            expected = learner.logits(Pictures(views[3][there], labels[there]), text)
        assert torch.equal(found[there], expected)


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
    assert (tmp_path / "run" / "doubts.csv").is_file() and (tmp_path / "run" / "model" / "novelty.npz").is_file()
