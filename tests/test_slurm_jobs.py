"""Jobs of a real SLURM (`make test-slurm`): an array, two nodes, a time limit and a preemption, each continued to the
metrics of the run that nobody disturbs. Without SLURM they are skipped; two slurmd on one machine are enough.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.conftest import CACHE, REPOSITORY
from tests.test_slurm import results

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
PATIENCE = 600  # seconds
TRAINING = [
    "trainer.evaluate_every=0",
    "checkpoint.every=0",  # a checkpoint is one of a stop
    "label_scoring=false",
    "tracking=none",
    "doctor=false",
    "setting.test_per_class=5",
    "gpus=0",
    f"cache_dir={CACHE}",
]
REQUEST = [
    "hydra/launcher=slurm",
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=4",
]


def told(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def partitions():
    """The cluster's partitions with their values, the lowest priority first."""
    if shutil.which("sbatch") is None or not told("sinfo", "--noheader"):
        pytest.skip("there is no SLURM here")
    lines = told("scontrol", "show", "partition", "--oneliner").splitlines()
    found = [dict(pair.split("=", 1) for pair in line.split() if "=" in pair) for line in lines]
    return sorted(found, key=lambda each: int(each["PriorityTier"]))


@pytest.fixture(scope="module")
def two_nodes(partitions):
    if len(told("sinfo", "--noheader", "--Node", f"--partition={partitions[0]['PartitionName']}").splitlines()) < 2:
        pytest.skip("there are no two nodes")
    return ["--partition=" + partitions[0]["PartitionName"], "--nodes=2", "--ntasks=2"]


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Jobs take the environment of who submits them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(REPOSITORY)
        yield


def command(folder, updates, *more):
    return [sys.executable, "run.py", f"hydra.run.dir={folder}", f"trainer.updates={updates}", *TRAINING, *more]


def steps(folder):
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.is_file() else []
    return [row["step"] for row in rows if "reward" in row]


def until(condition, what, release=None):
    """Wait; a job that SLURM has queued again waits two minutes unless `release` names it."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: never\n{told('squeue')}"
        if release:
            told("scontrol", "update", f"JobId={release}", "StartTime=now")
        time.sleep(0.5)
    return found


def assert_same(folder, whole):
    assert (folder / "metrics.json").is_file()
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (folder / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(two_nodes, tmp_path_factory):
    """Two nodes train as one, undisturbed."""
    folder = tmp_path_factory.mktemp("two-nodes") / "run"
    done = subprocess.run(
        ["srun", *two_nodes, "--kill-on-bad-exit=1", *command(folder, 12)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_nodes_train_as_one(whole):
    assert steps(whole) == list(range(1, 13))
    assert json.loads((whole / "metrics.json").read_text())["train"]["updates"] == 12


def test_a_preempted_job_is_queued_again_and_goes_on(partitions, two_nodes, whole, tmp_path):
    high = partitions[-1]
    if (
        "partition_prio" not in told("scontrol", "show", "config")
        or high["PriorityTier"] == partitions[0]["PriorityTier"]
    ):
        pytest.skip("no partition preempts another")
    folder, output = tmp_path / "run", tmp_path / "job.log"
    script = tmp_path / "job.sh"
    step = " ".join(["srun", "--kill-on-bad-exit=1", *(f"'{word}'" for word in command(folder, 12))])
    script.write_text(f"#!/bin/bash\n{step}\n")
    asked = ["--parsable", "--requeue", "--exclusive", "--open-mode=append", f"--output={output}"]
    job = told("sbatch", *asked, *two_nodes, str(script)).strip()
    until(lambda: len(steps(folder)) > 2, "the third update")
    higher = ["--parsable", f"--partition={high['PartitionName']}", "--nodes=2", "--exclusive", "--output=/dev/null"]
    other = told("sbatch", *higher, "--wrap=sleep 2").strip()
    until(lambda: not told("squeue", "--noheader", f"--jobs={other}"), "the end of the higher job")
    assert not (folder / "metrics.json").exists(), "it was preempted in time"
    (kept,) = (folder / "checkpoints").iterdir()
    assert kept.name == f"step-{steps(folder)[-1]:06d}", "no update was lost"
    until(lambda: (folder / "metrics.json").is_file(), "the end of the run", release=job)
    until(lambda: not told("squeue", "--noheader", f"--jobs={job}"), "the end of the job")
    assert "SLURM has queued the job again" in output.read_text()
    assert_same(folder, whole)


def sweep(folder, *arguments):
    return subprocess.run(
        [sys.executable, "run.py", "-m", f"hydra.sweep.dir={folder}", *REQUEST, *arguments],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )


def test_an_array_runs_every_point(partitions, tmp_path):
    low = f"hydra.launcher.partition={partitions[0]['PartitionName']}"
    fast = ["method=linear_probe", "clip=none", "visual=pixels", "tracking=none", "shots=2", "seed=1,2"]
    done = sweep(tmp_path, low, "hydra.launcher.timeout_min=20", *fast)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path) == [1, 2]
    assert "sacct" not in done.stderr, "no accounting is needed"


def test_a_job_at_its_time_limit_is_queued_again_and_goes_on(partitions, tmp_path):
    whole, updates = tmp_path / "whole", 400  # longer than the 45 s until the warning
    done = subprocess.run(command(whole, updates), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    low = f"hydra.launcher.partition={partitions[0]['PartitionName']}"
    limit = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=75", "hydra.launcher.max_num_timeout=20"]
    name = ["hydra.sweep.subdir=run", "seed=1", f"trainer.updates={updates}"]
    with subprocess.Popen(
        [sys.executable, "run.py", "-m", f"hydra.sweep.dir={tmp_path}", *REQUEST, low, *limit, *name, *TRAINING],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        folder = tmp_path / "run"
        jobs = until(lambda: re.findall(r"^\d+", told("squeue", "--noheader", "--format=%i", "--me")), "a job")
        until(lambda: launcher.poll() is not None, "the end of the sweep", release=jobs[0])
        assert launcher.returncode == 0, launcher.stdout.read()[-3000:]
    said = "".join(path.read_text() for path in (tmp_path / ".submitit").rglob("*_log.*"))
    assert "Requeued job" in said, "the run was long enough to meet its limit"
    assert "SIGUSR2: stopping after this update" in said
    assert "KeyboardInterrupt" not in said
    assert_same(folder, whole)


@pytest.mark.parametrize("mistake", ["partition", "time"])
def test_an_array_that_can_never_start_is_one_line(partitions, tmp_path, mistake):
    low = partitions[0]
    if mistake == "time" and low["MaxTime"] == "UNLIMITED":
        pytest.skip("the partition has no limit")
    request, expected = {
        "partition": (["hydra.launcher.partition=nowhere"], r"SLURM takes no such job \(.*[Ii]nvalid partition"),
        "time": (
            ["hydra.launcher.timeout_min=99999"],
            "never start job .*PartitionTimeLimit.*timeout_min|no such job .*time limit",
        ),
    }[mistake]
    partition = f"hydra.launcher.partition={low['PartitionName']}"
    began = time.monotonic()
    done = sweep(tmp_path, partition, "hydra.launcher.timeout_min=5", *request, "seed=1,2", "tracking=none")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and re.search(expected, last), last
    assert time.monotonic() - began < 120 and not told("squeue", "--noheader", "--me")
