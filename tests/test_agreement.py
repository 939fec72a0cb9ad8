"""Self-checks in exact arithmetic: a correct bf16 model passes, and faults that rounding would hide are refused."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from common.data.loading import Loader
from common.forward import attention, merged_attention
from common.forward.logprobs import InFloat32, PolicyScorer, exact
from common.forward.packing import PromptGroup, SharedPrefix, pack_plain, pack_shared
from common.models.encoder import PromptEncoder
from common.rollout.base import Decoding, requests
from common.rollout.hf import HFRollout
from common.run import doctor
from common.training import agreement
from tests.conftest import NEWER, SQUARE

DECODING = Decoding(temperature=1.0, top_k=0, top_p=1.0, max_tokens=12)
FAMILIES = ["qwen2_vl", *NEWER, "gemma3"]


@pytest.fixture
def world(load_vlm, digits_task, no_think):
    """`world(family)`: a bf16 model, its scorer, a request and the group that was sampled for it."""

    def make(family, rollout=HFRollout, **options):
        vlm = load_vlm(family=family, dtype="bfloat16", **options)
        encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
        (request,) = requests(encoder, no_think.train_prompts(digits_task)[:1], ["seed"])
        sampler = rollout(vlm)
        (completions,) = sampler.generate([request], 4, DECODING)
        group = PromptGroup(request.encoded, tuple(completion.ids for completion in completions))
        return vlm, PolicyScorer(vlm, 1.0, 256), group, sampler, request

    return make


def measured(made):
    vlm, scorer, group, sampler, request = made
    return agreement.measure(scorer, vlm, group, sampler, request, DECODING)


@pytest.mark.parametrize("family", ["qwen2_vl", *NEWER, pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_correct_model_in_bf16_passes_although_it_rounds(world, family):
    found = measured(world(family))
    assert found.rounding > 1e-3, "bf16 rounds"
    assert found.shared < 2e-5 and found.replay < 2e-5 and found.noise < 2e-5
    assert found.allowed == 1e-4 and found.forwards_agree and found.sampler_agrees
    assert found.allowed_of_sampler == pytest.approx(4 * found.rounding)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_8_bits_are_compared_as_the_matrices_that_they_stand_for(world, monkeypatch, family):
    """LLM.int8()'s own outliers make correct forwards differ by more than the limit, and at real size hide a leaking mask."""
    vlm, scorer, group, *others = world(family, load_in_8bit=True)
    # of other lengths, so that the plain rows are padded: padding has outliers of its own
    group = replace(group, completions=tuple(ids[: 2 + 3 * n] for n, ids in enumerate(group.completions)))
    made = vlm, scorer, group, *others
    layers = [module for module in vlm.model.modules() if type(module).__name__ == "Linear8bitLt"]
    for layer in layers:
        layer.state.threshold = 1.0  # the tiny models have no outliers beyond the usual 6
    with torch.no_grad():
        plain, shared = (
            scorer.eval()(packed, False)[0]
            for packed in (
                pack_plain([group], vlm.family, vlm.pad, vlm.device),
                pack_shared([group], vlm.family, vlm.device),
            )
        )
    found = measured(made)
    if family == "gemma3":
        assert agreement.difference(plain, shared) > 2 * found.allowed, "in 8 bits as they are, correct forwards differ"
    assert found.allowed == 1e-4
    assert found.shared < 2e-5 and found.replay < 2e-5 and found.noise < 2e-5 and found.rounding > 1e-3
    FAULTS["a token sees the next one"](monkeypatch)
    assert not measured(made).forwards_agree
    assert layers and not any("forward" in vars(layer) for layer in layers), "they compute in 8 bits again"


def test_the_exact_product_of_an_8_bit_matrix_is_that_of_its_numbers(world):
    """Scale by row, SCB / 127, computed here without bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    vlm, *_ = world("qwen2_vl", load_in_8bit=True)
    layer = next(m for m in vlm.model.modules() if type(m).__name__ == "Linear8bitLt" and m.bias is not None)
    held = layer.state if layer.weight.CB is None else layer.weight
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ (held.CB.double() * held.SCB.double()[:, None] / 127).T + layer.bias.double()
    hooked = type(layer).forward.__get__(layer)
    layer.forward = hooked  # as accelerate's hooks stand on a layer
    with torch.no_grad(), exact(vlm.model):
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
    assert layer.forward is hooked


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_4_bits_are_compared_as_the_matrices_that_they_stand_for(world, monkeypatch):
    made = world("qwen2_vl", load_in_4bit=True)
    found = measured(made)
    assert found.allowed == 1e-4
    assert found.shared < 2e-5 and found.replay < 2e-5 and found.noise < 2e-5 and found.rounding > 1e-3
    FAULTS["a token sees the next one"](monkeypatch)
    assert not measured(made).forwards_agree


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", ["none", "sign", "scale"])
def test_a_wrong_gradient_of_merged_attention_is_refused(world, monkeypatch, family, fault):
    """It shows in no log-probability: only the backward of the merged kernels is wrong."""
    made = world(family)
    right = merged_attention.CPU
    factor = {"none": 1.0, "sign": -1.0, "scale": 1.05}[fault]

    def backward(*arguments):
        query, key, value = right.backward(*arguments)
        return query, factor * key, value

    monkeypatch.setattr(merged_attention, "CPU", right._replace(backward=backward))
    with torch.no_grad():  # whoever asks need not know that gradients are compared
        found = measured(made)
    assert found.forwards_agree and found.copied > 1e-4, "bf16 rounds"
    assert found.gradients_agree == (fault == "none")
    verdict = doctor.check_forward(found)
    assert (verdict.verdict == "ok") == (fault == "none")
    assert fault == "none" or "model.attention=copy" in verdict.fix
    attention.install(made[0].model, "copy")
    assert measured(made).merged == 0, "nothing is merged then"


def test_exact_is_the_model_in_fp32(world, load_vlm):
    """The same weights, every one of them widened before it is loaded. (Gemma in bf16 also rounds a constant.)"""
    vlm, scorer, group, *_ = world("qwen2_vl")
    wide = load_vlm()
    wide.model.load_state_dict({name: value.float() for name, value in vlm.model.state_dict().items()})
    packed = pack_plain([group], vlm.family, vlm.pad, vlm.device)
    with torch.no_grad():
        rounded = scorer.eval()(packed)[0]
        with InFloat32():
            exact = scorer(packed)[0]
        expected = PolicyScorer(wide, 1.0, 256).eval()(packed)[0]
    assert exact.dtype == torch.float32 and vlm.model.dtype == torch.bfloat16, "the weights stay as they are"
    assert float((exact - expected).abs().max()) < 1e-4 < float((rounded - expected).abs().max())


def sees_the_next(monkeypatch):
    original = SharedPrefix.suffix_keys

    def leaking(self, window):
        index, mask = original(self, window)
        own = self.suffix_index.shape[1]
        row = torch.arange(own)
        return index, torch.cat([mask[..., :-own], mask[..., -own:] | (row[:, None] + 1 >= row)], -1)

    monkeypatch.setattr(SharedPrefix, "suffix_keys", leaking)


def packed_wrongly(change):
    def apply(monkeypatch):
        def wrong(groups, family, device):
            packed = pack_shared(groups, family, device)
            return replace(packed, inputs={**packed.inputs, **change(packed.inputs, len(groups[0].prompt.ids))})

        monkeypatch.setattr(agreement, "pack_shared", wrong)

    return apply


def late(inputs, prompt):
    moved = inputs["position_ids"].clone()
    moved[..., prompt:] += 1
    return {"position_ids": moved}


FAULTS = {
    "a token sees the next one": sees_the_next,
    "completions one position late": packed_wrongly(late),
    "a black picture": packed_wrongly(lambda i, _: {"pixel_values": torch.zeros_like(i["pixel_values"])}),
    "height and width swapped": packed_wrongly(lambda i, _: {"position_ids": i["position_ids"][[0, 2, 1]]}),
}


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("family", "fault"),
    [
        (family, fault)
        for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3")
        for fault in FAULTS
        if family != "gemma3" or "swapped" not in fault
    ]
    + [
        pytest.param(family, fault, marks=pytest.mark.faults)
        for family in SQUARE
        for fault in FAULTS
        if "swapped" not in fault
    ],
)
def test_a_wrong_forward_is_refused(world, monkeypatch, family, fault):
    made = world(family)
    FAULTS[fault](monkeypatch)
    found = measured(made)
    assert not found.forwards_agree and found.sampler_agrees
    assert found.shared > 5 * found.allowed


class Late(HFRollout):
    """It counts the positions of completions from one too many."""

    def _forward(self, ids, mask, positions, cache, extra):
        return super()._forward(ids, mask, positions + (ids.shape[1] == 1), cache, extra)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_sampler_is_refused(world, family):
    found = measured(world(family, Late))
    assert found.forwards_agree and not found.sampler_agrees


def test_what_8_bits_vary_by_is_allowed_and_what_is_no_number_is_not():
    found = agreement.Agreement(0.03, 0.05, noise=0.01, rounding=0.02, dtype=torch.float32)
    assert found.allowed == pytest.approx(0.04) and found.forwards_agree and not found.sampler_agrees
    assert found.allowed_of_sampler == pytest.approx(0.08)
    assert not replace(found, shared=float("nan")).forwards_agree
