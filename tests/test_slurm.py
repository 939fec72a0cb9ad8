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
import torch

from common.config import suggest
from common.runtime import distributed, group, slurm
from common.types import UserError
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


@pytest.mark.slow
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


@pytest.mark.slow
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
@pytest.mark.faults
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


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """`tools("squeue", "lines")`: programs of SLURM; what they were asked is in the file `asked`."""

    def make(name, printed, code=0, error=""):
        tool = tmp_path / name
        tool.write_text(
            f"#!/bin/sh\necho {name} $* >> {tmp_path}/asked\necho '{printed}'\necho '{error}' >&2\nexit {code}\n"
        )
        tool.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    make("scancel", "")
    return make


def looked(*jobs):
    """The states of jobs after a look at the queue."""
    from common.sweep.queue import Queue

    found = Queue()
    found._registered = set(jobs)
    found.update()
    return {job: (found.get_state(job, mode="cache"), found.is_done(job, mode="cache")) for job in jobs}


def test_the_queue_says_where_jobs_stand_without_accounting(tools, capsys):
    states = "7_0|COMPLETED|None\n7_1|RUNNING|None\n7_2|PENDING|Resources\n7_3|PENDING|Resources\n7_4|SUSPENDED|None"
    tools("squeue", states)
    assert looked(*(f"7_{number}" for number in range(6))) == {
        "7_0": ("COMPLETED", True),
        "7_1": ("RUNNING", False),
        "7_2": ("PENDING", False),
        "7_3": ("PENDING", False),
        "7_4": ("RUNNING", False),
        "7_5": ("ENDED", True),  # SLURM has forgotten it
    }
    assert capsys.readouterr().err == "job 7_2 waits: Resources\n", "each reason once"
    tools("squeue", "", code=1, error="slurm_load_jobs error: Invalid job id specified")
    assert looked("7") == {"7": ("ENDED", True)}
    tools("squeue", "", code=1, error="slurm_load_jobs error: Unable to contact slurm controller")
    assert looked("7") == {"7": ("UNKNOWN", False)}, "the controller is away for a moment"


@pytest.mark.parametrize(
    ("reason", "key"),
    [
        ("PartitionTimeLimit", "hydra.launcher.timeout_min"),
        ("PartitionNodeLimit", "hydra.launcher.nodes"),
        ("QOSMaxCpuPerJobLimit", "the values of hydra.launcher"),
        ("AssocMaxWallDurationPerJobLimit", "the values of hydra.launcher"),
        ("AccountNotAllowed", "the values of hydra.launcher"),
        ("Priority", None),
        ("BeginTime", None),
        ("QOSGrpCpuLimit", None),  # until others end
    ],
)
def test_what_can_never_start_is_said_and_cancelled(tools, tmp_path, reason, key):
    tools("squeue", f"7_0|PENDING|{reason}\n7_1|PENDING|{reason}")
    if key is None:
        assert looked("7_0", "7_1")["7_0"] == ("PENDING", False)
    else:
        with pytest.raises(UserError) as error:
            looked("7_0", "7_1")
        assert f"never start job 7_0 ({reason})" in str(error.value) and str(error.value).endswith(f"change {key}")
    assert ("scancel 7" in (tmp_path / "asked").read_text()) is (key is not None)


def test_what_sbatch_refuses_is_one_line():
    refused = RuntimeError(
        "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed"
    )
    said = suggest.explain(refused, [])
    assert said.startswith("SLURM takes no such job (invalid partition specified: nope; Batch job") and "\n" not in said
    assert suggest.explain(RuntimeError("of something else"), []) is None


@pytest.mark.slow
def test_only_slurms_launcher_is_watched(monkeypatch):
    from omegaconf import OmegaConf

    from common.sweep import queue
    from common.sweep.callback import Papers

    seen = []
    monkeypatch.setattr(queue, "watch", lambda: seen.append(True))
    for launcher, watched in (("slurm", 1), ("submitit_local", 1), ("basic", 1)):
        with initialized() as _:
            from hydra import compose

            cfg = compose("config", [f"hydra/launcher={launcher}"], return_hydra_config=True)
        Papers().on_multirun_start(OmegaConf.create({"hydra": OmegaConf.to_container(cfg.hydra, resolve=False)}))
        assert len(seen) == watched


GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", distributed.ALONE)


@pytest.fixture
def alone(monkeypatch):
    """The environment of a process that has run on the CPU, for which it formed a group of its own."""
    for name in GROUP:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards, whoever changes it
        monkeypatch.delenv(name)
    distributed.form_group_alone()
    assert not distributed.started_by_launcher()
    return monkeypatch


def test_ranks_of_a_launcher_that_such_a_process_starts_are_its_ranks(alone):
    """They inherit its variables, but torchrun overwrites those that it sets itself; else they would wait for ever."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        alone.setenv(name, value)
    assert distributed.started_by_launcher() and distributed.rank() == 1
    distributed.forget_group_alone()
    assert os.environ["RANK"] == "1" and os.environ["MASTER_PORT"] == "1"


def test_tasks_of_a_job_step_that_such_a_process_starts_are_its_ranks(alone):
    for name, value in {"STEP_NUM_TASKS": "2", "PROCID": "1", "LOCALID": "1", "STEP_NODELIST": "localhost"}.items():
        alone.setenv(f"SLURM_{name}", value)
    alone.setenv("SLURM_JOB_ID", "3")
    slurm.adopt()
    assert distributed.started_by_launcher() and (distributed.rank(), distributed.world()) == (1, 2)
    assert os.environ["MASTER_ADDR"] == "localhost"


def test_ranks_on_gpus_forget_the_cpu_of_the_process_that_started_them(alone):
    """Else DeepSpeed would train on the CPU."""
    for name, value in {"MASTER_PORT": "1", "LOCAL_RANK": "1", "DS_ACCELERATOR": "cpu"}.items():
        alone.setenv(name, value)
    alone.setattr(torch.cuda, "device_count", lambda: 2)
    alone.setattr(torch.cuda, "set_device", lambda device: None)
    alone.setattr(torch.distributed, "is_initialized", lambda: True)
    assert group.init_process_group(2) == torch.device("cuda", 1) and "DS_ACCELERATOR" not in os.environ
