"""Self-checks, names, gradients and projections at the width of the published models, with the real vocabularies.

Weights are random. Depth is 2 layers, or what DEPTHS says, in order: `DEPTHS=2,12,28 make test-faults`. The 28 layers of
Qwen2-VL-2B take 7 GB and some ten minutes of two cores.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from common.config.schema import LoraConfig, ModelConfig
from common.data.loading import Loader
from common.forward.label_scores import LabelScorer
from common.forward.logprobs import InFloat32, PolicyScorer, head_rows
from common.forward.packing import PromptGroup, pack_plain, pack_shared
from common.models import vlm
from common.models.encoder import PromptEncoder
from common.rollout.base import Decoding, requests
from common.rollout.hf import HFRollout
from common.training import agreement
from common.training.sft import target
from common.vlm.replies import reasoning
from tests.conftest import REAL, TOKENIZERS
from tests.test_agreement import FAULTS, Late

pytestmark = pytest.mark.faults
SIZES = {"qwen2_vl": 384, "gemma3": 896}
DEPTHS = [int(depth) for depth in os.environ.get("DEPTHS", "2").split(",")]
DECODING = Decoding(temperature=1.0, top_k=0, top_p=1.0, max_tokens=6)  # each costs a copy of all weights in fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(family, layers)`: a checkpoint of the published width, with so many layers and a tower of two."""
    from benchmarks.rehearse import checkpoint

    @cache
    def of(family, layers):
        model, tokenizer = REAL[family]
        if not (TOKENIZERS / tokenizer).is_dir():
            pytest.skip("the real tokenizers are not there")
        return checkpoint.write(model, tmp_path_factory.mktemp(family), layers, 2, TOKENIZERS / tokenizer)

    return of


@pytest.fixture
def load(folder):
    def of(family, layers=2, **changes):
        path = folder(family, layers)
        values = {
            "name": "wide",
            "dtype": "bfloat16",
            "image_size": SIZES[family],
            "max_prompt_tokens": None,
            **changes,
        }
        return vlm.load(path, ModelConfig(family=family, path=str(path), **values), torch.device("cpu"))

    return of


@pytest.fixture(autouse=True)
def as_a_gpu_rounds(monkeypatch):
    """bf16 products summed in fp32 and rounded once, as tensor cores do; CPUs without bf16 are a hundred times slower."""
    inner = F.linear

    def linear(x, weight, bias=None):
        if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
            return inner(x, weight, bias)
        return inner(x.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)

    monkeypatch.setattr(F, "linear", linear)


def asked(model, task, method):
    encoder = PromptEncoder(model, Loader(task.images, SIZES[name_of(model)]), None)
    return requests(encoder, method.train_prompts(task)[:1], ["seed"])[0]


def name_of(model):
    return next(name for name in REAL if name == model.family.model_type)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("layers", DEPTHS)
@pytest.mark.parametrize("family", REAL)
def test_correct_bf16_passes_and_every_fault_is_refused(
    load, digits_task, no_think, monkeypatch, record_property, family, layers
):
    model = load(family, layers)
    request = asked(model, digits_task, no_think)
    sampler = HFRollout(model)
    (completions,) = sampler.generate([request], 2, DECODING)
    group = PromptGroup(request.encoded, tuple(completion.ids for completion in completions))
    scorer = PolicyScorer(model, 1.0, 128).eval()

    def plain(group):
        return scorer(pack_plain([group], model.family, model.pad, model.device), entropy=False)[0]

    def note(name, nats):
        record_property(name, nats)
        print(f"{family}, {layers} layers, {name}: {nats:.2e} nats")

    correct = agreement.measure(scorer, model, group, sampler, request, DECODING)
    for name in ("shared", "replay", "noise", "rounding"):
        note(name, getattr(correct, name))
    assert correct.forwards_agree and correct.sampler_agrees
    assert correct.rounding > 100 * correct.shared, "in bf16 alone the faults could not be told from rounding"
    with torch.no_grad(), InFloat32():
        note("a late sampler", late := agreement.replayed(plain, Late(model), request, 2, DECODING))
        assert not replace(correct, replay=late).sampler_agrees
        exact = plain(group)
        for name, fault in FAULTS.items():
            if family == "gemma3" and "swapped" in name:
                continue  # it has no such positions
            with monkeypatch.context() as patch:
                fault(patch)
                wrong = scorer(agreement.pack_shared([group], model.family, model.device), entropy=False)[0]
            note(name, found := agreement.difference(wrong, exact))
            assert not replace(correct, shared=found).forwards_agree and found > 5 * correct.allowed, name


@pytest.mark.parametrize("family", REAL)
def test_names_are_scored_on_the_ids_of_the_whole_reply(load, digits_task, think, family):
    model = load(family, dtype="float32")
    request = asked(model, digits_task, think)
    scorer = PolicyScorer(model, 1.0, 128).eval()
    begun = reasoning(think, "<think>A curve</think><answer>two</answer>")
    tokenizer = model.processor.tokenizer
    names = ("two", "seven")
    wholes = [tokenizer(begun + think.label_response(name), add_special_tokens=False)["input_ids"] for name in names]
    assert all("><" in tokenizer.convert_ids_to_tokens(whole) for whole in wholes)
    shared = next(n for n, pair in enumerate(zip(*wholes, strict=False)) if pair[0] != pair[1])
    replies = tuple(torch.tensor([*whole, model.end_of_turn]) for whole in wholes)
    with torch.no_grad():
        logps, _ = scorer(pack_plain([PromptGroup(request.encoded, replies)], model.family, model.pad, model.device))
    expected = [float(part[shared:].sum()) for part in logps.split([len(reply) for reply in replies])]
    (found,) = LabelScorer(model)([request.encoded], [[think.label_response(name) for name in names]], [begun])
    # what both replies begin with adds the same to each
    assert float(found.logps[0] - found.logps[1]) == pytest.approx(expected[0] - expected[1], abs=1e-3)
    assert abs(expected[0] - expected[1]) > 0.01


@pytest.mark.parametrize("family", REAL)
def test_a_frozen_tower_has_no_gradient_and_few_rows_are_projected(load, digits_task, no_think, monkeypatch, family):
    model = load(family, dtype="float32", lora=LoraConfig(r=4), gradient_checkpointing=True, freeze_vision=True)
    request = asked(model, digits_task, no_think)
    rows = []
    head = model.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].numel() // inputs[0].shape[-1]))
    text = "a long label of many words, said again and again, " * 24
    reply = target(model, text, "answer")
    assert len(reply) > 2 * head_rows(model.model)
    scorer = PolicyScorer(model, 1.0, head_rows(model.model)).train()
    tower = next(module for name, module in model.model.named_modules() if name.endswith(model.family.vision[0]))
    seen = []
    tower.register_forward_hook(lambda module, inputs, out: seen.append(out.last_hidden_state.requires_grad))
    scorer(pack_shared([PromptGroup(request.encoded, (reply,))], model.family, model.device))[0].sum().backward()
    assert seen and not any(seen), "nothing runs back into the tower"
    reached = {name for name, parameter in model.model.named_parameters() if parameter.grad is not None}
    assert reached and all("lora_" in name for name in reached)
    assert 0 < max(rows) <= head_rows(model.model) <= 131
    rows.clear()
    LabelScorer(model)([request.encoded], [[text, text[:-5]]])
    assert 0 < max(rows) <= head_rows(model.model)
