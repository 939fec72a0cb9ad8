"""Whole runs of few-shot learners, and of ALERT over their candidates, also killed and resumed. Random small encoders."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pyarrow.parquet
import pytest
import torch
from rich.console import Console

from common.data import idx
from common.data.listing import Location
from common.few_shot import candidates
from common.report import compare, folders, tables
from common.report.html import run_page
from common.run.result import Result
from tests.faults import Kill

pytestmark = pytest.mark.slow

CLIP = ["clip.load=tests.encoders.load", "clip.views=2", "visual.views=2"]
SHORT = ["data=fashion", "shots=8", "checkpoint.every=2", "tracking=none"]
CAFO = ["few_shot.epochs=5", "few_shot.key_views=2"]
TESTED = 12  # images of each class


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The embedded slice of Fashion-MNIST with fewer test images."""
    folder = tmp_path_factory.mktemp("small")
    for path in idx.EMBEDDED.glob("train*"):
        shutil.copy(path, folder)
    source = idx.read(Location("x", folder, idx.EMBEDDED), [str(label) for label in range(10)])
    chosen = [item for label in range(10) for item in [i for i in source.test if i.label == label][:TESTED]]
    pixels = b"".join(source.images.content(item.image) for item in chosen)
    for kind, shape, content in (
        ("images-idx3", (len(chosen), 28, 28), pixels),
        ("labels-idx1", (len(chosen),), bytes(item.label for item in chosen)),
    ):
        head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        (folder / f"t10k-{kind}-ubyte").write_bytes(head + content)
    return f"data.folder={folder}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def whole(runner, cache, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few-shot") / "run"
    assert runner(folder, ["method=cafo", *CLIP, *SHORT, *CAFO, small, cache]) == 0
    return folder


def predictions(folder):
    return pyarrow.parquet.read_table(folder / "predictions.parquet").to_pylist()


def test_a_run_has_everything_that_other_runs_have(whole):
    result = Result.load(whole)
    assert (result.method, result.model, result.train["updates"]) == ("cafo", "features", 5)
    assert result.weights["sha256"].startswith("test-") and "pixels-16" in result.weights["sha256"]
    after = result.after["test"]
    assert after.accuracy > 0.4 > result.before["test"].accuracy, "pixels of 8 shots know clothes"
    assert after.well_formed is None and after.probability.top1 == pytest.approx(after.accuracy)
    rows = [row for row in predictions(whole) if row["phase"] == "after" and row["split"] == "test"]
    assert np.mean([row["correct"] for row in rows]) == pytest.approx(after.accuracy)
    assert np.mean([row["truth_rank"] == 1 for row in rows]) == pytest.approx(after.accuracy)
    recalls = [after.facts["draft"][f"recall@{k}"] for k in (1, 2, 3, 4, 5, 8, 16)]
    assert recalls == sorted(recalls) and recalls[0] == pytest.approx(after.accuracy) and recalls[-1] == 1.0
    for name in (
        "curves.png",
        "confusion-test.png",
        "manifest.json",
        "model/few_shot.pt",
        "candidates/test.npz",
        "curves.svg",
        "confusion-test.svg",
    ):
        assert (whole / name).is_file(), name
    facts = json.loads((whole / "candidates" / "test.json").read_text())
    assert facts["chosen"] == after.facts["chosen"] and set(facts["chosen"]) >= {"alpha", "beta", "epoch"}
    assert "chosen" not in result.before["test"].facts
    assert facts["manifest"] == json.loads((whole / "manifest.json").read_text())["hash"]
    assert facts["method"] == "cafo" and facts["selection"] == "val" and facts["recall@2"] == recalls[1]


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(Kill("common.few_shot.heads.base:GradientHead.step", 4, after=True), marks=pytest.mark.faults),
        pytest.param(Kill("common.few_shot.learner:FeatureExtractor.support", 1), marks=pytest.mark.faults),
        pytest.param(Kill("common.few_shot.encoders.store:Store.add", 3), marks=pytest.mark.faults),
        pytest.param(
            Kill("common.few_shot.heads.tip_adapter:TrainedKeys.end", 1, after=True), marks=pytest.mark.faults
        ),
        pytest.param(Kill("common.few_shot.candidates:write_candidates", 4), marks=pytest.mark.faults),
    ],
    ids=["training", "shots", "encoding", "search", "candidates"],
)
def test_a_killed_run_ends_as_if_nothing_had_happened(kill, whole, runner, small, tmp_path):
    arguments = ["method=cafo", *CLIP, *SHORT, *CAFO, small, f"cache_dir={tmp_path / 'cache'}"]
    assert runner(tmp_path / "run", arguments, kill) == -9
    assert runner(tmp_path / "run", arguments) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    ours, theirs = (torch.load(f / "model" / "few_shot.pt", weights_only=False) for f in (tmp_path / "run", whole))
    for name, value in theirs["module"].items():
        assert torch.equal(ours["module"][name], value)
    assert ours["mix"] == theirs["mix"] and predictions(tmp_path / "run") == predictions(whole)


@pytest.mark.faults
def test_two_ranks_give_what_one_gives(whole, runner, small, tmp_path):
    arguments = ["method=cafo", *CLIP, *SHORT, *CAFO, small, f"cache_dir={tmp_path / 'cache'}"]
    assert runner.ranks(2, tmp_path / "run", arguments) == [0, 0]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    ours, theirs = (f / "candidates" / "test" for f in (tmp_path / "run", whole))
    assert candidates.identity(ours) == candidates.identity(theirs)


@pytest.fixture(scope="module")
def alert(untrained_folders, small):
    return [
        "method=alert",
        f"model.path={untrained_folders['gemma3']}",
        "model.dtype=float32",
        "model.image_size=32",
        "model.load_in_8bit=false",
        "model.gradient_checkpointing=false",
        "model.lora.r=0",
        "model.freeze_vision=false",
        "gpus=0",
        "method.instruction=short",
        "rewards=alert_no_judge",
        "trainer.updates=2",
        "trainer.prompts_per_forward=4",
        "rollout.max_completion_tokens=8",
        "rollout.evaluation_batch=64",
        "label_scoring=false",
        *SHORT,
        small,
    ]


@pytest.fixture(scope="module")
def over_cafo(alert, runner, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("over-cafo") / "run"
    assert runner(folder, [*alert, "few_shot=cafo", "method.draft=few_shot", *CLIP, *CAFO, cache]) == 0
    return folder


def test_alert_fits_its_draft_first_and_asks_about_its_candidates(over_cafo):
    draft = Result.load(over_cafo).after["test"].facts["draft"]
    assert draft["method"] == "cafo" and draft["presence"] == draft["recall@2"] > draft["recall@1"] > 0.4
    facts = json.loads((over_cafo / "draft" / "candidates" / "test.json").read_text())
    assert facts["recall@1"] == draft["recall@1"]
    with np.load(over_cafo / "draft" / "candidates" / "test.npz") as arrays:
        best = {
            str(i): [facts["names"][c] for c in row[:2]]
            for i, row in zip(arrays["image_id"], arrays["topk_idx"], strict=False)
        }
    rows = [row for row in predictions(over_cafo) if (row["phase"], row["split"]) == ("after", "test")]
    assert {row["image"]: row["candidates"] for row in rows} == best
    log = [json.loads(line) for line in (over_cafo / "draft" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5] and "loss" in log[0]


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(Kill("common.few_shot.heads.base:GradientHead.step", 4), marks=pytest.mark.faults),
        pytest.param(Kill("common.few_shot.learner:FewShotLearner.predict", 1), marks=pytest.mark.faults),
        pytest.param(Kill("common.training.grpo.trainer:GRPOTrainer._update", 1), marks=pytest.mark.faults),
    ],
    ids=["draft", "candidates", "alert"],
)
def test_alert_killed_in_its_draft_ends_as_if_nothing_had_happened(kill, alert, over_cafo, runner, tmp_path):
    arguments = [*alert, "few_shot=cafo", "method.draft=few_shot", *CLIP, *CAFO, f"cache_dir={tmp_path / 'cache'}"]
    assert runner(tmp_path / "run", arguments, kill) == -9
    assert runner(tmp_path / "run", arguments) == 0
    for name in ("metrics.jsonl", "draft/metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (over_cafo / name).read_bytes(), name
    ours, theirs = (f / "draft" / "candidates" / "test" for f in (tmp_path / "run", over_cafo))
    assert candidates.identity(ours) == candidates.identity(theirs)
    assert predictions(tmp_path / "run") == predictions(over_cafo)


def test_alert_takes_the_folder_of_a_finished_run(alert, runner, whole, cache, tmp_path):
    arguments = [*alert, "method.draft=file", f"method.draft_file={whole}", cache]
    assert runner(tmp_path / "run", [*arguments, "trainer.updates=1"]) == 0
    draft = Result.load(tmp_path / "run").after["test"].facts["draft"]
    assert draft["recall@2"] == Result.load(whole).after["test"].facts["draft"]["recall@2"]


@pytest.mark.parametrize("method", ["clip_zero_shot", "coop", pytest.param("vt_clip", marks=pytest.mark.faults)])
def test_learners_that_read_are_tested_on_new_classes(method, runner, small, cache, tmp_path):
    short = [] if method == "clip_zero_shot" else ["few_shot.epochs=2"]
    arguments = [f"method={method}", "setting=base_to_new", *CLIP, *SHORT, small, cache, *short]
    assert runner(tmp_path / "run", [*arguments, "shots=4"]) == 0
    result = Result.load(tmp_path / "run")
    assert set(result.final) == {"val", "base", "new"}
    assert [("reconstruction" in remark) for remark in result.remarks] == ([True] if method == "vt_clip" else [])
    tables.show(result, tmp_path / "run", console := Console(record=True, width=120))
    said = console.export_text()
    assert said.count(" †") == (3 if method == "vt_clip" else 0) and ("a reconstruction" in said) == (
        method == "vt_clip"
    )


def test_watched_while_it_is_fitted(whole, runner, small, cache, tmp_path):
    """Evaluations on the way change nothing of the result, and write no candidates of a part of the images."""
    watched = [
        *CAFO,
        "method=cafo",
        *CLIP,
        *SHORT,
        small,
        cache,
        "trainer.evaluate_every=2",
        "trainer.evaluate_limit=20",
    ]
    assert runner(tmp_path / "run", watched) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "eval/val/accuracy" in row] == [0, 2, 4, 5]
    before, after = Result.load(whole), Result.load(tmp_path / "run")
    assert after.after["test"].accuracy == before.after["test"].accuracy
    assert after.after["test"].facts["draft"] == before.after["test"].facts["draft"]


def test_selection_by_the_test_images_is_said(runner, small, cache, tmp_path):
    arguments = [
        "method=tip_adapter",
        "selection=paper",
        "validation=none",  # else alpha and beta are searched on those
        *CLIP,
        *SHORT,
        small,
        "shots=4",
        "few_shot.key_views=2",
    ]
    assert runner(tmp_path / "run", [*arguments, cache]) == 0
    assert Result.load(tmp_path / "run").remarks == ["selected on the test images"]


def test_a_learner_that_knows_nothing_before_its_fit_has_no_row_of_it(runner, small, cache, tmp_path):
    """Without CLIP every answer would be the first class; then the fit would be "+x points" better than that."""
    arguments = ["method=nearest_mean", "clip=none", "visual=pixels", *SHORT, small, cache]
    assert runner(tmp_path / "run", [*arguments, "tracking.thumbnails=5"]) == 0
    result = Result.load(tmp_path / "run")
    assert result.before == {} and result.overall.keys() == {"after"} and result.train["paired"] == {}
    assert set(result.after) == {"val", "test"} and result.after["test"].accuracy > 0.5
    assert {row["phase"] for row in predictions(tmp_path / "run")} == {"after"}
    assert run_page.make(tmp_path / "run").is_file() and (tmp_path / "run" / "thumbnails.parquet").is_file()
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 1], "the fit, and what it is worth"
    tables.show(result, tmp_path / "run", console := Console(record=True, width=120))
    said = console.export_text()
    assert "zero-shot" not in said and "McNemar" not in said and "test, trained" in said
    (row,) = [row for row in compare.build(folders.group([folders.read_run(tmp_path / "run")])).rows if "test" in row]
    assert row[compare.COLUMNS.index("before")] == "–"
