"""What training does to embeddings beyond the vocabulary, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.data.loading import Loader
from common.grpo.packing import pack_shared
from common.models import slots
from common.models.vlm import Encoder
from common.schema import Lora
from tests.test_shared_prefix import LORA, groups
from tests.test_slots import prompts
from tests.test_training import ZERO, grpo

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]


def with_slots(load_vlm, trainable=True, **changes):
    """Five entries; category 4 is in none of the prompts."""
    torch.manual_seed(0)
    vlm = load_vlm(family="gemma3", **changes)
    entries = torch.randn(5, 4, vlm.model.config.get_text_config().hidden_size, generator=torch.manual_seed(3)) * 0.3
    return replace(vlm, slots=slots.attach(vlm.model, entries, trainable))


@pytest.mark.parametrize(("lora", "stage"), [(Lora(), 2), (LORA, 0), (LORA, 2), (LORA, 3)])
def test_the_reference_keeps_the_embeddings_of_the_start(load_vlm, digits_task, lora, stage):
    vlm = with_slots(load_vlm, lora=lora)
    asked = prompts(digits_task)
    method = SimpleNamespace(train_prompts=lambda task: asked)
    trainer = grpo(vlm, digits_task, method, beta=0.04, deepspeed=ZERO[stage], embedding_learning_rate=0.1)
    encoder = Encoder(vlm, Loader(digits_task.images, 32), 512)
    packed = pack_shared(groups(vlm, asked, encoder, [2, 2, 2], [3, 5], image=True), vlm.family, vlm.device)

    def seen():
        with torch.no_grad(), trainer.whole_weights():
            rows = vlm.slots.entries.detach().clone()
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
    assert vlm.slots.begun is None
