"""8-bit weights under adapters and category embeddings. bitsandbytes computes on the CPU too, slowly; runs ask for a GPU."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from common.data.loading import Loader
from common.forward.logprobs import PolicyScorer
from common.forward.packing import pack_shared
from common.models import extra_embeddings
from common.models.encoder import PromptEncoder
from common.models.vision import VisionTower
from common.training.engine import Engine
from tests.test_extra_embeddings import prompts
from tests.test_shared_prefix import LORA, groups
from tests.test_training import ZERO, options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("process_group"),
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_in_8_bits_is_continued(load_vlm, digits_task, tmp_path, stage):
    """Between loading and resuming, ALERT looks at pictures with the tower."""
    asked = prompts(digits_task)

    def begin(resume=None):
        torch.manual_seed(0)
        vlm = load_vlm(family="gemma3", load_in_8bit=True, lora=LORA, freeze_vision=True)
        seen = VisionTower(vlm, Loader(digits_task.images, 32)).vectors(
            [prompt.image for prompt in asked], patches=False
        )
        entries = torch.randn(5, 4, vlm.model.config.get_text_config().hidden_size) * 0.3
        vlm = replace(vlm, extra_embeddings=extra_embeddings.attach(vlm.model, entries, True))
        engine = Engine(PolicyScorer(vlm.model, vlm.banned, 1.0, 64), options(), ZERO[stage], 4, resume)
        encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
        packed = pack_shared(groups(vlm, asked, encoder, [2, 2, 2], [3, 5], image=True), vlm.family, vlm.device)
        return vlm, engine, packed, seen

    def update(engine, packed, number):
        engine.backward(-engine(packed)[0].mean(), last=True)
        engine.step(number)

    def trained(vlm):
        return {name: p.detach().clone() for name, p in vlm.model.named_parameters() if p.requires_grad}

    vlm, engine, packed, seen = begin()
    assert {p.dtype for p in vlm.model.parameters()} >= {torch.int8, torch.float32}
    start = trained(vlm)
    update(engine, packed, 0)
    engine.save(tmp_path / "step" / "deepspeed")
    update(engine, packed, 1)
    expected = trained(vlm)
    engine.close()
    assert all(
        not torch.equal(expected[name], start[name]) for name in expected if "lora_B" in name or "entries" in name
    )

    vlm, engine, packed, again = begin(resume=tmp_path / "step" / "deepspeed")
    assert torch.equal(seen, again)
    update(engine, packed, 1)
    found = trained(vlm)
    engine.close()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
