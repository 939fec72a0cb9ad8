"""Two processes on the CPU against one: the same samples, rewards and, up to the order of sums, gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow.parquet
import pytest

from tests.conftest import REPOSITORY

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
