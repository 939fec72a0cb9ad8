"""Weights in 8 and 4 bits under adapters and category embeddings. bitsandbytes computes on the CPU too; runs ask for a GPU."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from common.cost import estimate
from common.data.loading import Loader
from common.forward.logprobs import PolicyScorer, exact
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


@pytest.mark.parametrize(("bits", "stage"), [(8, 0), (8, 2), (4, 2)])
def test_a_run_is_continued(load_vlm, digits_task, tmp_path, bits, stage):
    """Between loading and resuming, ALERT looks at pictures with the tower."""
    asked = prompts(digits_task)

    def begin(resume=None):
        torch.manual_seed(0)
        vlm = load_vlm(family="gemma3", lora=LORA, freeze_vision=True, **{f"load_in_{bits}bit": True})
        seen = VisionTower(vlm, Loader(digits_task.images, 32)).vectors(
            [prompt.image for prompt in asked], patches=False
        )
        entries = torch.randn(5, 4, vlm.model.config.get_text_config().hidden_size) * 0.3
        vlm = replace(vlm, extra_embeddings=extra_embeddings.attach(vlm.model, entries, True))
        engine = Engine(PolicyScorer(vlm, 1.0, 64), options(), ZERO[stage], 4, resume)
        encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
        packed = pack_shared(groups(vlm, asked, encoder, [2, 2, 2], [3, 5], image=True), vlm.family, vlm.device)
        return vlm, engine, packed, seen

    def update(engine, packed, number):
        engine.backward(-engine(packed)[0].mean(), last=True)
        engine.step(number)

    def trained(vlm):
        return {name: p.detach().clone() for name, p in vlm.model.named_parameters() if p.requires_grad}

    vlm, engine, packed, seen = begin()
    assert {p.dtype for p in vlm.model.parameters()} >= {{8: torch.int8, 4: torch.uint8}[bits], torch.float32}
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


# the sixteen numbers of NF4, QLoRA's appendix E
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_4_bits_are_the_nearest_of_sixteen_numbers_times_the_largest_of_64(load_vlm, monkeypatch):
    before, vlm = load_vlm(family="qwen2_vl"), load_vlm(family="qwen2_vl", load_in_4bit=True)
    # with rows of whole blocks: 0.50 of bitsandbytes mixes up the blocks of others on a CPU with AVX-512
    name = "model.language_model.layers.0.mlp.down_proj"
    weight, layer = before.model.get_submodule(name).weight.detach(), vlm.model.get_submodule(name)
    blocks = weight.reshape(-1, 64)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    nearest = torch.tensor(NF4)[(scaled[..., None] - torch.tensor(NF4)).abs().argmin(-1)]
    expected = (nearest * blocks.abs().amax(1, keepdim=True)).view_as(weight)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("bitsandbytes.matmul_4bit", None)  # its kernels differ by device and number of rows
    with torch.no_grad(), exact(vlm.model):
        found = layer(x)
    # the scales are rounded to 8 bits, too
    assert float((found - x @ expected.T).norm() / found.norm()) < 0.02
    assert float((found - x @ weight.T).norm() / found.norm()) > 0.04, "4 bits are not 32"


def test_on_the_cpu_gradients_come_after_a_forward_without_them(load_vlm):
    """bitsandbytes would repack the weights in the first forward and give none in the second."""
    vlm = load_vlm(family="qwen2_vl", load_in_4bit=True)
    layer = vlm.model.get_submodule("model.language_model.layers.0.mlp.up_proj").eval()
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_estimate_has_the_bytes_of_the_loaded_weights(load_vlm, bits):
    vlm = load_vlm(family="qwen2_vl", dtype="bfloat16", lora=LORA, **{f"load_in_{bits}bit": True})
    layers = [m for m in vlm.model.modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")]
    held = sum(p.nbytes for p in vlm.model.parameters())
    for layer in layers:
        if bits == 8:
            held += layer.weight.SCB.nbytes
        else:
            state = layer.weight.quant_state
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    before = load_vlm(family="qwen2_vl", dtype="bfloat16", lora=LORA)
    config = SimpleNamespace(model=SimpleNamespace(bits=bits))
    largest = 2 * 256 * 256  # one matrix at a time is turned back to bf16, at most the vision tower's last
    assert estimate._weight_bytes(before, config) - largest == pytest.approx(held, rel=0.005)
