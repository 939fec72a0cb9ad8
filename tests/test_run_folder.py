"""What a folder accepts, keeps and refuses."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from common.run_folder import RunFolder
from common.types import Prediction, UserError

VALUES = {"shots": 4, "seed": 1, "method": {"name": "clsrl"}, "run_name": "a", "tracking": {"mode": "offline"}}


def test_free_folder_then_claimed_then_finished(tmp_path):
    place = RunFolder(tmp_path / "run")
    assert place.finished_result(VALUES) is None
    place.claim(VALUES)
    assert place.finished_result(VALUES) is None, "claimed is not finished"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["shots"] == 4
    (tmp_path / "run" / "metrics.json").write_text('{"x": 1}')
    assert place.finished_result(VALUES) == {"x": 1}


def test_another_value_is_refused_and_named(tmp_path):
    RunFolder(tmp_path).claim(VALUES)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match="shots: 4 -> 8"):
        RunFolder(tmp_path).finished_result({**VALUES, "shots": 8})
    with pytest.raises(UserError, match=r"method\.name: clsrl -> sft"):
        RunFolder(tmp_path).finished_result({**VALUES, "method": {"name": "sft"}})
    assert (tmp_path / "config.yaml").read_text() == before
    assert RunFolder(tmp_path).finished_result({**VALUES, "run_name": "b", "tracking": {"mode": "online"}}) is None


def test_interrupted_work_is_moved_aside(tmp_path):
    place = RunFolder(tmp_path)
    for attempt in (1, 2):
        place.claim(VALUES)
        place.log_metrics({"step": attempt})
        place.close()
    place.claim(VALUES)
    kept = [json.loads((tmp_path / f"interrupted-{n}" / "metrics.jsonl").read_text())["step"] for n in (1, 2)]
    assert kept == [1, 2] and place.metrics() == []


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run .it has precious.txt"):
        RunFolder(tmp_path).finished_result(VALUES)
    (tmp_path / "config.yaml").write_text("my: own")
    with pytest.raises(UserError, match="config.yaml was not written by a run"):
        RunFolder(tmp_path).finished_result(VALUES)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="config.yaml was not written by a run"):
        RunFolder(tmp_path).finished_result(VALUES)


def test_only_a_run_s_own_files_are_moved_aside(tmp_path):
    RunFolder(tmp_path).claim(VALUES)
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path).claim(VALUES)
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "interrupted-1" / "config.yaml").is_file()


def test_two_processes_do_not_share_a_folder(tmp_path):
    first = RunFolder(tmp_path)
    first.claim(VALUES)
    with pytest.raises(UserError, match="another process is running in"):
        RunFolder(tmp_path).claim(VALUES)
    assert not list(tmp_path.glob("interrupted-*"))


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run folder"):
        RunFolder(tmp_path / "file" / "run").claim(VALUES)


def test_metrics_are_on_disk_at_once(tmp_path):
    place = RunFolder(tmp_path)
    place.log_metrics({"step": 1, "loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}  # still open
    place.close()


def test_completions_survive_a_crash_and_are_merged(tmp_path):
    place = RunFolder(tmp_path)
    place.write_completions([{"step": 1, "completion": "six"}], part=1)
    place.write_completions([{"step": 2, "completion": "nine"}], part=2)
    assert pyarrow.parquet.read_table(tmp_path / "completions").num_rows == 2
    place.merge_completions()
    assert pyarrow.parquet.read_table(tmp_path / "completions.parquet").to_pylist() == [
        {"step": 1, "completion": "six"},
        {"step": 2, "completion": "nine"},
    ]
    assert not (tmp_path / "completions").exists()


def test_predictions_hold_both_phases(tmp_path):
    found = Prediction("7", "six", "six", "six", True, True, True, 2, False)
    RunFolder(tmp_path).write_predictions({("zero_shot", "test"): [found], ("eval", "test"): [found]})
    rows = pyarrow.parquet.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert [row["phase"] for row in rows] == ["zero_shot", "eval"] and rows[0]["answer"] == "six"


def test_predictions_hold_probabilities_in_single_precision(tmp_path):
    found = Prediction("7", "six", "six", "six", True, True, True, 2, False, ("six", "one"), (0.75, 0.25), (0.9, 0.1))
    for phase, prediction in (("with", found), ("without", Prediction(*list(vars(found).values())[:9]))):
        place = RunFolder(tmp_path / phase)
        place.path.mkdir()
        place.write_predictions({("eval", "test"): [prediction]})
    table, bare = (pyarrow.parquet.read_table(tmp_path / name / "predictions.parquet") for name in ("with", "without"))
    assert table.schema == bare.schema, "the same columns with and without label scoring"
    assert table.schema.field("probabilities").type == table.schema.field("probabilities_raw").type
    assert table.schema.field("probabilities").type.value_type == pyarrow.float32()
    (row,) = table.to_pylist()
    assert row["choices"] == ["six", "one"] and row["probabilities"] == [0.75, 0.25]
    assert bare.to_pylist()[0]["probabilities"] == []
