"""The doctor finds what makes a training useless, and passes a sound one."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.config.schema import GRPOConfig
from common.cost.estimate import Cost
from common.cost.update import GIB
from common.data.loading import Loader
from common.forward.packing import SharedPrefix
from common.models.encoder import PromptEncoder
from common.rewards import Reward, equality
from common.rollout.base import Decoding
from common.rollout.hf import HFRollout
from common.run import doctor
from common.run.doctor import check_memory
from common.types import UserError
from tests.conftest import NEWER
from tests.rewards import shorter

DECODING = Decoding(1.0, 0, 1.0, 12)
COST = Cost((10, 20), 12, {12: {"training": 1e12}}, {"backward": {"weights": 50.0 * GIB}}, 100, 1, {12: 1e9})


@pytest.fixture
def examine(load_vlm, digits_task, think):
    """`examine(decoding=..., ...)`: verdicts by check, and the findings."""

    def run(family="qwen2_vl", rollout=HFRollout, **changes):
        vlm = load_vlm(family=family)
        values = {
            "vlm": vlm,
            "encoder": PromptEncoder(vlm, Loader(digits_task.images, 32), 512),
            "rollout": rollout(vlm),
            "prompts": think.train_prompts(digits_task),
            "rewards": {"short": Reward(1.0, shorter)},
            "decoding": DECODING,
            "config": GRPOConfig("grpo", learning_rate=1e-3, epochs=1.0, group_size=4, beta=0.04, epsilon=0.2),
            "image_size": 32,
            "updates": 100,
            "ranks": 1,
            "cost": COST,
            "seed": 1,
        }
        findings = doctor.examine(**{**values, **changes})
        return {finding.check: finding.verdict for finding in findings}, findings

    return run


class Ending(HFRollout):
    """An untrained model hardly ever ends its reply by itself."""

    def generate(self, requests, group_size, decoding):
        found = super().generate(requests, group_size, decoding)
        return [[replace(c, truncated=False) for c in group] for group in found]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", *NEWER, "gemma3"])
def test_a_sound_training_passes(examine, family):
    verdicts, findings = examine(family, Ending)
    assert set(verdicts.values()) == {"ok"} and len(verdicts) == 8
    doctor.refuse(findings)


def failed(found, check, message):
    verdicts, findings = found
    assert verdicts[check] == "failed"
    with pytest.raises(UserError, match=message):
        doctor.refuse(findings)


@pytest.mark.slow
def test_greedy_sampling_is_found(examine):
    failed(
        examine(decoding=replace(DECODING, top_k=1)), "sampling", "1.0 different completions of 4.*set rollout.top_k=0"
    )


@pytest.mark.slow
def test_rewards_without_differences_are_found(examine):
    found = examine(rewards={"equality": Reward(1.0, equality)})  # an untrained model is never right
    failed(found, "rewards", "64 of 64 groups without differences.*'equality' was always 0.*begin with SFT")


def test_equal_rewards_within_every_group_ask_for_larger_groups():
    total = [0.0, 0.0, 1.0, 1.0]  # two groups of two, each prompt always or never right
    finding = doctor.check_rewards(total, {"equality": total}, 2)
    assert finding.verdict == "failed" and "2 of 2 groups without differences; mean reward 0.500" in finding.seen
    with pytest.raises(UserError, match="Raise trainer.group_size or rollout.temperature"):
        doctor.refuse([finding])


def test_a_reward_that_pays_nobody_is_named_beside_one_that_differs():
    total = [0.0, 1.0, 1.0, 0.0]
    finding = doctor.check_rewards(total, {"accuracy": total, "format": [0.0] * 4, "short": [1.0] * 4}, 2)
    assert finding.verdict == "warning" and finding.fix.count("~rewards.") == 2
    assert "'format' was always 0, 'short' was always the same" in finding.seen and "'accuracy'" not in finding.seen


def test_a_wrong_mask_is_found(examine, monkeypatch):
    original = SharedPrefix.suffix_keys

    def blind_to_the_first_token(self, window):
        index, mask = original(self, window)
        return index, torch.cat([torch.zeros_like(mask[..., :1]), mask[..., 1:]], -1)

    monkeypatch.setattr(SharedPrefix, "suffix_keys", blind_to_the_first_token)
    failed(examine(), "shared against plain forward", "trainer.impl=plain")


@pytest.mark.slow
def test_a_sampler_that_disagrees_is_found(examine):
    class Distorted(HFRollout):
        def generate(self, requests, group_size, decoding):
            found = super().generate(requests, group_size, decoding)
            return [[replace(c, logps=c.logps - 0.01) for c in group] for group in found]

    failed(examine(rollout=Distorted), "sampler against trainer", "rollout=hf")
    config = GRPOConfig(
        "grpo", 1e-3, epochs=1.0, group_size=4, beta=0.0, epsilon=0.2, importance_correction="token_mask"
    )
    verdicts, findings = examine(rollout=Distorted, config=config)
    assert verdicts["sampler against trainer"] == "warning"
    doctor.refuse(findings)


@pytest.mark.slow
def test_the_plain_forward_needs_no_comparison(examine):
    config = GRPOConfig("grpo", 1e-3, epochs=1.0, group_size=4, beta=0.0, epsilon=0.2, impl="plain")
    assert "shared against plain forward" not in examine(config=config)[0]


@pytest.mark.slow
def test_cut_completions_are_named_first(examine):
    verdicts, findings = examine()
    assert verdicts["rewards"] == "warning"
    seen = next(finding.seen for finding in findings if finding.check == "rewards")
    assert re.match(r"\d\d % of completions were cut at rollout.max_completion_tokens=12; ", seen)


@pytest.mark.slow
def test_few_flat_groups_are_no_verdict(examine):
    asked = []

    def seldom(samples):
        asked.append(len(samples))
        return [float(len(asked) > 3 and i == 0) for i, _ in enumerate(samples)]  # the first 24 groups are flat

    verdicts, findings = examine(rewards={"seldom": Reward(1.0, seldom)})
    assert verdicts["rewards"] == "warning" and "31 of 32" in findings[2].seen


@pytest.mark.slow
def test_missing_image_tokens_are_found(examine):
    failed(examine(image_size=64), "prompts", "has 4 image tokens instead of 16")


def test_a_completion_that_does_not_fit_is_found(examine):
    class Short(HFRollout):  # sampling 2,000 tokens would take minutes
        def generate(self, requests, group_size, decoding):
            return super().generate(requests, group_size, replace(decoding, max_tokens=4))

    failed(examine(rollout=Short, decoding=replace(DECODING, max_tokens=2048)), "prompts", "max_completion_tokens")


def test_memory_that_the_gpu_lacks_is_found(monkeypatch):
    """50 GiB computed; on the CPU nothing is compared."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 7 * GIB)
    for has, verdict in ((80, "ok"), (40, "failed")):
        properties = SimpleNamespace(total_memory=has * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        finding = check_memory(COST, device)
        assert finding.verdict == verdict and f"this GPU has {has}.00 GiB, the examination took 7.00" in finding.seen
    finding = check_memory(COST, torch.device("cpu"))
    assert finding.verdict == "ok" and "50.00 GiB per GPU, most in backward: weights 50.00" in finding.seen


def test_long_trainings_are_examined_unasked():
    config = GRPOConfig(
        "grpo", learning_rate=1e-3, epochs=1.0, group_size=8, beta=0.0, epsilon=0.2, prompts_per_update=16
    )
    assert not doctor.is_long(100, config) and doctor.is_long(200, config)
