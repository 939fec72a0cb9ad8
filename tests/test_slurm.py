"""`hydra/launcher=slurm`: what is submitted, and a sweep that submitit runs on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

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
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
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
    assert "1, 2, 3" in done.stdout and "95 % interval" in done.stdout, "it ends with its table"


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
