"""Two processes on the CPU against one: the same samples, rewards and, up to the order of sums, gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow.parquet
import pytest
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.faults import Kill, Runner

pytestmark = pytest.mark.slow

TWO_RANKS = """
import sys
from pathlib import Path
import hydra
from common import config as configuration
from common.launch import start_ranks
from common.run_folder import RunFolder

if __name__ == "__main__":
    configuration.register()
    with hydra.initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        cfg = hydra.compose("config", sys.argv[2:])
    config, values, folder = configuration.validate(cfg), configuration.plain(cfg), Path(sys.argv[1])
    RunFolder(folder).claim(values)
    start_ranks(2, config, values, folder)
"""


def test_two_ranks_equal_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    overrides = [
        "trainer.updates=4",
        "trainer.evaluate_every=2",
        "trainer.evaluate_limit=101",
        "trainer.prompts_per_forward=3",
        "tracking=none",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for command in (
        [sys.executable, str(script), str(tmp_path / "two"), *overrides],
        [sys.executable, "run.py", f"hydra.run.dir={tmp_path / 'one'}", *overrides],
    ):
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    rows = {}
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]
    assert len(rows["one"]) == len(rows["two"])
    for one, two in zip(rows["one"], rows["two"], strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key
    scored = [pyarrow.parquet.read_table(tmp_path / name / "predictions.parquet") for name in ("one", "two")]
    for one, two in zip(*(table.to_pylist() for table in scored), strict=True):
        assert (one["image"], one["choices"]) == (two["image"], two["choices"])
        assert two["probabilities"] == pytest.approx(one["probabilities"], abs=1e-3)
    sampled = [
        pyarrow.parquet.read_table(tmp_path / name / "completions.parquet").to_pylist() for name in ("one", "two")
    ]
    one, two = ({(row["step"], row["image"], row["completion"]) for row in rows} for rows in sampled)
    assert one == two and len(sampled[0]) == len(sampled[1]) == 4 * 16 * 8


@pytest.fixture(scope="module")
def runner():
    return Runner()


@pytest.fixture(scope="module")
def job(untrained_folders):
    """Arguments of five updates on the untrained model."""
    return [
        "model.recipe=null",
        f"model.path={untrained_folders['qwen2_vl']}",
        "trainer.updates=5",
        "trainer.schedule=constant",
        "trainer.warmup_ratio=0",
        "trainer.prompts_per_forward=3",
        "trainer.evaluate_every=0",
        "trainer.beta=0.04",
        "trainer.zero_variance=keep",
        "checkpoint.every=2",
        "rollout.max_completion_tokens=8",
        "rewards=none",
        "+rewards.short={weight:1.0,fn:tests.rewards.shorter}",
        "label_scoring=false",
        "shots=170",
        "tracking=none",
    ]


def trained(folder):
    name = "adapter_model" if (folder / "model" / "adapter_config.json").is_file() else "model"
    return load_file(folder / "model" / f"{name}.safetensors")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one, two):
    """Every metric to 1e-3, every weight to 1 % of what five updates at 1e-3 can move it.

    Two ranks add the same gradients in another order, so they differ by rounding (1e-7 relative), which AdamW scales
    up where a gradient is itself near zero: its first steps have the size of the learning rate whatever the gradient.
    """
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a == {key: pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in b.items()}
    first, second = trained(one), trained(two)
    assert first.keys() == second.keys()
    moved = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert moved <= 5e-5


@pytest.mark.parametrize("adapters", [[], ["model.lora.r=4"]], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_train_as_one(runner, job, tmp_path, stage, adapters):
    changes = [f"deepspeed=zero{stage}", *adapters]
    if stage == 3:  # shard really, small as the tensors are
        changes.append("+deepspeed.zero_optimization.stage3_param_persistence_threshold=0")
    assert runner(tmp_path / "one", [*job, *changes]) == 0
    assert runner.ranks(2, tmp_path / "two", [*job, *changes]) == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_two_ranks_began_one_can_finish(runner, job, tmp_path, stage):
    changes = [f"deepspeed=zero{stage}"]
    assert runner(tmp_path / "one", [*job, *changes]) == 0
    codes = runner.ranks(2, tmp_path / "two", [*job, *changes], Kill("common.engine:Engine.step", 4))
    assert codes[0] == -9 and codes[1] != 0, "the other rank does not wait for ever"
    assert (tmp_path / "two" / "checkpoints" / "step-000002" / "state.json").is_file()
    assert runner(tmp_path / "two", [*job, *changes]) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_an_error_inside_a_rank_ends_the_job_and_is_shown(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    overrides = [
        "tracking=none",
        "model.lora.r=4",
        "model.lora.targets=nothing",
    ]  # noticed only once the model is loaded
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "two"), *overrides],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("common.types.UserError: model.lora.targets=nothing")
