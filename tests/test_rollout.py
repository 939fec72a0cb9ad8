"""Sampling: the same distribution that is scored, once per prompt, explicit about every choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.data.loading import Loader
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, pack_plain, pack_shared
from common.models.encoder import PromptEncoder
from common.rollout.base import Decoding
from common.rollout.hf import HFRollout, choose, truncate
from tests.conftest import NEWER
from tests.rollouts import requests

ABC = ["a", "b", "c"]
SAMPLE = Decoding(temperature=1.0, top_k=0, top_p=1.0, max_tokens=24)
GREEDY = Decoding(temperature=0.0, top_k=0, top_p=1.0, max_tokens=24)


@pytest.fixture(params=["qwen2_vl", *NEWER, "gemma3", "gemma3 causal"])
def setup(request, load_vlm, digits_task, think, no_think):
    family, _, causal = request.param.partition(" ")
    vlm = load_vlm(family=family, image_attention=causal or "family")
    prompts = [
        think.train_prompts(digits_task)[0],
        no_think.train_prompts(digits_task)[17],
        think.train_prompts(digits_task)[33],
    ]
    return vlm, PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(prompts)


@pytest.mark.sampled
@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.7, marks=pytest.mark.slow)])
def test_sampled_logps_equal_a_fresh_scoring_pass(setup, temperature):
    vlm, prompts = setup
    decoding = Decoding(temperature, top_k=0, top_p=1.0, max_tokens=24)
    found = HFRollout(vlm).generate(requests(prompts, ABC), 6, decoding)
    scorer = PolicyScorer(vlm, temperature, chunk=1024).eval()
    groups = [PromptGroup(p, tuple(c.ids for c in group)) for p, group in zip(prompts, found, strict=True)]
    with torch.no_grad():
        scored, _ = scorer(pack_plain(groups, vlm.family, vlm.pad, vlm.device))
    sampled = torch.cat([c.logps for group in found for c in group])
    assert float((sampled - scored).abs().max()) <= 1e-4


@pytest.fixture
def stock_logps(setup, untrained_folders):
    """Log-probabilities of a completion by transformers' own forward over its row, the softmax written out."""
    vlm, _ = setup
    model = AutoModelForImageTextToText.from_pretrained(untrained_folders[vlm.family.model_type])

    def score(prompt, completion, temperature):
        ids = torch.cat([prompt.ids, completion])[None]
        kinds = (ids == model.config.image_token_id).long()
        extra = {"token_type_ids": kinds} if prompt.blocks is not None else {}
        if prompt.grid is not None:
            extra = {"image_grid_thw": prompt.grid, "mm_token_type_ids": kinds}
            if vlm.family.model_type == "gemma4":
                extra = {"image_position_ids": prompt.grid}
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=prompt.pixel_values, **extra).logits[0, len(prompt.ids) - 1 : -1]
        kept = [i for i in range(logits.shape[1]) if i not in vlm.banned]
        exponentials = (logits.double() / temperature).exp()
        return torch.stack([row[i] / row[kept].sum() for row, i in zip(exponentials, completion, strict=True)]).log()

    return score


@pytest.mark.sampled
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_numbers_are_those_of_the_distribution_at_the_sampling_temperature(setup, stock_logps, temperature):
    vlm, prompts = setup
    decoding = Decoding(temperature, top_k=8, top_p=0.9, max_tokens=6)  # restrict what is drawn, not its numbers
    found = HFRollout(vlm).generate(requests(prompts, ABC), 2, decoding)
    groups = [PromptGroup(p, tuple(c.ids for c in group)) for p, group in zip(prompts, found, strict=True)]
    expected, cold = (
        torch.cat([stock_logps(group.prompt, ids, t) for group in groups for ids in group.completions])
        for t in (temperature, 1.0)
    )
    assert float((expected - cold).abs().max()) > 0.3, "the temperature matters"
    sampled = torch.cat([c.logps for group in found for c in group])
    assert float((sampled - expected).abs().max()) <= 1e-4
    scorer = PolicyScorer(vlm, temperature, chunk=4).eval()
    with torch.no_grad():
        plain = scorer(pack_plain(groups, vlm.family, vlm.pad, vlm.device))[0]
        shared = scorer(pack_shared(groups, vlm.family, vlm.device))[0]
    assert float((plain - expected).abs().max()) <= 1e-4 and float((shared - expected).abs().max()) <= 1e-4


def test_completions_differ_although_the_checkpoint_says_top_k_1(setup):
    vlm, prompts = setup
    assert vlm.model.generation_config.top_k in (1, 20, 64), "what the published checkpoints say"
    for group in HFRollout(vlm).generate(requests(prompts, ABC), 8, SAMPLE):
        assert len({c.text for c in group}) > 1


def test_banned_ids_are_never_sampled(setup):
    vlm, prompts = setup
    assert vlm.model.config.image_token_id in vlm.banned and vlm.pad in vlm.banned
    with torch.no_grad():  # make the image token by far the most probable one
        vlm.model.lm_head.weight[vlm.model.config.image_token_id] *= 50
    for group in HFRollout(vlm).generate(requests(prompts, ABC), 8, SAMPLE):
        assert not any(int(token) in vlm.banned for c in group for token in c.ids)


@pytest.mark.sampled
def test_greedy_equals_transformers_generate(setup):
    vlm, prompts = setup
    found = HFRollout(vlm).generate(requests(prompts, [""] * 3), 1, GREEDY)
    for prompt, (completion,) in zip(prompts, found, strict=True):
        kinds = (prompt.ids == vlm.model.config.image_token_id).long()[None]
        extra = {"token_type_ids": kinds} if prompt.blocks is not None else {}
        if prompt.grid is not None:
            extra = {"image_grid_thw": prompt.grid, "mm_token_type_ids": kinds}
            if vlm.family.model_type == "gemma4":
                extra = {"image_position_ids": prompt.grid}
        stock = vlm.model.generate(
            input_ids=prompt.ids[None],
            attention_mask=torch.ones_like(prompt.ids)[None],
            pixel_values=prompt.pixel_values,
            **extra,
            do_sample=False,
            max_new_tokens=24,
            suppress_tokens=list(vlm.banned),
        )[0, len(prompt.ids) :]
        assert completion.ids.tolist() == stock.tolist()[: len(completion.ids)]


@pytest.mark.sampled
def test_a_completion_depends_on_its_seed_alone(setup):
    vlm, prompts = setup
    rollout = HFRollout(vlm)
    together = rollout.generate(requests(prompts, ABC), 4, SAMPLE)
    alone = rollout.generate(requests(prompts[1:2], ["b"]), 4, SAMPLE)
    assert [c.ids.tolist() for c in together[1]] == [c.ids.tolist() for c in alone[0]]
    other = rollout.generate(requests(prompts[1:2], ["d"]), 4, SAMPLE)
    assert [c.ids.tolist() for c in other[0]] != [c.ids.tolist() for c in alone[0]]


def test_completions_end_once_or_are_marked_truncated(setup):
    vlm, prompts = setup
    for decoding in (SAMPLE, Decoding(1.0, 0, 1.0, 3)):
        for group in HFRollout(vlm).generate(requests(prompts, ABC), 8, decoding):
            for c in group:
                ends = [int(token) in vlm.eos for token in c.ids]
                assert not any(ends[:-1]) and ends[-1] is not c.truncated
                assert len(c.ids) == len(c.logps) <= decoding.max_tokens
                assert not c.truncated or len(c.ids) == decoding.max_tokens


@pytest.mark.sampled
def test_sampling_stops_when_the_last_completion_has_ended(setup, monkeypatch):
    vlm, prompts = setup
    # many ids end a completion, so ends come early, at different steps, and an ended row would soon not end again
    rollout = HFRollout(replace(vlm, eos=tuple(range(100, 160))))
    steps, forward = [], rollout._forward
    monkeypatch.setattr(rollout, "_forward", lambda *arguments: steps.append(1) or forward(*arguments))
    found = rollout.generate(requests(prompts, ABC), 8, Decoding(1.0, 0, 1.0, 200))
    longest = max(len(c.ids) for group in found for c in group)
    assert len({len(c.ids) for group in found for c in group}) > 3 and longest < 200
    assert len(steps) == longest, "one forward per token of the longest completion"


def test_image_is_encoded_once_per_prompt(setup, monkeypatch):
    vlm, prompts = setup
    calls = []
    original = type(vlm.model.model).get_image_features
    monkeypatch.setattr(
        type(vlm.model.model),
        "get_image_features",
        lambda self, pixel_values, *a, **k: calls.append(len(pixel_values)) or original(self, pixel_values, *a, **k),
    )
    HFRollout(vlm).generate(requests(prompts, ABC), 8, SAMPLE)
    assert calls == [sum(len(prompt.pixel_values) for prompt in prompts)], "one encoder call for three images"


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (20, 0.9), (1, 1.0)])
def test_truncation_equals_transformers(top_k, top_p):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits).softmax(-1)
    ours = truncate((logits / 0.8).softmax(-1).double(), top_k, top_p)
    assert torch.allclose(ours / ours.sum(-1, keepdim=True), expected.double(), atol=1e-6)


def test_inverse_cdf_draws_from_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = choose(probabilities.log().expand(10_000, -1), SAMPLE, uniform)
    assert torch.bincount(drawn, minlength=4).tolist() == pytest.approx([5000, 0, 3000, 2000], abs=1)
    edge = choose(probabilities[:2].log()[None], SAMPLE, torch.tensor([1 - 1e-17], dtype=torch.float64))
    assert edge.tolist() == [0], "rounding must not step to a token without mass"
