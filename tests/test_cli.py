"""The command line: bad input is one clear line, at once, and nothing is overwritten."""

from __future__ import annotations

import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO

import pytest
from hydra.core.global_hydra import GlobalHydra

import run as command
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Done:
    """stderr: without what a run says of its progress (tests/test_progress.py)."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str, folder=None) -> Done:
    """The command in this process: a new one would spend four seconds on imports."""
    where = [] if folder is None else [f"hydra.run.dir={folder}"]
    out, err, code = StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(REPOSITORY)
        patch.setattr(sys, "argv", ["run.py", "--config-path", str(REPOSITORY / "conf"), *arguments, *where])
        GlobalHydra.instance().clear()
        try:
            command.run()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
            if isinstance(stop.code, str):
                print(stop.code, file=err)  # as the interpreter does
        finally:
            GlobalHydra.instance().clear()
    progress = ("composing the configuration\n", "run: reading digits\n")
    errors = [line for line in err.getvalue().splitlines(keepends=True) if line not in progress]
    return Done(code, out.getvalue(), "".join(errors))


BAD = {
    "doctor without rewards": (["doctor=true", "trainer=none"], "doctor=true examines GRPO trainings"),
    "unknown key": (["shot=4"], "shot"),
    "appended key": (["+foo=1"], "unknown config key foo"),
    "wrong type": (["shots=four"], "shots=four"),
    "unknown method": (["method=foo"], "Available options in 'method': adaptive_thinking alert alert_sft"),
    "unknown data": (["data=foo"], "Available options in 'data': caltech101 digits"),
    "group of one": (["trainer.group_size=1"], "trainer.group_size=1"),
    "too many shots": (["shots=200"], "class 'eight' has only 174 images"),
    "missing checkpoint": (["model.path=/nonexistent"], "model.path=/nonexistent is not a folder"),
    "over-long prompt": (["model.max_prompt_tokens=20"], "model.max_prompt_tokens=20"),
    "more GPUs than there are": (["gpus=16"], "gpus=16"),
    "8 bits without a GPU": (["model.load_in_8bit=true", "model.lora.r=4"], "model.load_in_8bit=true needs a GPU"),
    "missing reward": (["rewards.equality.fn=common.rewards.nope"], "rewards.equality.fn=common.rewards.nope"),
    "misspelt reward argument": (["+rewards.equality.matc=x"], "matc"),
    "empty rewards": (["rewards=none"], "rewards is empty"),
    "unknown class of method": (["method._target_=clsrl.method.Nope"], "clsrl.method.Nope"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(tmp_path, arguments, message):
    folder = tmp_path / "run"
    done = run(*arguments, folder=folder)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not folder.exists(), "a refused run leaves nothing behind"


def test_corrupt_checkpoint_is_one_line(tmp_path, untrained_folder):
    broken = tmp_path / "checkpoint"
    shutil.copytree(untrained_folder, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:5000])
    done = run(f"model.path={broken}", folder=tmp_path / "run")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{broken}/model.safetensors is damaged" in done.stderr


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = run(folder=tmp_path / "file" / "run")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "cannot create the run folder" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_used_folder_with_another_value_is_refused(tmp_path, compose):
    from common.config import composition as config
    from common.run.run_folder import RunFolder

    RunFolder(tmp_path).claim(config.plain(compose("shots=4")))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = run("shots=8", folder=tmp_path)
    assert done.returncode == 1 and "shots: 4 -> 8" in done.stderr and done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_cfg_job_prints_the_configuration():
    done = run("method=clsrl", "--cfg", "job")
    assert (
        done.returncode == 0 and "clsrl.rewards.format_reward" in done.stdout and "learning_rate: 0.0005" in done.stdout
    )


def test_help_lists_the_groups():
    done = run("--help")
    assert done.returncode == 0
    shown = " ".join(done.stdout.split())
    conf = REPOSITORY / "conf"
    for group in (path for path in conf.rglob("*") if any(path.glob("*.yaml")) and "tune" not in path.parts):
        options = ", ".join(sorted(file.stem for file in group.glob("*.yaml")))
        assert f"{group.relative_to(conf)}: {options}" in shown or group.name == "learners"


def test_shell_completion_script():
    done = run("-sc", "install=bash")
    assert done.returncode == 0 and "complete" in done.stdout


def test_multirun_goes_on_after_a_failed_point(tmp_path):
    done = run("-m", "trainer.group_size=1,0", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${hydra.job.num}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for number, size in enumerate((1, 0)):
        assert f"{number}: error: trainer.group_size={size}" in done.stderr


@pytest.mark.parametrize(
    ("gpus", "message"), [("0", "divisible by the 3 processes"), ("8", "the launcher started 3 processes; use gpus=3")]
)
def test_ranks_that_do_not_fit_are_one_line(tmp_path, monkeypatch, gpus, message):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FEWSHOT_ALONE", raising=False)
    done = run(f"gpus={gpus}", folder=tmp_path / "run")
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_doctor_says_one_line_and_leaves_nothing(tmp_path, untrained_folder):
    done = run("doctor=true", "rollout.top_k=1", f"model.path={untrained_folder}", folder=tmp_path / "run")
    assert done.returncode == 1 and "error: doctor: sampling: " in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
