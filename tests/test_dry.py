"""`dry=true` names what would be refused, without running anything or loading weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import preflight
from common.config.composition import plain, validate
from common.sweep import dry
from common.sweep.plan import Point
from common.sweep.sweeper import Job
from tests.test_cli import run

pytestmark = pytest.mark.slow  # most compose a run and read its data

COST = {"gigabytes": {}, "test": {}, "train": {}}


@pytest.fixture
def runs(compose):
    """Two that are alike and have too long prompts, one that needs the first, a good one, a finished one, and one that
    needs the good one."""
    good = compose("shots=1")
    long = compose("shots=1", "model.max_prompt_tokens=20", "gpus=16")
    values, good, long = plain(good), validate(good), validate(long)
    return [
        dry.Run("long-1", values, long, False, ("long",)),
        dry.Run("long-2", values, long, False, ("long",)),
        dry.Run("good", values, good, False, ("good",)),
        dry.Run("done", values, long, True, ("done",)),
        dry.Run("tested", values, long, False, ("tested",), ("good",)),
        dry.Run("child", values, good, False, ("child",), ("done", "long-1")),
    ]


def test_runs_that_would_be_refused_are_named_with_the_reason(runs, capsys, monkeypatch):
    looked, check = [], preflight.check_data
    monkeypatch.setattr(preflight, "check_data", lambda config: looked.append(config) or check(config))
    found, devices = dry.refusals(runs, here=True)
    assert looked == [runs[0].config, runs[2].config], "once for those that are alike, and for none that needs another"
    assert found.keys() == {"long-1", "long-2", "child"} and found["child"] == "it needs long-1"
    assert found["long-1"] == found["long-2"] and "but model.max_prompt_tokens=20" in found["long-1"]
    assert list(devices.values()) == [3] and "gpus=16, but this machine has" in next(iter(devices))
    assert dry.refusals(runs, here=False)[1] == {}
    capsys.readouterr()
    dry.show(runs, COST)
    shown = capsys.readouterr().out
    states = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in shown.splitlines() if "│" in line}
    assert states == {
        **dict.fromkeys(("long-1", "long-2", "child"), "refused"),
        **dict.fromkeys(("good", "tested"), "to run"),
        "done": "finished",
    }
    assert "2 would be refused, first long-1: the prompt of image" in shown
    assert "on this machine 3 would be refused: gpus=16" in shown and "5 of 6 runs to do" in shown


def test_missing_data_is_seen(compose, monkeypatch):
    monkeypatch.delenv("DATA", raising=False)
    config = validate(compose("method=clsrl", "data=dtd", "model=qwen2_vl_2b", "setting=cross_dataset"))
    assert "data=dtd is read from $DATA" in preflight.refusal(preflight.check_data, config)


def test_a_training_without_validation_images_cannot_be_patient(compose):
    config = validate(compose("shots=1", "trainer.patience=2"))  # digits has none
    assert "trainer.patience=2 stops by validation images" in preflight.refusal(preflight.check_data, config)
    held_out = validate(compose("shots=1", "trainer.patience=2", "validation=held_out"))
    assert preflight.refusal(preflight.check_data, held_out) is None


def test_jobs_that_differ_in_seed_and_shots_are_alike():
    jobs = [
        Job(Point(given), Path("a"), given, {}, (), config=object())
        for given in (
            {"data": "dtd", "shots": "4", "seed": "1"},
            {"data": "dtd", "shots": "8", "seed": "2"},
            {"data": "sun397", "shots": "4", "seed": "1"},
        )
    ]
    alike = [job.shown(finished=False).alike for job in jobs]
    assert alike[0] == alike[1] != alike[2]


@pytest.mark.slow
def test_a_single_run_says_so_too(tmp_path):
    done = run("dry=true", "shots=1", "model.max_prompt_tokens=20", "gpus=16", folder=tmp_path / "run")
    assert done.returncode == 0 and f"{tmp_path}/run: to run" in done.stdout
    assert "it would be refused: the prompt of image" in done.stdout
    assert "it would be refused: gpus=16" in done.stdout
    assert "refused" not in run("dry=true", "shots=1", folder=tmp_path / "run").stdout
