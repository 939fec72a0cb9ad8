"""The shared-prefix forward against the plain one: log-probabilities and gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from types import MethodType

import pytest
import torch
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionPooler

from common.config.schema import LoraConfig
from common.data.loading import Loader
from common.forward import attention
from common.forward.attention import masked_attention
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, pack_plain, pack_shared
from common.models.encoder import EncodedPrompt, PromptEncoder
from common.models.families import Qwen2VL
from tests.conftest import SQUARE

LORA = LoraConfig(r=4, alpha=8, targets=r".*(language|text)_model.*\.(q_proj|v_proj|down_proj)")


def rms_norm_in_input_dtype(self, hidden_states, one):
    """The model's RMSNorm computes in fp32 whatever it is given; for fp64 parity it must not."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    epsilon = self.eps if hasattr(self, "eps") else self.variance_epsilon
    scale = one + self.weight if hasattr(self, "weight") else 1.0
    return scale * (hidden_states * torch.rsqrt(variance + epsilon))


def rotated_in_input_dtype(query, key, cos, sin):
    """The towers turn queries and keys in fp32 whatever they are given; for fp64 parity they must not."""

    def turned(x):
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return turned(query), turned(key)


def pooled_in_input_dtype(self, hidden_states, pixel_position_ids, padding_positions, output_length):
    """Gemma 4's tower averages its patches in fp32 whatever it is given; for fp64 parity it must not. Images of 32x32."""
    means = [
        states[~padded].unflatten(0, (8, 2, 8, 2)).mean((1, 3)).flatten(0, 1)
        for states, padded in zip(hidden_states, padding_positions, strict=True)
    ]
    filled = torch.nn.utils.rnn.pad_sequence([*means, hidden_states.new_zeros(output_length, 64)], batch_first=True)
    return filled[:-1] * 64**0.5, (torch.arange(output_length) < 64).expand(len(means), -1)


@pytest.fixture(autouse=True)
def exact_towers(monkeypatch):
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        module = f"transformers.models.{family}.modeling_{family}"
        monkeypatch.setattr(import_module(module), "apply_rotary_pos_emb_vision", rotated_in_input_dtype)
    monkeypatch.setattr(Gemma4VisionPooler, "forward", pooled_in_input_dtype)


def groups(vlm, prompts, encoder, sizes, lengths, image):
    """Groups with random completions; `lengths` cycles over the completions of all groups."""
    generator = torch.Generator().manual_seed(0)
    allowed = torch.tensor([i for i in range(len(vlm.processor.tokenizer)) if i not in vlm.banned])
    encoded = encoder(prompts[: len(sizes)])
    if not image:
        config = vlm.model.config
        kept = [e.ids[~torch.isin(e.ids, torch.tensor(vlm.banned))] for e in encoded]
        encoded = [
            EncodedPrompt(ids, vlm.family.positions(ids, None, config), blocks=vlm.family.blocks(ids, config))
            for ids in kept
        ]
    made, count = [], 0
    for prompt, size in zip(encoded, sizes, strict=True):
        completions = []
        for _ in range(size):
            length = lengths[count % len(lengths)]
            completions.append(allowed[torch.randint(len(allowed), (length,), generator=generator)])
            count += 1
        made.append(PromptGroup(prompt, tuple(completions)))
    return made


def scores_and_gradient(scorer, packed):
    scorer.zero_grad(set_to_none=True)
    logps, entropy = scorer(packed)
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)  # different for every token
    (logps * weights).sum().backward()
    # norms in fp64, whatever the model computes in
    gradient = {n: p.grad.double() for n, p in scorer.named_parameters() if p.grad is not None}
    return logps.detach(), entropy, gradient


def relative_l2(a, b):
    assert a.keys() == b.keys()
    difference = sum(float((a[n] - b[n]).pow(2).sum()) for n in a) ** 0.5
    return difference / sum(float(b[n].pow(2).sum()) for n in b) ** 0.5


CASES = {
    "G2": ([2], [1, 4]),
    "G5 equal lengths": ([5], [3]),
    "G8 unequal": ([8], [1, 7, 2, 11, 5]),
    "three prompts": ([3, 2, 4], [2, 9, 1, 5]),
}


# Gemma 3 prompts have 60 to 110 tokens: a window far shorter, one that some completions reach the end of, one longer
MODELS = {
    "qwen": {"family": "qwen2_vl"},
    "qwen 2.5": {"family": "qwen2_5_vl"},
    "qwen 3": {"family": "qwen3_vl"},
    "gemma, window 9": {"family": "gemma3", "window": 9},
    "gemma, window 64": {"family": "gemma3", "window": 64},
    "gemma, window 512": {"family": "gemma3", "window": 512},
    "gemma causal, window 9": {"family": "gemma3", "window": 9, "image_attention": "causal"},
}
LATER = {
    **{family: {"family": family} for family in SQUARE},
    "gemma 4, window 9": {"family": "gemma4", "window": 9},
}


def model_for_parity(load_vlm, dtype, window=None, **changes):
    """A model in `dtype` whose adapters, if any, do something."""
    torch.manual_seed(0)
    vlm = load_vlm(**changes)
    vlm.model.to(dtype)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # zero-initialised: the adapter would do nothing
    for module in vlm.model.modules():
        if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
            one = 1.0 if type(module).__name__.startswith("Gemma3") else 0.0
            module.forward = MethodType(partial(rms_norm_in_input_dtype, one=one), module)
        if window is not None and getattr(module, "is_sliding", False):
            module.sliding_window = window
    if window is not None:
        vlm.model.config.get_text_config().sliding_window = window
    vlm.model.train()
    return vlm


SLOW = pytest.mark.slow
NUMBERS = [
    pytest.param(torch.float32, True, False, id="fp32-image"),
    pytest.param(torch.float32, False, False, id="fp32-text", marks=pytest.mark.faults),
    pytest.param(torch.float64, True, False, id="fp64-image", marks=SLOW),
    pytest.param(torch.float64, False, False, id="fp64-text", marks=SLOW),
    pytest.param(torch.float32, True, True, id="fp32-image-checkpointing", marks=SLOW),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("dtype", "image", "checkpointing"), NUMBERS)
@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "model",
    [
        *(pytest.param(model, id=name) for name, model in MODELS.items()),
        *(pytest.param(model, id=name, marks=pytest.mark.faults) for name, model in LATER.items()),
    ],
)
def test_shared_equals_plain(
    load_vlm, digits_task, think, no_think, record_property, dtype, image, lora, checkpointing, model
):
    vlm = model_for_parity(load_vlm, dtype, lora=lora, gradient_checkpointing=checkpointing, **model)
    (norm,) = (each for name, each in vlm.model.named_parameters() if name.endswith("_model.norm.weight"))
    norm.data += 1  # twice the logits of an untrained model, which are nearly flat
    encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
    # two instructions: prompts of different lengths in one row
    prompts = [
        think.train_prompts(digits_task)[0],
        no_think.train_prompts(digits_task)[20],
        think.train_prompts(digits_task)[40],
    ]
    scorer = PolicyScorer(vlm, temperature=0.9, chunk=7)
    # Gemma 4's products of queries and keys are not scaled down, so that its attention rounds more
    limit = (2e-5 if model["family"] == "gemma4" else 1e-5) if dtype == torch.float32 else 1e-9
    for name, (sizes, lengths) in CASES.items():
        batch = groups(vlm, prompts, encoder, sizes, lengths, image)
        plain = scores_and_gradient(scorer, pack_plain(batch, vlm.family, vlm.pad, vlm.device))
        # equal groups are merged in tests/test_attention.py and test_training.py
        for how in ("copy", "merge") if name == "three prompts" else ("copy",):
            attention.install(vlm.model, how)
            shared = scores_and_gradient(scorer, pack_shared(batch, vlm.family, vlm.device))
            assert shared[0].dtype == dtype and float(plain[0].std()) > 0.5, "flat logits would prove nothing"
            logps, gradient = float((shared[0] - plain[0]).abs().max()), relative_l2(shared[2], plain[2])
            record_property(f"{name}, {how}", f"{logps:.1e} {gradient:.1e}")
            assert logps <= limit and gradient <= limit, (name, how)
            assert float((shared[1] - plain[1]).abs().max()) <= 10 * limit


def test_the_image_block_of_gemma_matters(load_vlm, digits_task, think):
    scores = {}
    for kind in ("family", "causal"):
        vlm = model_for_parity(load_vlm, torch.float32, family="gemma3", image_attention=kind)
        batch = groups(
            vlm,
            think.train_prompts(digits_task),
            PromptEncoder(vlm, Loader(digits_task.images, 32), 512),
            [2],
            [4],
            True,
        )
        scores[kind] = PolicyScorer(vlm, 1.0, 64)(pack_shared(batch, vlm.family, vlm.device))[0]
    assert float((scores["family"] - scores["causal"]).abs().max()) > 1e-3


def test_gradient_checkpointing_changes_nothing(load_vlm, digits_task, think):
    results = []
    for checkpointing in (False, True):
        vlm = load_vlm(gradient_checkpointing=checkpointing)
        vlm.model.train()
        encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
        batch = groups(vlm, think.train_prompts(digits_task), encoder, [4], [3, 6], image=True)
        scorer = PolicyScorer(vlm, temperature=1.0, chunk=1024)
        results.append(scores_and_gradient(scorer, pack_shared(batch, vlm.family, vlm.device)))
    assert float((results[0][0] - results[1][0]).abs().max()) <= 1e-6
    assert relative_l2(results[0][2], results[1][2]) <= 1e-6


def test_completions_do_not_see_each_other(load_vlm, digits_task, think):
    vlm = load_vlm()
    encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
    group = groups(vlm, think.train_prompts(digits_task), encoder, [3], [5, 2, 4], image=True)[0]
    scorer = PolicyScorer(vlm, temperature=1.0, chunk=1024)
    changed = PromptGroup(group.prompt, (group.completions[0], group.completions[1].flip(0), group.completions[2]))
    with torch.no_grad():
        before, _ = scorer(pack_shared([group], vlm.family, vlm.device))
        after, _ = scorer(pack_shared([changed], vlm.family, vlm.device))
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[7:], after[7:])
    assert not torch.allclose(before[5:7], after[5:7])


def test_logits_are_capped_as_the_models_family_says(load_vlm, digits_task, think):
    """By the family of the loaded model: a model type may be that of another family, one given by a dotted path."""

    class Capped(Qwen2VL):
        @staticmethod
        def cap(config):
            return 0.5

    vlm = load_vlm()
    encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
    packed = pack_plain(
        groups(vlm, think.train_prompts(digits_task), encoder, [1], [4], True), vlm.family, vlm.pad, "cpu"
    )
    with torch.no_grad():
        found, _ = PolicyScorer(replace(vlm, family=Capped), 0.9, 64)(packed)
        logits = vlm.model(**packed.inputs, use_cache=False).logits[0, -5:-1]
    logits = 0.5 * (logits / 0.5).tanh() / 0.9
    logits[:, list(vlm.banned)] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, packed.targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_docstring_example_of_packing():
    prompt = EncodedPrompt(torch.tensor([10, 11, 12]), torch.arange(3).expand(3, -1))
    group = PromptGroup(prompt, (torch.tensor([20, 21]), torch.tensor([22])))
    shared = pack_shared([group], Qwen2VL, torch.device("cpu"))
    assert shared.inputs["input_ids"].tolist() == [[10, 11, 12, 20, 21, 22]]
    assert shared.inputs["position_ids"][0].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert (shared.predictors.tolist(), shared.targets.tolist(), shared.owner.tolist()) == (
        [2, 3, 2],
        [20, 21, 22],
        [0, 0, 1],
    )
    plain = pack_plain([group], Qwen2VL, pad=0, device=torch.device("cpu"))
    assert plain.inputs["input_ids"].tolist() == [[10, 11, 12, 20, 21], [10, 11, 12, 22, 0]]
    assert plain.predictors.tolist() == [2, 3, 7]
    assert (shared.tokens, plain.tokens) == (6, 10)


@pytest.mark.parametrize("grouped", [True, False], ids=["as on the CPU", "as on a GPU"])
def test_heads_attend_to_the_keys_of_their_group(grouped):
    """Four heads, two of keys: the first two attend to the first, and only to what the mask lets through."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    query, key, value = draw(2, 4, 3, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8)
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 0, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)[None, None]
    found = masked_attention(query, key, value, mask, 0.3, grouped)
    for row, head, number in [(0, 0, 0), (0, 1, 2), (1, 2, 1), (1, 3, 2)]:
        kept = mask[0, 0, number]
        weights = (0.3 * key[row, head // 2, kept] @ query[row, head, number]).exp()
        expected = (weights[:, None] * value[row, head // 2, kept]).sum(0) / weights.sum()
        torch.testing.assert_close(found[row, head, number], expected)
