"""SLURM: what `hydra/launcher=slurm` submits, a sweep that submitit runs on this machine, and tasks of a job. A real one:
tests/test_slurm_jobs.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from common.runtime import slurm
from tests.conftest import REPOSITORY, initialized

DEBUG = """
import runpy, submitit
inner = submitit.AutoExecutor
submitit.AutoExecutor = lambda folder, cluster, **options: inner(folder, cluster="debug", **options)
runpy.run_path("run.py", run_name="__main__")
"""
FAST = ["-m", "method=linear_probe", "clip=none", "visual=pixels", "tracking=none", "shots=2"]


def sweep(folder, *arguments, command=("run.py",)):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *command, *FAST, f"hydra.sweep.dir={folder}", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def results(folder):
    return sorted(json.loads(path.read_text())["seed"] for path in folder.glob("*/metrics.json"))


def test_the_batch_script_asks_for_one_task_per_run_with_its_gpus(tmp_path):
    from hydra import compose
    from submitit.slurm.slurm import _make_sbatch_string

    with initialized():
        cfg = compose("config", ["hydra/launcher=slurm"], return_hydra_config=True).hydra.launcher
    script = _make_sbatch_string(
        command="python -u -m submitit.core._submit",
        folder=tmp_path,
        map_count=33,
        job_name="fewshot",
        time=cfg.timeout_min,
        nodes=cfg.nodes,
        ntasks_per_node=cfg.tasks_per_node,
        gpus_per_node=cfg.gpus_per_node,
        cpus_per_task=cfg.cpus_per_task,
        mem=f"{cfg.mem_gb}GB",
        array_parallelism=cfg.array_parallelism,
        signal_delay_s=cfg.signal_delay_s,
    )
    lines = set(script.splitlines())
    for expected in (
        "#SBATCH --array=0-32%11",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=64",
        "#SBATCH --mem=400GB",
        "#SBATCH --time=720",
        "#SBATCH --signal=USR2@120",
    ):
        assert expected in lines, script
    assert cfg._target_.endswith("SlurmLauncher") and cfg.max_num_timeout == 4


def test_without_the_package_the_command_that_installs_it_is_named():
    hide = "import hydra_plugins, runpy, sys; hydra_plugins.__path__ = []; sys.path.insert(0, '.')"
    run = "runpy.run_path('run.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}\n{run}", *FAST, "hydra/launcher=slurm"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "uv pip install hydra-submitit-launcher" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_without_a_cluster_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = sweep(tmp_path, "hydra/launcher=slurm", "seed=1,2")
    assert done.returncode == 1 and "there is no srun here" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_slurm_launcher_runs_a_sweep_under_submitits_debug_executor(tmp_path):
    done = sweep(tmp_path, "hydra/launcher=slurm", "seed=1,2", command=("-c", DEBUG))
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path) == [1, 2]


@pytest.mark.faults
def test_submitit_runs_three_jobs_on_this_machine(tmp_path):
    done = sweep(tmp_path, "hydra/launcher=submitit_local", "seed=1,2,3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path) == [1, 2, 3]


@pytest.mark.faults
def test_submitit_runs_a_sweep_of_the_papers_with_a_point_that_needs_another(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        """
defaults: [config, {override hydra/sweeper: paper}, {override hydra/launcher: submitit_local}, _self_]
hydra:
  mode: MULTIRUN
  sweeper:
    params: {data: digits, seed: [1, 2], shots: 2, clip: none, visual: pixels}
    named: {first: {method: linear_probe}}
    points: [{use: first}, {use: first, selection: paper, cache_dir: "{first}/cache"}]
    page: {rows: [method], columns: [shots]}
"""
    )
    done = subprocess.run(
        [
            sys.executable,
            "run.py",
            "-cd",
            str(tmp_path),
            "-cn",
            "mine",
            f"hydra.sweep.dir={tmp_path / 'out'}",
            "tracking=none",
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "mine" / "table.csv").is_file()
    assert results(tmp_path / "out") == [1, 1, 2, 2]


@pytest.mark.slow
def test_a_first_node_without_an_address_is_one_line(tmp_path):
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "RANK")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "run.py", f"hydra.run.dir={tmp_path / 'run'}"],
        cwd=REPOSITORY,
        env=environment | step | {"SLURM_STEP_NODELIST": "nowhere.invalid,other"},
        capture_output=True,
        text=True,
    )
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1 and line.startswith(
        "error: the job's first node nowhere.invalid, where its 2 tasks meet"
    )
    assert "MASTER_ADDR" in line and time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("shown", "again"),
    [
        ("JobState=RUNNING Requeue=1 PreemptTime=2026-01-01T10:00:00", True),
        ("JobState=RUNNING Requeue=0 PreemptTime=2026-01-01T10:00:00", False),
        ("JobState=CANCELLED Requeue=1 PreemptEligibleTime=2026-01-01T10:00:00 PreemptTime=None", False),
    ],
    ids=["preempted", "no requeue", "cancelled"],
)
def test_a_preempted_job_is_queued_again(monkeypatch, tmp_path, shown, again):
    """SLURM itself does so only with jobs that it has to kill."""
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\n[ "$1" = requeue ] || echo "{shown}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not slurm.requeue_if_preempted() and not (tmp_path / "asked").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm.requeue_if_preempted() is again
    assert ("requeue 7" in (tmp_path / "asked").read_text().splitlines()) is again
    monkeypatch.setenv("RANK", "1")
    assert not slurm.requeue_if_preempted(), "one rank asks for all"
