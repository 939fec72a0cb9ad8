"""What a folder accepts, keeps and refuses."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from common.run.result import Result
from common.run.run_folder import RunFolder
from common.types import Answers, Prediction, Probabilities, Reply, UserError

NEEDED = [field.name for field in fields(Result) if field.default is MISSING and field.default_factory is MISSING]
RESULT = Result(**dict.fromkeys(NEEDED, "x"))
VALUES = {"shots": 4, "seed": 1, "method": {"name": "clsrl"}, "run_name": "a", "tracking": {"mode": "offline"}}


def test_free_folder_then_claimed_then_finished(tmp_path):
    place = RunFolder(tmp_path / "run")
    assert place.finished_result(VALUES) is None
    place.claim(VALUES)
    assert place.finished_result(VALUES) is None, "claimed is not finished"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["shots"] == 4
    place.write_result(RESULT)
    assert place.finished_result(VALUES) == RESULT


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


def test_parts_of_an_earlier_version_lack_columns(tmp_path):
    """A run that it began is finished by this one."""
    place = RunFolder(tmp_path)
    place.write_completions([{"step": 1, "reward": 0.5}], 1)
    place.write_completions([{"step": 2, "judge_reply/judge": "8", "reward": 1.0}], 2)
    place.merge_completions()
    rows = pyarrow.parquet.read_table(tmp_path / "completions.parquet").to_pylist()
    assert rows == [
        {"step": 1, "reward": 0.5, "judge_reply/judge": None},
        {"step": 2, "reward": 1.0, "judge_reply/judge": "8"},
    ]


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


PREDICTION = Prediction("7", "six", 6, "six", True, True, Reply("six", 2, False, True, True))
OFFERED = Probabilities(
    ("one", "six", "nine"),
    np.array([[1, 0, -1], [2, 1, 0]], np.int32),
    np.array([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25]], np.float32),
    np.array([[0.5, 0.5, 0.0], [0.125, 0.75, 0.125]], np.float32),
    np.array([[-0.5, -2.0, -np.inf], [-300.0, -0.25, -0.5]], np.float32),
)


def test_a_finished_split_is_read_back_as_it_was(tmp_path):
    said = {"candidates": [["six", "nine"], []], "agrees": [True, None]}
    silent = replace(PREDICTION, reply=None, answer="", correct=False)
    files, given = RunFolder(tmp_path), Answers([PREDICTION, silent], 1.5, OFFERED, 0.25, said)
    assert files.read_predictions("after", "test") is None
    files.write_predictions("after", "test", given)
    read = files.read_predictions("after", "test")
    assert read.predictions == given.predictions and read.columns == said
    assert (read.seconds, read.scoring_seconds, read.probabilities.names) == (1.5, 0.25, OFFERED.names)
    for name in ("classes", "values", "raw", "logs"):
        assert np.array_equal(getattr(read.probabilities, name), getattr(OFFERED, name))


@pytest.mark.parametrize(
    "probabilities", [None, replace(OFFERED, raw=None, logs=None)], ids=["none", "neither raw ones nor logarithms"]
)
def test_what_is_not_there_is_read_back_as_not_there(probabilities, tmp_path):
    files = RunFolder(tmp_path)
    files.write_predictions("after", "test", Answers([PREDICTION] * 2, 1.0, probabilities))
    read = files.read_predictions("after", "test").probabilities
    if probabilities is None:
        assert read is None
    else:
        assert read.raw is None and read.logs is None and np.array_equal(read.values, OFFERED.values)


def test_predictions_hold_both_phases(tmp_path):
    files = RunFolder(tmp_path)
    for phase in ("before", "after"):
        files.write_predictions(phase, "test", Answers([PREDICTION], 1.0))
    files.merge_predictions()
    rows = pyarrow.parquet.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert {row["phase"] for row in rows} == {"before", "after"} and rows[0]["answer"] == "six"


def test_predictions_hold_probabilities_in_single_precision(tmp_path):
    for phase, probabilities in (("with", OFFERED), ("without", None)):
        files = RunFolder(tmp_path / phase)
        files.path.mkdir()
        files.write_predictions("after", "test", Answers([PREDICTION] * 2, 1.0, probabilities))
        files.merge_predictions()
    table, bare = (pyarrow.parquet.read_table(tmp_path / name / "predictions.parquet") for name in ("with", "without"))
    assert table.schema == bare.schema, "the same columns with and without label scoring"
    assert table.schema.field("probabilities").type == table.schema.field("probabilities_raw").type
    assert table.schema.field("probabilities").type.value_type == pyarrow.float32()
    first, second = table.to_pylist()
    assert first["choices"] == ["six", "one"] and first["probabilities"] == [0.75, 0.25], "as long as the prompt's list"
    assert second["choices"] == ["nine", "six", "one"]
    assert bare.to_pylist()[0]["probabilities"] is None


def test_the_parts_go_when_the_result_is_there(tmp_path):
    place = RunFolder(tmp_path)
    place.write_completions([{"step": 1}], 1)
    place.write_predictions("after", "test", Answers([PREDICTION], 1.0))
    for _ in range(2):  # as if the program had died in between
        place.merge_completions()
        place.merge_predictions()
    place.write_result(RESULT)
    assert {path.name for path in tmp_path.iterdir()} == {"completions.parquet", "predictions.parquet", "metrics.json"}
    assert pyarrow.parquet.read_table(tmp_path / "completions.parquet").num_rows == 1


def test_parts_join_where_a_column_has_no_value_in_one(tmp_path):
    place = RunFolder(tmp_path)
    for update, value in ((25, None), (50, 0.5), (75, None)):
        place.write_completions([{"step": update, "rewards/judge": value}], update)
    place.merge_completions()
    rows = pyarrow.parquet.read_table(tmp_path / "completions.parquet").to_pylist()
    assert [row["rewards/judge"] for row in rows] == [None, 0.5, None]
