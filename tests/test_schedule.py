"""Data order and learning rate are functions of the update alone."""

from __future__ import annotations

import pytest

from common.config.schema import TrainerConfig
from common.training.base import Epochs, batch, learning_rate, total_updates


def trainer(**values):
    return TrainerConfig(**{"name": "sft", "learning_rate": 1.0, "epochs": 1.0, **values})


def test_every_epoch_visits_every_item_once():
    seen = [i for update in range(30) for _, i in batch(update, size=16, items=160, seed=1)]
    for epoch in range(3):
        assert sorted(seen[epoch * 160 : (epoch + 1) * 160]) == list(range(160))
    assert seen[:160] != seen[160:320]


def test_batches_run_over_the_end_of_an_epoch():
    seen = [i for update in range(5) for _, i in batch(update, size=16, items=40, seed=1)]  # 80 = 2 epochs of 40
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))


def test_epochs_are_counted():
    epochs = [epoch for update in range(5) for epoch, _ in batch(update, size=16, items=40, seed=1)]
    assert epochs == [0] * 40 + [1] * 40


def test_prompts_of_an_epoch_are_asked_for_once():
    asked = []

    def ask(epoch):
        asked.append(epoch)
        return [f"{epoch}-{i}" for i in range(4)]

    epochs = Epochs(ask, ask(0))
    assert [epochs(epoch)[1] for epoch in (0, 0, 1, 0, 1, 2)] == ["0-1", "0-1", "1-1", "0-1", "1-1", "2-1"]
    assert asked == [0, 1, 2] and len(epochs) == 4


def test_order_depends_on_the_seed():
    assert batch(0, 16, 160, seed=1) != batch(0, 16, 160, seed=2)


def test_total_updates():
    # 11 datasets' case of the paper: 4 shots, 10 classes, 50 epochs, 16 prompts an update: 50 * 40 / 16 = 125
    assert total_updates(trainer(epochs=50), 40) == 125
    assert total_updates(trainer(epochs=1), 17) == 2
    assert total_updates(trainer(updates=7), 17) == 7


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),  # transformers: (total - step) / total, no warm-up
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("cosine", [1.0, 0.853553, 0.5, 0.146447]),  # (1 + cos(pi k / 4)) / 2
    ],
)
def test_learning_rate_without_warmup(schedule, expected):
    rates = [learning_rate(trainer(schedule=schedule), u, 4) for u in range(4)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_learning_rate_with_warmup_and_floor():
    config = trainer(schedule="linear", warmup_ratio=0.5, final_ratio=0.2)
    # two warm-up updates, then 1 -> 0.2 over two: 1, 1 - 0.5 * 0.8
    assert [learning_rate(config, u, 4) for u in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.6])
