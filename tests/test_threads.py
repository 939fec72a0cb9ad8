"""The same command computes the same bits on a busy machine, with several threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from common.runtime import group, process
from tests.conftest import REPOSITORY


@pytest.fixture
def two_threads():
    count, order = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(count)
    torch.use_deterministic_algorithms(order, warn_only=True)


def summed(rows, values):
    """The gradient of `table[rows]`: rows that are read several times add up."""
    table = torch.zeros(int(rows.max()) + 1, values.shape[1], requires_grad=True)
    table[rows].backward(values)
    return table.grad


def test_gradients_add_up_in_one_order(two_threads):
    group.fix_order()
    random = torch.Generator().manual_seed(1)
    rows, values = torch.arange(4000) % 3, torch.randn(4000, 96, generator=random)
    expected = torch.zeros(3, 96)
    for row, value in zip(rows, values, strict=True):
        expected[row] += value
    for _ in range(20):
        assert torch.equal(summed(rows, values), expected)


def test_a_run_on_the_cpu_asks_for_it(process_group):
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled(), "an operation that has no order stops no run"


def test_the_number_of_threads_does_not_follow_the_load(monkeypatch):
    monkeypatch.setenv("OMP_DYNAMIC", "TRUE")
    monkeypatch.delenv("MKL_DYNAMIC", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    process.set_thread_policy()
    told = [os.environ[name] for name in ("OMP_DYNAMIC", "MKL_DYNAMIC", "OMP_WAIT_POLICY")]
    assert told == ["FALSE", "FALSE", "ACTIVE"]


def test_they_are_set_before_anything_that_reads_them_is_imported():
    asked = (
        "import sys, run\n"
        "run.main = lambda: print(sorted({'torch', 'numpy'} & set(sys.modules)), run.os.environ['MKL_DYNAMIC'])\n"
        "run.run()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MKL_DYNAMIC"}
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "[] FALSE\n", done.stderr
