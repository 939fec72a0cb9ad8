"""ALERT on the model that was pre-trained to compare, over the same candidates as its untrained baseline.

The first run on a machine builds the model, three to four minutes.
"""

from __future__ import annotations

import json
from statistics import mean

import pyarrow.parquet
import pytest

from common.evaluation.metrics import paired_test

pytestmark = pytest.mark.faults
QUIET = ["data=digits", "model=tiny_gemma3", "tracking=none", "label_scoring=false"]


@pytest.mark.timeout(900)
def test_alert_beats_its_untrained_baseline_and_its_draft(runner, tmp_path):
    """The baseline with one seed, image by image; the draft in the mean of three (with seed 1 alone it is ahead)."""
    assert runner(tmp_path / "baseline", ["method=gemma_1shot", *QUIET]) == 0
    drafts = []
    for seed in (1, 2, 3):
        words = ["experiment=alert_no_judge", "trainer.evaluate_every=0", f"seed={seed}", *QUIET]
        assert runner(tmp_path / f"alert{seed}", words) == 0
        drafts.append(json.loads((tmp_path / f"alert{seed}" / "metrics.json").read_text())["after"]["test"]["draft"])
    correct = []
    for name, phase in (("baseline", "before"), ("alert1", "after")):
        table = pyarrow.parquet.read_table(tmp_path / name / "predictions.parquet").to_pylist()
        correct.append({row["image"]: row["correct"] for row in table if row["phase"] == phase})
    before, after = correct
    assert len(before) == 1637 and before.keys() == after.keys()
    found = paired_test(list(before.values()), [after[image] for image in before])
    assert found["difference"] >= 0.05 and found["ci95"][0] > 0
    draft, own, bound = (mean(each[key] for each in drafts) for key in ("recall@1", "accuracy", "presence"))
    assert draft < own < bound, "better than its draft, below its bound"
