"""Embeddings that stay on the host: AdamW of absent rows done later, against torch's on the whole table."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.models.extra_embeddings import DeviceEmbeddings
from common.models.offloaded import Moments, OffloadedEmbeddings, OffloadedRows, Rule, attach_offloaded, catch_up
from common.rollout.vllm.weights import named
from common.training.engine import Engine
from common.types import UserError
from tests.test_bank_training import with_slots
from tests.test_extra_embeddings import prompts
from tests.test_training import ZERO, grpo, options

ENTRIES = torch.randn(6, 2, 4, generator=torch.manual_seed(3))
SEEN = [(0, 1), (1, 4), (4,), (0, 5), (2,), (1, 2), (0, 3, 4), (5,)]  # entries with a gradient, by update
RATES = [1e-2 * (1 - update / 20) for update in range(300)]


def dense(rule, seen, rates):
    """torch.optim.AdamW on the whole table, with the gradients that `gradient` gives."""
    table = torch.nn.Parameter(ENTRIES.clone())
    plain = torch.optim.AdamW([table], betas=rule.betas, weight_decay=rule.weight_decay)
    for update, entries in enumerate(seen):
        table.grad = torch.zeros_like(table)
        for entry in entries:
            table.grad[entry] = gradient(update, entry)
        plain.param_groups[0]["lr"] = rates[update]
        plain.step()
    return table.detach()


def gradient(update, entry):
    """From 1e-9 to 1: where a second moment is near AdamW's epsilon, too."""
    scale = torch.logspace(-9, 0, 8).view(2, 4)
    return torch.randn(2, 4, generator=torch.manual_seed(100 * update + entry)) * scale


def hosted(rule, seen, rates):
    rows = OffloadedRows(ENTRIES, rule)
    for update, entries in enumerate(seen):
        rows.step({entry: gradient(update, entry) for entry in entries}, rates[update])
    return rows


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99), (0.0, 0.9)])
def test_rows_move_as_those_of_the_whole_table(betas, weight_decay):
    rule = Rule(betas, weight_decay)
    for updates in range(1, len(SEEN) + 1):
        rows, expected = hosted(rule, SEEN[:updates], RATES), dense(rule, SEEN[:updates], RATES)
        assert float((rows.table() - expected).abs().max()) < 1e-6
        assert torch.allclose(rows.fetch([3, 0]), expected[[3, 0]], rtol=0, atol=1e-6)


def test_a_long_absence_is_not_replayed_to_its_end():
    """300 updates without a gradient, of which the momentum survives some 170."""
    rule, rates = Rule((0.9, 0.99), 0.1), [1e-2] * 300
    seen = [(0, 1, 2, 3, 4, 5), *[()] * 299]
    assert 100 < rule.horizon < 250
    # torch's own 300 roundings of a row are 2e-6
    assert float((hosted(rule, seen, rates).table() - dense(rule, seen, rates)).abs().max()) < 5e-6
    rows, moments = ENTRIES[0].clone(), Moments(torch.ones(2, 4), torch.ones(2, 4), 1)
    catch_up(rows, moments, rates, rule)
    assert moments.last == 300 and not moments.first.any()


def test_settling_changes_nothing_but_when_it_is_done():
    rule = Rule((0.9, 0.99), 0.1)
    rows, eager = hosted(rule, SEEN, RATES), OffloadedRows(ENTRIES, rule)
    for update, entries in enumerate(SEEN):
        eager.step({entry: gradient(update, entry) for entry in entries}, RATES[update])
        eager.flush()
        assert {int(last) for last in eager.last if last} == {update + 1}
    assert torch.equal(rows.table(), eager.table())


def test_what_was_saved_goes_on_to_the_bit_and_later_updates_are_undone(tmp_path):
    rule = Rule((0.9, 0.99), 0.1)
    whole, part = hosted(rule, SEEN, RATES), hosted(rule, SEEN[:4], RATES)
    part.save(tmp_path)
    assert (tmp_path / "rows").stat().st_size == 4 * ENTRIES[:4].numel(), "untouched entries are not saved"
    again = OffloadedRows(ENTRIES, rule)
    for rows in (again, part):  # one that is new, and one that has gone further
        if rows is part:
            rows.step({2: gradient(9, 2), 0: gradient(9, 0)}, 1.0)
        rows.restore(tmp_path)
        assert rows.touched() == [0, 1, 4, 5]
        for update, entries in enumerate(SEEN[4:], 4):
            rows.step({entry: gradient(update, entry) for entry in entries}, RATES[update])
        assert torch.equal(rows.table(), whole.table())


def test_the_beginning_is_remembered_and_a_reference_sees_it():
    rows = hosted(Rule((0.9, 0.99), 0.1), SEEN[:3], RATES)
    frozen = copy.deepcopy(rows)
    assert torch.equal(rows.fetch(range(6), begun=True), ENTRIES) and torch.equal(frozen.fetch(range(6)), ENTRIES)
    assert not torch.equal(rows.fetch([1]), ENTRIES[[1]])


def test_a_full_disk_is_one_line(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="trainer.embeddings=host needs .*Set TMPDIR"):
        OffloadedRows(ENTRIES, Rule())


# ---- through the engine


def on_the_host(load_vlm, rule):
    """As `with_slots`, the rows on the host."""
    vlm = with_slots(load_vlm)
    entries = vlm.extra_embeddings.table().clone()
    vlm.model.set_input_embeddings(vlm.extra_embeddings.embedding)
    return replace(vlm, extra_embeddings=attach_offloaded(vlm.model, entries, True, rule))


def models(entries, rule):
    """The same small model with its rows on the device and on the host."""
    for make in (
        lambda e: DeviceEmbeddings(e, entries, True),
        lambda e: OffloadedEmbeddings(e, entries, True, rule, torch.float32),
    ):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(6, 4)
        yield torch.nn.Sequential(make(embedding), torch.nn.Linear(4, 3))


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("grad_clip", [0.0, 0.5])
@pytest.mark.parametrize("stage", ZERO)
def test_an_engine_trains_both_alike(stage, grad_clip):
    """Five updates of two backwards each: rows, layers and gradient norms; with clipping, rows and layers by one norm."""
    config = options(
        learning_rate=1e-2, embedding_learning_rate=3e-2, weight_decay=0.1, betas=[0.9, 0.99], grad_clip=grad_clip
    )
    found = []
    for model in models(ENTRIES, Rule((0.9, 0.99), 0.1)):
        engine, norms = Engine(model, config, ZERO[stage], updates=5), []
        for update in range(5):
            for half, last in ((SEEN[update], False), (SEEN[update + 1], True)):
                ids = torch.tensor([0, 3, *[6 + 2 * entry + row for entry in half for row in range(2)]])
                engine.backward(engine(ids).pow(2).sum() * (update + 1), last=last)
            norms.append(engine.step(update)["grad_norm"])
        with engine.whole_weights():
            found.append((norms, model[0].table().clone(), model[1].weight.detach().clone()))
        engine.close()
    (norms, rows, layer), (own_norms, own_rows, own_layer) = found
    assert own_norms == pytest.approx(norms, rel=1e-5) and min(norms) > 0.5, "clipping has an effect"
    assert float((rows - own_rows).abs().max()) < 1e-6 and float((layer - own_layer).abs().max()) < 1e-6
    assert float((rows - ENTRIES).abs().max()) > 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_grpo_trains_both_alike(load_vlm, digits_task):
    """Samples, rewards, KL and rows of three updates of the whole model."""
    found = []
    for vlm in (with_slots(load_vlm), on_the_host(load_vlm, Rule((0.9, 0.999), 0.1))):
        begun = vlm.extra_embeddings.table().clone()
        method = SimpleNamespace(train_prompts=lambda task: prompts(digits_task))
        trainer = grpo(vlm, digits_task, method, beta=0.04, embedding_learning_rate=1e-2, weight_decay=0.1)
        steps = [trainer.step(update) for update in range(3)]
        found.append((steps, vlm.extra_embeddings.table().clone()))
        trainer.close()
    (steps, rows), (own_steps, own_rows) = found
    for a, b in zip(steps, own_steps, strict=True):
        assert [r["completion"] for r in a.rows] == [r["completion"] for r in b.rows]
        assert b.metrics == pytest.approx(a.metrics, rel=1e-3, abs=1e-6)
    assert steps[2].metrics["kl"] > 1e-4
    assert float((rows - own_rows).abs().max()) < 1e-5 < float((rows - begun)[:4].abs().min(dim=-1).values.max())


def test_an_engine_beside_is_pushed_the_same_weights(load_vlm):
    """A sampler with weights of its own: names and tensors, the rows behind the vocabulary among them."""
    pushed = [dict(named(vlm)) for vlm in (with_slots(load_vlm), on_the_host(load_vlm, Rule()))]
    assert pushed[0].keys() == pushed[1].keys()
    assert all(torch.equal(pushed[0][name], tensor) for name, tensor in pushed[1].items())
