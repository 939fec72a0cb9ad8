"""The wheel: built, installed into an environment of its own, and used from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from common import __version__
from common.data.digits import Digits
from tests.conftest import REPOSITORY

PACKED = ("common", "alert", "clsrl", "conf", "sweeps")
QUICK = (
    "shots=1",
    "trainer.updates=2",
    "trainer.prompts_per_update=2",
    "rollout.max_completion_tokens=8",
    "setting.test_per_class=1",
    "validation=none",
    "tracking=none",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    made = subprocess.run([sys.executable, "-c", build, folder], cwd=REPOSITORY, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return folder / made.stdout.split()[-1]


def test_everything_that_a_run_reads_is_in_the_wheel(wheel):
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True).stdout.splitlines()
    inside = {"run.py", *(name for name in tracked if name.split("/")[0] in PACKED)}
    assert set(zipfile.ZipFile(wheel).namelist()) >= inside and wheel.name.split("-")[1] == __version__


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`installed(folder, *words)`: run a program of an environment that has the wheel, and the libraries of this one."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    uv = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "--quiet",
        "--offline",
        "--no-deps",
        "--python",
        home / "bin/python",
    ]
    subprocess.run([*uv, wheel], check=True)

    def call(folder, *words):
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FEWSHOT_CACHE")}
        return subprocess.run(
            [home / "bin" / words[0], *words[1:]], cwd=folder, env=clean, capture_output=True, text=True, timeout=300
        )

    return call


@pytest.mark.slow
def test_an_installed_copy_trains_and_predicts_from_any_folder(installed, tmp_path):
    """With a reward and a preset of the user's own, who has only this folder."""
    (tmp_path / "mine.py").write_text("def short(samples):\n    return [1.0 / len(s.completion) for s in samples]\n")
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    preset = "# @package _global_\nrewards:\n  short: {weight: 0.5, fn: mine.short}\n"
    (tmp_path / "my_conf" / "experiment" / "brief.yaml").write_text(preset)
    done = installed(tmp_path, "fewshot", "train", "-cd", "my_conf", "experiment=brief", *QUICK)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs").iterdir()
    assert run.name.startswith("brief-")
    assert json.loads((run / "metrics.json").read_text())["train"]["updates"] == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("rewards/short/mean" in row for row in rows), sorted(rows[0])
    Digits().open("7").save(tmp_path / "seven.png")
    said = installed(tmp_path, "fewshot", "predict", run, "seven.png", "--format", "jsonl", "--trust-code")
    assert said.returncode == 0 and json.loads(said.stdout)["image"] == "seven.png", said.stderr
    source = "import common; print(common.__file__); from common import Classifier; print(Classifier.__name__)"
    where = installed(tmp_path, "python", "-c", source).stdout.splitlines()
    assert where[1] == "Classifier" and not where[0].startswith(str(REPOSITORY))


def test_the_command_lists_its_commands(installed, tmp_path):
    shown = installed(tmp_path, "fewshot").stdout
    assert all(f"fewshot {name} " in shown for name in ("train", "predict", "serve", "export", "report", "doctor"))
    assert installed(tmp_path, "fewshot", "--version").stdout == f"fewshot {__version__}\n"
    wrong = installed(tmp_path, "fewshot", "trian")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: fewshot trian is no command; choose train,")
    assert installed(tmp_path, "fewshot", "report", "--help").stdout.startswith("usage: fewshot report ")


@pytest.mark.slow
def test_sweeps_come_along(installed, tmp_path):
    words = ("train", "-cd", "sweeps", "-cn", "clsrl_table1", "model=tiny_qwen2_vl", "data=digits", "dry=true")
    shown = installed(tmp_path, "fewshot", *words)
    assert shown.returncode == 0 and "12 of 12 runs to do" in shown.stdout
