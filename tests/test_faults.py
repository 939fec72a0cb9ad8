"""A run that is killed at any moment and started again ends as if nothing had happened: bit for bit.

One moment is in `make test`, all of them in `make test-faults`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from statistics import fmean

import pyarrow.parquet
import pytest

from common.evaluation.evaluate import evenly_spaced
from tests.faults import Full, Kill

pytestmark = pytest.mark.slow

ROLLOUT = "common.rollout.hf:HFRollout._forward"
UPDATE = "common.training.engine:Engine.backward"
STEP = "common.training.engine:Engine.step"
STATES = "common.training.engine:Engine.save"
RENAME = "os:replace"
ANSWERS = "common.vlm.replies:Replies.__call__"
# Six updates; an evaluation after the 2nd and 4th, a checkpoint after the 2nd, 4th and 6th.
MOMENTS = {
    "zero-shot evaluation": Kill(ROLLOUT, 3),
    "zero-shot evaluation kept": Kill("common.run.run_folder:RunFolder.write_predictions", 1, after=True),
    "before the first update": Kill("common.training.grpo.trainer:GRPOTrainer.step", 1),
    "rollout of the first update": Kill("common.training.grpo.trainer:Sampling.__call__", 1, after=True),
    "rewards of the second update": Kill("common.training.grpo.trainer:GRPOTrainer._score", 2),
    "gradients of the first update": Kill(UPDATE, 1, after=True),
    "first optimizer step done": Kill(STEP, 1, after=True),
    "metrics of an update half recorded": Kill("common.run.run_folder:RunFolder.log", 4),
    "evaluation during training": Kill(ANSWERS, 2),
    "evaluation during training done": Kill(ANSWERS, 2, after=True),
    "completions being written": Kill("common.run.run_folder:RunFolder.write_completions", 1),
    "completions written": Kill("common.run.run_folder:RunFolder.write_completions", 1, after=True),
    "first checkpoint begun": Kill(STATES, 1),
    "first checkpoint half written": Kill(STATES, 1, after=True),
    "first checkpoint before its state": Kill("common.run.checkpoint:_flush", 1),
    "first checkpoint before its rename": Kill("common.run.checkpoint:_flush", 1, after=True),
    "first checkpoint renamed": Kill("common.run.checkpoint:Checkpoints._drop_surplus", 1),
    "second checkpoint half written": Kill(STATES, 2, after=True),
    "a surplus checkpoint half removed": Kill("shutil:rmtree", 4),
    "rollout of the fifth update": Kill("common.training.grpo.trainer:Sampling.__call__", 5),
    "gradients of the fifth update": Kill(UPDATE, 17),
    "last checkpoint before its rename": Kill("common.run.checkpoint:_flush", 3, after=True),
    "training done": Kill("common.run.loop:train", 1, after=True),
    "final weights written": Kill("common.vlm.learner:VLMLearner.save_weights", 4, after=True),
    "final evaluation": Kill(ANSWERS, 4),
    "final evaluation done": Kill(ANSWERS, 4, after=True),
    "tables being merged": Kill("common.run.run_folder:RunFolder.merge_completions", 1, after=True),
    "result not yet written": Kill("common.run.run_folder:RunFolder.write_result", 1),
}
IN_EVERY_TEST_RUN = ("second checkpoint half written",)


@pytest.fixture(scope="module")
def job(untrained_folders, tmp_path_factory):
    """Arguments of a short run on the untrained model, with a reward that it can earn."""
    return [
        "model.recipe=null",
        f"model.path={untrained_folders['qwen2_vl']}",
        "trainer.updates=6",
        "trainer.prompts_per_forward=4",
        "trainer.evaluate_every=2",
        "trainer.evaluate_limit=20",
        "checkpoint.every=3",
        "rollout.max_completion_tokens=8",
        "+rewards.short={weight:1.0,fn:tests.rewards.shorter}",
        "setting.test_per_class=5",
        "tracking=none",
    ]


@pytest.fixture(scope="module")
def whole(runner, job, tmp_path_factory):
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert runner(folder, job) == 0
    return folder


@pytest.fixture(scope="module")
def often(job):
    """The same with three checkpoints, of which one becomes surplus, whatever the evaluations say."""
    return [*job, "checkpoint.every=2"]


@pytest.fixture(scope="module")
def whole_often(runner, often, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert runner(folder, often) == 0
    return folder


def weights(folder):
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def table(folder, name):
    return pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()


def summaries(folder):
    """The result without what depends on the clock and the folder."""
    result = json.loads((folder / "metrics.json").read_text())
    for phase in ("before", "after"):
        for split in result[phase].values():
            split["seconds"] = split["probability"]["seconds"] = 0
    result["train"]["seconds"] = 0
    return result


@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=() if m in IN_EVERY_TEST_RUN else pytest.mark.faults) for m in MOMENTS]
)
def test_killed_and_resumed_equals_undisturbed(runner, often, whole_often, tmp_path, moment):
    folder, whole = tmp_path / "run", whole_often
    assert runner(folder, often, MOMENTS[moment]) == -9, "the moment never came"
    assert not (folder / "metrics.json").exists()
    finished = {path.name for path in (folder / "checkpoints").glob("step-*") if not path.suffix}
    before = {name: json.loads((folder / "checkpoints" / name / "state.json").read_text()) for name in finished}
    assert runner(folder, often) == 0
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert weights(folder) == weights(whole)
    assert table(folder, "completions") == table(whole, "completions")
    assert table(folder, "predictions") == table(whole, "predictions")
    assert summaries(folder) == summaries(whole)
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {path.name for path in (whole / "checkpoints").iterdir()}
    for name in finished & kept:
        assert json.loads((folder / "checkpoints" / name / "state.json").read_text()) == before[name], "written once"


def test_undisturbed_run_keeps_the_best_and_the_last(whole):
    states = [json.loads(path.read_text()) for path in sorted((whole / "checkpoints").glob("*/state.json"))]
    assert len(states) == 2 and states[-1]["update"] == 6
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    seen = {
        line["step"]: line["eval/test/accuracy"] for line in lines if 0 < line["step"] < 6 and "eval/test/n" in line
    }
    before = [row["correct"] for row in table(whole, "predictions") if row["phase"] == "before"]
    seen[0] = fmean(evenly_spaced(before, 20))  # the untrained model may be the best one, which has no checkpoint
    best = max(seen, key=lambda step: (seen[step], -step))
    assert states[0]["update"] == (best or 3) and all(state["best"] == [best, seen[best]] for state in states)
    names = {path.name for path in (whole / "checkpoints").glob("*/*")}
    assert names == {"model", "state.json"}, "a finished run needs no optimizer states"


@pytest.mark.faults
def test_two_kills_in_a_row(runner, job, whole, tmp_path):
    folder = tmp_path / "run"
    assert runner(folder, job, MOMENTS["gradients of the fifth update"]) == -9
    assert runner(folder, job, Kill(STEP, 2)) == -9
    assert runner(folder, job) == 0
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert weights(folder) == weights(whole)


OTHERS = {
    "Gemma, adapters, ZeRO-3": [
        "model.family=gemma3",
        "model.lora.r=4",
        "trainer.beta=0.04",
        "deepspeed=zero3",
        "+deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
    ],
    "reference, two updates per batch, frozen vision with features, ZeRO-0": [
        "trainer.beta=0.04",
        "trainer.num_iterations=2",
        "checkpoint.every=4",
        "model.freeze_vision=true",
        "model.feature_cache_gb=1",
        "deepspeed=zero0",
    ],
    "a batch in three steps, CISPO": [
        "trainer.steps_per_rollout=3",
        "trainer.evaluate_every=3",
        "trainer.loss=common.training.grpo.variants.cispo",
        "checkpoint.every=3",
    ],
    "other images in place of flat groups": ["trainer.zero_variance=refill", "trainer.resample_rounds=2"],
    "SFT, offload": ["method=sft", "rewards=none", "deepspeed=zero2_offload"],
    **{name: [f"method={name}"] for name in ("think_after_answer", "adaptive_thinking", "visual_rft", "refine_rft")},
    "fine_r1": ["method=fine_r1", "checkpoint.every=2"],  # two steps of a batch
}


@pytest.mark.faults
@pytest.mark.parametrize("name", OTHERS)
def test_other_configurations_resume_as_exactly(runner, job, untrained_folders, tmp_path, name):
    arguments = [*job, *OTHERS[name], f"cache_dir={tmp_path / 'cache'}"]
    if "model.family=gemma3" in arguments:
        arguments.append(f"model.path={untrained_folders['gemma3']}")
    if "method=sft" in arguments:
        arguments = [a for a in arguments if "rewards.short" not in a]
    assert runner(tmp_path / "whole", arguments) == 0
    assert runner(tmp_path / "killed", arguments, Kill(STEP, 5)) == -9
    assert runner(tmp_path / "killed", arguments) == 0
    first, second = tmp_path / "whole", tmp_path / "killed"
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    for path in (first / "model").glob("*.safetensors"):
        assert path.read_bytes() == (second / "model" / path.name).read_bytes()
    assert table(first, "predictions") == table(second, "predictions")


@pytest.mark.parametrize(
    "moment",
    [Full("common.vlm.learner:VLMLearner.save_weights", 2), pytest.param(Full(STATES, 2), marks=pytest.mark.faults)],
    ids=["model", "state"],
)
def test_a_full_disk_costs_nothing_that_was_finished(runner, job, whole, tmp_path, moment):
    folder = tmp_path / "run"
    assert runner(folder, job, moment) == 1
    (kept,) = (folder / "checkpoints").iterdir()
    assert kept.name == "step-000003" and (kept / "state.json").is_file(), "what was half written is gone"
    said = (folder / "run.log").read_text()
    assert "the checkpoint after update 6 cannot be written" in said and "step-000003 is whole; free disk space" in said
    assert runner(folder, job) == 0
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert weights(folder) == weights(whole)


def test_a_run_is_not_continued_from_other_weights(runner, job, untrained_folders, tmp_path):
    model = shutil.copytree(untrained_folders["qwen2_vl"], tmp_path / "model")
    arguments = [*job, f"model.path={model}"]
    assert runner(tmp_path / "run", arguments, MOMENTS["rollout of the fifth update"]) == -9
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert runner(tmp_path / "run", arguments) == 1
    assert f"the weights of {model} have changed since this run began" in (tmp_path / "run" / "run.log").read_text()
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_training_stops_at_the_first_number_that_is_none(runner, job, tmp_path):
    folder = tmp_path / "run"
    asked = [part.replace("shorter", "not_a_number_in_the_third_update") for part in job]
    assert runner(folder, [*asked, "checkpoint.every=2"]) == 1
    said = (folder / "run.log").read_text()
    assert "update 3: " in said and "loss" in said and "reward" in said and "not finite" in said
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()][-1] == 2
    (kept,) = (folder / "checkpoints").iterdir()
    assert kept.name == "step-000002" and (kept / "deepspeed").is_dir(), "the last good one stays"
