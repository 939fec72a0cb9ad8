"""What training does to embeddings beyond the vocabulary, and what it leaves alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.config.schema import LoraConfig
from common.data.loading import Loader
from common.forward.packing import pack_shared
from common.models import extra_embeddings
from common.models.encoder import PromptEncoder
from common.training.engine import Engine
from tests.test_extra_embeddings import prompts
from tests.test_shared_prefix import LORA, groups
from tests.test_training import ZERO, distance, grpo, options, run, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]


def with_slots(load_vlm, trainable=True, **changes):
    """Five entries; category 4 is in none of the prompts."""
    torch.manual_seed(0)
    vlm = load_vlm(family="gemma3", **changes)
    entries = torch.randn(5, 4, vlm.model.config.get_text_config().hidden_size, generator=torch.manual_seed(3)) * 0.3
    return replace(vlm, extra_embeddings=extra_embeddings.attach(vlm.model, entries, trainable))


@pytest.mark.parametrize(("lora", "stage"), [(LoraConfig(), 2), (LORA, 0), (LORA, 2), (LORA, 3)])
def test_the_reference_keeps_the_embeddings_of_the_start(load_vlm, digits_task, lora, stage):
    vlm = with_slots(load_vlm, lora=lora)
    asked = prompts(digits_task)
    method = SimpleNamespace(train_prompts=lambda task: asked)
    trainer = grpo(vlm, digits_task, method, beta=0.04, deepspeed=ZERO[stage], embedding_learning_rate=0.1)
    encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
    packed = pack_shared(groups(vlm, asked, encoder, [2, 2, 2], [3, 5], image=True), vlm.family, vlm.device)

    def seen():
        with torch.no_grad(), trainer.sampling():
            rows = vlm.extra_embeddings.entries.detach().clone()
        with torch.no_grad():
            return rows, trainer._reference_logps(packed), trainer.engine(packed)[0]

    first = seen()
    steps = [trainer.step(update) for update in range(3)]
    last = seen()
    trainer.close()
    assert float((last[0][:4] - first[0][:4]).abs().min()) > 0, "all rows of a category in the batch have moved"
    assert torch.equal(last[1], first[1]), "to the bit"
    assert float((first[1] - first[2]).abs().max()) < 1e-6, "it begins as the policy"
    assert float((last[2] - first[2]).abs().max()) > 0.01, "the policy does see its own"
    assert abs(steps[0].metrics["kl"]) < 1e-6 < steps[-1].metrics["kl"]


def test_nothing_is_remembered_that_nobody_asks_for(load_vlm, digits_task):
    vlm = with_slots(load_vlm, lora=LORA)
    method = SimpleNamespace(train_prompts=lambda task: prompts(digits_task))
    grpo(vlm, digits_task, method, beta=0.0).close()
    assert vlm.extra_embeddings.begun is None


def trained_on(entries, seen, stage, **changes):
    """Three updates of an embedding with entries behind it, on the categories `seen`, and the same in plain PyTorch.

    The gradient is clipped nowhere; layers and entries have their own learning rate and share the weight decay.
    """
    torch.manual_seed(0)
    table = extra_embeddings.DeviceEmbeddings(torch.nn.Embedding(6, 4), entries, trainable=True)
    model = torch.nn.Sequential(table, torch.nn.Linear(4, 3))
    oracle = copy.deepcopy(model)
    config = options(learning_rate=1e-3, embedding_learning_rate=1e-2, grad_clip=0.0, schedule="linear", **changes)
    rest = [parameter for name, parameter in oracle.named_parameters() if not name.endswith("entries")]
    groups = [{"params": rest, "lr": 1e-3}, {"params": [oracle[0].entries], "lr": 1e-2}]
    plain = torch.optim.AdamW(groups, betas=tuple(config.betas), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda update: 1 - update / 3)
    engine = Engine(model, config, ZERO[stage], updates=3)
    rows = torch.tensor([6 + 2 * entry + row for entry in seen for row in range(2)])
    ids = torch.cat([torch.tensor([0, 3]), rows])
    for update in range(3):
        engine.backward(engine(ids).pow(2).sum(), last=True)
        found = engine.step(update)
        assert found["learning_rate"] == pytest.approx(1e-3 * (1 - update / 3))
        oracle(ids).pow(2).sum().backward()
        assert not oracle[0].entries.grad[[entry for entry in range(len(entries)) if entry not in seen]].any()
        plain.step()
        plain.zero_grad()
        schedule.step()
    with engine.whole_weights():
        ended = weights(model)
    engine.close()
    return ended, weights(oracle)


@pytest.mark.parametrize("stage", ZERO)
def test_embeddings_have_a_learning_rate_of_their_own(stage):
    entries = torch.randn(5, 2, 4, generator=torch.manual_seed(3))
    ended, oracle = trained_on(entries, (0, 1, 3), stage, weight_decay=0.1)
    assert distance(ended, oracle) < 1e-6
    moved = (ended["0.entries"] - entries).abs()
    # AdamW's first steps have the size of the learning rate: 1e-2 (1 + 2/3 + 1/3)
    assert 0.015 < float(moved[[0, 1, 3]].max()) < 0.025


@pytest.mark.parametrize("stage", ZERO)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_absent_categories_move_by_weight_decay_alone(stage, weight_decay):
    entries = torch.randn(5, 2, 4, generator=torch.manual_seed(3))
    ended = trained_on(entries, (0, 3), stage, weight_decay=weight_decay)[0]["0.entries"]
    absent, shrunk = [1, 2, 4], entries.clone()
    for update in range(3):
        shrunk *= 1 - 1e-2 * (1 - update / 3) * weight_decay
    assert torch.allclose(ended[absent], shrunk[absent], rtol=1e-6, atol=0)
    assert torch.equal(ended[absent], entries[absent]) == (weight_decay == 0)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_frozen_bank_stays_while_the_rest_is_trained(load_vlm, digits_task, trainable):
    vlm = with_slots(load_vlm, trainable=trainable, lora=LORA)
    before = weights(vlm.model)
    method = SimpleNamespace(train_prompts=lambda task: prompts(digits_task))
    run(vlm, digits_task, method, weight_decay=0.5)
    moved = {name for name, value in weights(vlm.model).items() if not torch.equal(value, before[name])}
    entries = {name for name in before if name.endswith("entries")}
    assert len(entries) == 1 and moved - entries == {name for name in before if "lora_" in name}, "nothing of the base"
    assert (entries <= moved) == trainable
