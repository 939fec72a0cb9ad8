"""What a folder accepts, keeps and refuses."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, replace

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from common.run_folder import RunFolder
from common.types import Answers, Prediction, Result, UserError

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


def test_what_an_interrupted_run_wrote_is_kept_up_to_its_checkpoint(tmp_path):
    place = RunFolder(tmp_path)
    place.claim(VALUES)
    for step in (1, 2, 3):
        place.log("metrics.jsonl", {"step": step})
        place.write_completions([{"step": step}], step)
        if step == 2:
            at_checkpoint = place.lengths()
    place.close()
    again = RunFolder(tmp_path)
    again.rewind(2, at_checkpoint)
    assert [row["step"] for row in again.read_log("metrics.jsonl")] == [1, 2]
    assert pyarrow.parquet.read_table(tmp_path / "completions").column("step").to_pylist() == [1, 2]
    again.rewind(0, {})
    assert again.read_log("metrics.jsonl") == [] and not list((tmp_path / "completions").iterdir())


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


def test_two_processes_do_not_share_a_folder(tmp_path):
    first = RunFolder(tmp_path)
    first.claim(VALUES)
    with pytest.raises(UserError, match="another process is running in"):
        RunFolder(tmp_path).claim(VALUES)


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run folder"):
        RunFolder(tmp_path / "file" / "run").claim(VALUES)


def test_metrics_are_on_disk_at_once(tmp_path):
    place = RunFolder(tmp_path)
    place.log("metrics.jsonl", {"step": 1, "loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}  # still open
    place.close()


def test_completions_survive_a_crash_and_are_merged(tmp_path):
    place = RunFolder(tmp_path)
    place.write_completions([{"step": 1, "completion": "six"}], 1)
    place.write_completions([{"step": 2, "completion": "nine"}], 2)
    assert pyarrow.parquet.read_table(tmp_path / "completions").num_rows == 2
    place.merge_completions()
    assert pyarrow.parquet.read_table(tmp_path / "completions.parquet").to_pylist() == [
        {"step": 1, "completion": "six"},
        {"step": 2, "completion": "nine"},
    ]
    assert (tmp_path / "completions").exists(), "needed until the result is there"


PREDICTION = Prediction(
    "7", "six", "six", "six", True, True, True, True, 2, False, ("six", "one"), (0.75, 0.25), (0.5, 0.5)
)


def test_a_finished_split_is_read_back_as_it_was(tmp_path):
    said = {"candidates": [["six", "nine"], []], "agrees": [True, None]}
    place, found = RunFolder(tmp_path), Answers([PREDICTION, replace(PREDICTION, choices=())], 1.5, 0.25, said)
    assert place.read_predictions("eval", "test") is None
    place.write_predictions("eval", "test", found)
    assert place.read_predictions("eval", "test") == found


def test_predictions_hold_both_phases(tmp_path):
    place = RunFolder(tmp_path)
    for phase in ("zero_shot", "eval"):
        place.write_predictions(phase, "test", Answers([PREDICTION], 1.0, 0.0))
    place.merge_predictions()
    rows = pyarrow.parquet.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert {row["phase"] for row in rows} == {"zero_shot", "eval"} and rows[0]["answer"] == "six"


def test_predictions_hold_probabilities_in_single_precision(tmp_path):
    for phase, prediction in (("with", PREDICTION), ("without", Prediction(*list(vars(PREDICTION).values())[:10]))):
        place = RunFolder(tmp_path / phase)
        place.path.mkdir()
        place.write_predictions("eval", "test", Answers([prediction], 1.0, 0.0))
        place.merge_predictions()
    table, bare = (pyarrow.parquet.read_table(tmp_path / name / "predictions.parquet") for name in ("with", "without"))
    assert table.schema == bare.schema, "the same columns with and without label scoring"
    assert table.schema.field("probabilities").type == table.schema.field("probabilities_raw").type
    assert table.schema.field("probabilities").type.value_type == pyarrow.float32()
    (row,) = table.to_pylist()
    assert row["choices"] == ["six", "one"] and row["probabilities"] == [0.75, 0.25]
    assert bare.to_pylist()[0]["probabilities"] == []


def test_the_parts_go_when_the_result_is_there(tmp_path):
    place = RunFolder(tmp_path)
    place.write_completions([{"step": 1}], 1)
    place.write_predictions("eval", "test", Answers([PREDICTION], 1.0, 0.0))
    for _ in range(2):  # as if the program had died in between
        place.merge_completions()
        place.merge_predictions()
    names = [field.name for field in fields(Result) if field.default is MISSING and field.default_factory is MISSING]
    place.write_result(Result(**dict.fromkeys(names, "")))
    assert {path.name for path in tmp_path.iterdir()} == {"completions.parquet", "predictions.parquet", "metrics.json"}
    assert pyarrow.parquet.read_table(tmp_path / "completions.parquet").num_rows == 1


def test_parts_join_where_a_column_has_no_value_in_one(tmp_path):
    place = RunFolder(tmp_path)
    for update, value in ((25, None), (50, 0.5), (75, None)):
        place.write_completions([{"step": update, "rewards/judge": value}], update)
    place.merge_completions()
    rows = pyarrow.parquet.read_table(tmp_path / "completions.parquet").to_pylist()
    assert [row["rewards/judge"] for row in rows] == [None, 0.5, None]
