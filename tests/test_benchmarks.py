"""The benchmarks at a toy size: both sides of each comparison compute the same thing."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from benchmarks.setup import save_model

    return save_model(tmp_path_factory.mktemp("benchmark") / "model")


def test_one_step_has_the_loss_and_gradients_of_trl(folder, tmp_path):
    from benchmarks.grpo_step import VARIANTS, assert_same_work, build
    from benchmarks.setup import Case

    case = Case(200, 6, 4)
    assert_same_work(case, {name: build(name, folder, case, tmp_path) for name in VARIANTS})


def test_operations_are_counted_as_by_hand():
    """Products of matrices, forward and backward; of causal attention what is seen, of checkpoints both times."""
    from benchmarks.setup import counted_flops

    layer, rows = torch.nn.Linear(8, 16, bias=False), torch.randn(10, 8)
    tokens = torch.randn(1, 2, 6, 4, requires_grad=True)

    def step():
        checkpoint(lambda x: layer(x).tanh(), rows, use_reentrant=False).sum().backward()
        F.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True).sum().backward()

    linear = 3 * (2 * 10 * 8 * 16)  # forward twice, gradient of the weights
    pairs = 2 * (6 * 7 // 2)  # in two heads
    assert counted_flops(step) == linear + (2 + 5) * 2 * pairs * 4


def test_head_patch_is_undone():
    from trl.trainer import utils

    from benchmarks.setup import completion_rows_only

    before = utils._use_triton
    with completion_rows_only():
        assert utils._use_triton(torch.device("cpu"))
    assert utils._use_triton is before and not before(torch.device("cpu"))


def test_sampling_decodes_what_transformers_decodes(folder):
    from benchmarks.rollout import measure
    from benchmarks.setup import Case

    _, numbers = measure(Case(200, 4, 2), folder, repetitions=1)
    assert numbers["ratio"] > 0


def test_line_fit_finds_the_line():
    from benchmarks.cost_model import fit

    line = fit([100, 200, 400], [1.5, 2.5, 4.5])
    assert (line.slope, line.intercept, line.r2) == pytest.approx((0.01, 0.5, 1.0))


@pytest.mark.faults
def test_both_loaders_give_the_same_pixels(tmp_path):
    from benchmarks.loading import Plan, generate, measure

    generate(tmp_path / "pictures", 100)
    measure(Plan("same", 2, str(tmp_path / "pictures"), 8, str(tmp_path / "index")))
    cached = Plan("ours", 1, str(tmp_path / "pictures"), 8, str(tmp_path / "cache"), 2**24)
    assert all(measure(cached).seconds > 0 for _ in range(2))
    assert len(list((tmp_path / "cache").glob("*.rgb"))) == 8


@pytest.mark.faults
def test_a_bank_on_the_host_is_trained_as_one_on_the_device():
    from benchmarks.bank import compare

    assert compare((40, 4, 32))["difference"] < 1e-6


@pytest.mark.faults
def test_the_classifier_is_timed_beside_an_evaluation(monkeypatch, capsys):
    from benchmarks import predict

    monkeypatch.setattr("sys.argv", ["predict", "--images", "4", "--repetitions", "1"])
    predict.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 4
