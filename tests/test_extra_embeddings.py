"""Embeddings behind the vocabulary: their place in prompts, their gradient, and the shared forward over them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alert.prompt import meta_task
from common.config.schema import LoraConfig
from common.data.loading import Loader
from common.forward.logprobs import PolicyScorer
from common.forward.packing import pack_plain, pack_shared
from common.models import extra_embeddings, meter
from common.models.encoder import PromptEncoder
from common.types import Prompt
from tests.conftest import EXTENDING
from tests.test_shared_prefix import (
    LORA,
    exact_towers,  # noqa: F401
    groups,
    model_for_parity,
    relative_l2,
    scores_and_gradient,
)

FAMILIES = ("qwen2_vl", *EXTENDING, "gemma3")
NAMES = ("zero", "one", "two", "three", "four")


def prompts(digits_task):
    """Two and three categories; category 4 is in none."""
    shown = [(0, 3), (3, 1, 2), (2, 0)]
    return [
        Prompt(
            item.image, meta_task([NAMES[i] for i in chosen], "short"), item.name, categories=chosen, image_last=True
        )
        for item, chosen in zip(digits_task.train.items, shown, strict=False)
    ]


def with_slots(load_vlm, dtype, trainable=True, width=4, **changes):
    vlm = model_for_parity(load_vlm, dtype, **changes)
    entries = torch.randn(5, width, vlm.model.config.get_text_config().hidden_size, generator=torch.manual_seed(3))
    return replace(vlm, extra_embeddings=extra_embeddings.attach(vlm.model, entries.to(dtype) * 0.3, trainable))


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_equals_plain_with_categories(load_vlm, digits_task, family, lora, dtype):
    vlm = with_slots(load_vlm, dtype, family=family, lora=lora, **({"window": 9} if family == "gemma3" else {}))
    encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
    batch = groups(vlm, prompts(digits_task), encoder, [3, 2, 4], [2, 9, 1, 5], image=True)
    scorer = PolicyScorer(vlm, temperature=0.9, chunk=7)
    shared = scores_and_gradient(scorer, pack_shared(batch, vlm.family, vlm.device))
    plain = scores_and_gradient(scorer, pack_plain(batch, vlm.family, vlm.pad, vlm.device))
    limit = 1e-5 if dtype == torch.float32 else 1e-9
    assert float((shared[0] - plain[0]).abs().max()) <= limit and relative_l2(shared[2], plain[2]) <= limit
    assert any(name.endswith("entries") for name in shared[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_finite_differences(load_vlm, digits_task, family):
    vlm = with_slots(load_vlm, torch.float64, family=family)
    encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
    batch = groups(vlm, prompts(digits_task), encoder, [2, 2, 2], [3], image=True)
    scorer = PolicyScorer(vlm, temperature=1.0, chunk=64)
    packed = pack_shared(batch, vlm.family, vlm.device)
    entries = vlm.extra_embeddings.entries
    scorer(packed)[0].sum().backward()
    gradient = entries.grad.clone()
    for place in [(0, 0, 5), (3, 2, 40), (1, 3, 7), (2, 1, 90)]:
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                entries[place] += step
                values.append(float(scorer(packed)[0].sum()))
                entries[place] -= step
        measured = (values[0] - values[1]) / 2e-5
        assert float(gradient[place]) == pytest.approx(measured, rel=1e-5, abs=1e-7)
    assert float(gradient[:4].abs().sum(-1).min()) > 0, "every row of a category in the batch"
    assert not gradient[4].any(), "category 4 is in no prompt: exactly zero"


def test_frozen_entries_have_no_gradient(load_vlm, digits_task):
    vlm = with_slots(load_vlm, torch.float32, trainable=False, family="gemma3")
    batch = groups(
        vlm, prompts(digits_task), PromptEncoder(vlm, Loader(digits_task.images, 32), 512), [2], [3], image=True
    )
    scorer = PolicyScorer(vlm, temperature=1.0, chunk=64)
    scorer(pack_shared(batch, vlm.family, vlm.device))[0].sum().backward()
    assert vlm.extra_embeddings.entries.grad is None


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_hold_the_ids_of_their_categories(load_vlm, digits_task, family):
    vlm = with_slots(load_vlm, torch.float32, family=family)
    encoded = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(prompts(digits_task))
    for prompt, found in zip(prompts(digits_task), encoded, strict=True):
        beyond = found.ids[found.ids >= vlm.extra_embeddings.first] - vlm.extra_embeddings.first
        assert beyond.tolist() == [4 * entry + row for entry in prompt.categories for row in range(4)]
    image = vlm.model.config.image_token_id
    last = [int((found.ids == image).nonzero().max()) for found in encoded]
    assert all(
        place > int((found.ids >= vlm.extra_embeddings.first).nonzero().max())
        for place, found in zip(last, encoded, strict=True)
    )


def test_rows_are_what_the_first_layer_sees(load_vlm):
    # Gemma multiplies embeddings of words by the root of the width; image features and these rows come as they are
    vlm = with_slots(load_vlm, torch.float32, family="gemma3")
    embed = vlm.model.get_input_embeddings()
    ids = torch.tensor([7, vlm.extra_embeddings.first + 2 * 4 + 1])
    found = embed(ids)
    assert torch.equal(found[1], vlm.extra_embeddings.entries[2, 1])
    width = vlm.extra_embeddings.entries.shape[-1]
    assert torch.allclose(found[0], embed.weight[7] * width**0.5, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_meter_counts_what_the_encoder_makes(load_vlm, untrained_folders, digits_task, family):
    tokens = 16 if family == "qwen2_5_vl" else 4  # of an image
    vlm = with_slots(load_vlm, torch.float32, family=family, width=tokens)
    asked = prompts(digits_task)
    encoded = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(asked)
    measure = meter.of_folder(untrained_folders[family], family)
    assert measure.tokens(asked, 32) == [len(found.ids) for found in encoded]


def test_a_model_is_saved_as_it_was_without_slots(load_vlm, untrained_folders, tmp_path):
    from safetensors.torch import load_file

    vlm = with_slots(load_vlm, torch.float32, family="gemma3")
    with extra_embeddings.detached(vlm.model):
        vlm.model.save_pretrained(tmp_path)
    saved, original = (
        load_file(tmp_path / "model.safetensors"),
        load_file(untrained_folders["gemma3"] / "model.safetensors"),
    )
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in saved)
    assert vlm.model.get_input_embeddings() is vlm.extra_embeddings


def test_no_id_beyond_the_vocabulary_is_a_target(load_vlm, digits_task):
    from common.forward.packing import score_prompts

    vlm = with_slots(load_vlm, torch.float32, family="gemma3")
    batch = groups(
        vlm, prompts(digits_task), PromptEncoder(vlm, Loader(digits_task.images, 32), 512), [1, 1, 1], [3], image=True
    )
    packed = pack_shared(batch, vlm.family, vlm.device)
    everything = score_prompts(packed, vlm.banned, vlm.extra_embeddings.first)
    assert len(everything.targets) > len(packed.targets) and int(everything.targets.max()) < vlm.extra_embeddings.first
    PolicyScorer(vlm, temperature=1.0, chunk=64)(everything)
