"""Two processes on the CPU against one: the same samples, rewards and, up to the order of sums, gradients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pyarrow.parquet
import pytest
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.faults import Kill

pytestmark = pytest.mark.slow

TWO_RANKS = """
import sys
from pathlib import Path
import hydra
from common.config import composition as configuration
from common.launch import start_ranks
from common.run.run_folder import RunFolder

if __name__ == "__main__":
    configuration.register()
    with hydra.initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        cfg = hydra.compose("config", sys.argv[2:])
    config, folder = configuration.validate(cfg), Path(sys.argv[1])
    RunFolder(folder).claim(configuration.values_of(config))
    start_ranks(2, config, folder)
"""


@pytest.fixture(scope="module")
def job(untrained_folders):
    """Arguments of five updates on the untrained model."""
    return [
        "model.recipe=null",
        f"model.path={untrained_folders['qwen2_vl']}",
        "trainer.updates=5",
        "trainer.learning_rate=1e-4",
        "trainer.schedule=constant",
        "trainer.warmup_ratio=0",
        "trainer.prompts_per_forward=3",
        "trainer.evaluate_every=2",
        "trainer.evaluate_limit=21",
        "trainer.beta=0.04",
        "trainer.zero_variance=keep",
        "checkpoint.every=2",
        "rollout.max_completion_tokens=8",
        "rewards=none",
        "+rewards.short={weight:1.0,fn:tests.rewards.shorter}",
        "label_scoring=false",
        "setting.test_per_class=5",
        "tracking=none",
    ]


def trained(folder):
    name = "adapter_model" if (folder / "model" / "adapter_config.json").is_file() else "model"
    return load_file(folder / "model" / f"{name}.safetensors")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sampled(folder):
    path = folder / "completions.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist() if path.is_file() else []
    return sorted((row["step"], row["image"], row["completion"]) for row in rows)


def answered(folder):
    rows = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pylist()
    return [(row["phase"], row["image"], row["answer"]) for row in rows]


def assert_same_run(one, two):
    """The same samples and answers in the same order, every metric to 1e-3, every weight to 5 % of what five updates
    at 1e-4 can move it.

    Two ranks add the same gradients in another order, so they differ by rounding (1e-7 relative), which AdamW scales
    up where a gradient is itself near zero: its first steps have the size of the learning rate whatever the gradient.
    """
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a == {key: pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in b.items()}
    assert sampled(one) == sampled(two) and answered(one) == answered(two)
    first, second = trained(one), trained(two)
    assert first.keys() == second.keys()
    moved = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert moved <= 2.5e-5


@pytest.fixture(scope="module")
def alone(runner, job, tmp_path_factory):
    """The run on one rank without ZeRO, by arguments; made when first asked for."""
    folders = {}

    def run(*changes):
        if changes not in folders:
            folders[changes] = tmp_path_factory.mktemp("alone") / "run"
            assert runner(folders[changes], [*job, "deepspeed=zero0", *changes]) == 0
        return folders[changes]

    return run


# shard really, small as the tensors are
STAGES = {
    0: ["deepspeed=zero0"],
    2: ["deepspeed=zero2"],
    # chunks of four rows: ranks have different numbers of tokens, and every projection gathers weights
    3: ["deepspeed=zero3", "+deepspeed.zero_optimization.stage3_param_persistence_threshold=0", "trainer.head_chunk=4"],
}


IN_EVERY_TEST_RUN = {(2, "full")}  # the others in make test-faults


@pytest.mark.parametrize(
    ("stage", "weights"),
    [
        pytest.param(stage, weights, marks=() if (stage, weights) in IN_EVERY_TEST_RUN else pytest.mark.faults)
        for stage in STAGES
        for weights in ("full", "lora")
    ],
)
def test_two_ranks_train_as_one(runner, job, alone, tmp_path, stage, weights):
    adapters = ["model.lora.r=4"] if weights == "lora" else []
    assert runner.ranks(2, tmp_path / "two", [*job, *STAGES[stage], *adapters]) == [0, 0]
    assert_same_run(alone(*adapters), tmp_path / "two")


@pytest.fixture(scope="module")
def alert(untrained_folders):
    """What makes the job one of ALERT: adapters and a bank that learns ten times as fast."""
    return (
        "method=alert",
        f"model.path={untrained_folders['gemma3']}",
        "model.dtype=float32",
        "model.image_size=32",
        "model.load_in_8bit=false",
        "model.lora.r=4",
        "method.instruction=short",
        "trainer.learning_rate=1e-3",
        "trainer.embedding_learning_rate=1e-2",
        "gpus=0",
    )


def assert_same_bank(one, two):
    """The same first bank to the bit; the last one to 1 % of what five updates can move it."""
    first, second = (folder / "model" / "embeddings" for folder in (one, two))
    assert (first / "begun.safetensors").read_bytes() == (second / "begun.safetensors").read_bytes()
    begun = load_file(first / "begun.safetensors")["begun"]
    ended = [load_file(folder / "bank.safetensors")["entries"] for folder in (first, second)]
    assert float((ended[0] - begun).abs().amax((1, 2)).min()) > 1e-3, "every category has moved"
    assert float((ended[0] - ended[1]).abs().max()) <= 5e-4


@pytest.mark.faults
@pytest.mark.parametrize(("stage", "where"), [*((stage, "device") for stage in STAGES), (2, "host"), (3, "host")])
def test_two_ranks_train_alert_as_one(runner, job, alert, alone, tmp_path, stage, where):
    """Also with a bank on the host, against one on the device."""
    assert runner.ranks(2, tmp_path / "two", [*job, *STAGES[stage], *alert, f"trainer.embeddings={where}"]) == [0, 0]
    assert_same_run(alone(*alert), tmp_path / "two")
    assert_same_bank(alone(*alert), tmp_path / "two")


@pytest.mark.faults
@pytest.mark.parametrize("where", ["device", "host"])
def test_what_two_ranks_began_of_alert_one_can_finish(runner, job, alert, alone, tmp_path, where):
    arguments = [*job, *STAGES[2], *alert, f"trainer.embeddings={where}"]
    codes = runner.ranks(2, tmp_path / "two", arguments, Kill("common.training.engine:Engine.step", 4))
    assert codes[0] == -9 and codes[1] != 0
    assert (tmp_path / "two" / "checkpoints" / "step-000002" / "state.json").is_file()
    assert runner(tmp_path / "two", arguments) == 0
    assert_same_run(alone(*alert), tmp_path / "two")
    assert_same_bank(alone(*alert), tmp_path / "two")


@pytest.mark.faults
def test_ranks_that_miss_different_features_stay_in_step(runner, job, tmp_path):
    vision = ["model.freeze_vision=true", "model.feature_cache_gb=0.1", f"cache_dir={tmp_path / 'cache'}"]
    only_grpo = ("rewards", "trainer.beta", "trainer.zero_variance", "trainer.head_chunk")
    changes = [part for part in [*job, *STAGES[3], *vision] if not part.lstrip("+").startswith(only_grpo)]
    changes.append("method=sft")
    assert runner.ranks(2, tmp_path / "first", changes) == [0, 0]
    for path in sorted((tmp_path / "cache").rglob("*.safetensors"))[::2]:
        path.unlink()
    assert runner.ranks(2, tmp_path / "second", changes) == [0, 0]
    assert_same_run(tmp_path / "first", tmp_path / "second")


BEGUN = {**{str(stage): changes for stage, changes in STAGES.items()}, "2, lora": [*STAGES[2], "model.lora.r=4"]}


@pytest.mark.faults
@pytest.mark.parametrize("name", BEGUN)
def test_what_two_ranks_began_one_can_finish(runner, job, alone, tmp_path, name):
    changes = BEGUN[name]
    codes = runner.ranks(2, tmp_path / "two", [*job, *changes], Kill("common.training.engine:Engine.step", 4))
    assert codes[0] == -9 and codes[1] != 0, "the other rank does not wait for ever"
    assert (tmp_path / "two" / "checkpoints" / "step-000002" / "state.json").is_file()
    assert runner(tmp_path / "two", [*job, *changes]) == 0
    assert_same_run(alone(*(["model.lora.r=4"] if "lora" in name else [])), tmp_path / "two")


@pytest.mark.faults
def test_an_error_inside_a_rank_ends_the_job_and_is_shown(untrained_folder, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    overrides = [
        "tracking=none",
        f"model.path={untrained_folder}",
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


@pytest.fixture
def two_ranks(tmp_path):
    """Starts a run of two ranks by torch elastic; `alive()` counts its processes, found by their environment."""
    script, marker = tmp_path / "two.py", f"{os.getpid()}-{tmp_path.name}"
    script.write_text(TWO_RANKS)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "FEWSHOT_TEST": marker}

    def start(*overrides):
        command = [sys.executable, str(script), str(tmp_path / "two"), *overrides]
        return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, env=environment)

    def alive():
        return [p.pid for p in psutil.process_iter() if _environment(p).get("FEWSHOT_TEST") == marker]

    yield start, alive
    for pid in alive():
        os.kill(pid, signal.SIGKILL)


def _environment(process):
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except psutil.Error:
        return {}


def gone(alive, seconds=30):
    """Whether all processes end within some time."""
    end = time.monotonic() + seconds
    while alive() and time.monotonic() < end:
        time.sleep(0.2)
    return not alive()


@pytest.mark.faults
def test_a_rank_that_dies_ends_the_job_and_leaves_no_orphan(two_ranks, job):
    start, alive = two_ranks
    mine = [part.replace("shorter", "rank_1_dies_in_the_second_update") for part in job]
    process = start(*mine)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "Signal 9 (SIGKILL)" in said and "rank      : 1" in said, said[-3000:]
    assert gone(alive)


@pytest.mark.faults
def test_ranks_end_with_the_process_that_started_them(two_ranks, job, tmp_path):
    start, alive = two_ranks
    process = start(*job, "trainer.updates=100000")
    log = tmp_path / "two" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") > 2):
        time.sleep(0.2)
    assert len(alive()) >= 3
    process.kill()
    process.wait()
    assert gone(alive)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_asked_to_stop_all_ranks_stop_at_one_update_and_the_launcher_ends(two_ranks, job, tmp_path, number):
    start, alive = two_ranks
    process = start(*job, "trainer.updates=100000", "checkpoint.every=0", "trainer.evaluate_every=0")
    log = tmp_path / "two" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") > 2):
        time.sleep(0.2)
    told = [process.pid] if number == signal.SIGTERM else alive()  # a terminal reaches all
    for pid in told:
        os.kill(pid, number)
    _, said = process.communicate(timeout=120)
    assert "Interrupted: stopped after update" in said.strip().splitlines()[-1], said[-3000:]
    (kept,) = (tmp_path / "two" / "checkpoints").iterdir()
    assert kept.name == f"step-{json.loads(log.read_text().splitlines()[-1])['step']:06d}"
    assert gone(alive)


def test_slurm_tasks_form_one_run(runner, job, tmp_path):
    shared = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
    }
    tasks = [{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), **shared} for number in range(2)]
    assert runner.tasks(tasks, tmp_path / "slurm", job) == [0, 0]
    state = json.loads((tmp_path / "slurm" / "checkpoints" / "step-000005" / "state.json").read_text())
    assert state["ranks"] == 2 and len(metrics(tmp_path / "slurm")) == 9
