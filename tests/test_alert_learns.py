"""ALERT on the model that was pre-trained to compare, over the same candidates as its untrained baseline.

The first run on a machine builds the model, three to four minutes.
"""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest

from common.evaluation.metrics import paired_test

pytestmark = pytest.mark.faults
QUIET = ["data=digits", "model=tiny_gemma3", "tracking=none", "label_scoring=false"]


@pytest.mark.timeout(900)
def test_alert_beats_its_untrained_baseline(runner, tmp_path):
    assert runner(tmp_path / "baseline", ["method=gemma_1shot", *QUIET]) == 0
    assert runner(tmp_path / "alert", ["experiment=alert_no_judge", "trainer.evaluate_every=0", *QUIET]) == 0
    correct = []
    for name, phase in (("baseline", "before"), ("alert", "after")):
        table = pyarrow.parquet.read_table(tmp_path / name / "predictions.parquet").to_pylist()
        correct.append({row["image"]: row["correct"] for row in table if row["phase"] == phase})
    before, after = correct
    assert len(before) == 1637 and before.keys() == after.keys()
    found = paired_test(list(before.values()), [after[image] for image in before])
    assert found["difference"] >= 0.05 and found["ci95"][0] > 0
    draft = json.loads((tmp_path / "alert" / "metrics.json").read_text())["after"]["test"]["draft"]
    assert draft["accuracy"] < draft["presence"], "never above what its candidates allow"
