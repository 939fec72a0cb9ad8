"""Sampling one update ahead: of which weights, weighed how, and who waits for whom."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import replace

import pytest
import torch

from common.config.composition import validate
from common.rollout.hf import HFRollout
from common.types import UserError
from common.vlm.learner import check_logprobs
from tests.test_training import grpo

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]


class OwnWeights(HFRollout):
    """It samples with a copy, slowly, and minds being asked for two things at a time."""

    has_weight_copy = True

    def __init__(self, vlm, pause=0.0, broken_at=None):
        super().__init__(replace(vlm, model=copy.deepcopy(vlm.model)))
        self.policy, self.pause, self.broken_at = vlm.model, pause, broken_at
        self.free, self.threads = threading.Lock(), []

    def refresh(self, version):
        with self.alone():
            self.vlm.model.load_state_dict(self.policy.state_dict())
            self.version = version

    def generate(self, requests, group_size, decoding):
        self.threads.append(threading.current_thread().name.partition("_")[0])
        with self.alone():
            time.sleep(self.pause)
            if len(self.threads) == self.broken_at:
                raise UserError("the sampler is broken")
            return super().generate(requests, group_size, decoding)

    def alone(self):
        assert self.free.acquire(blocking=False), "asked for two things at a time"
        self.free.release()
        return self.free


def sampled(step):
    return [row["completion"] for row in step.rows]


@pytest.fixture
def ahead(load_vlm, digits_task, think):
    """A trainer that samples ahead, made by the options of its sampler."""
    made = []

    def make(**options):
        vlm = load_vlm()
        rollout = OwnWeights(vlm, **options)
        made.append(
            grpo(vlm, digits_task, think, rollout=rollout, overlap=True, importance_correction="token_truncate")
        )
        return made[-1], rollout

    yield make
    for trainer in made:
        trainer.close()


def test_a_batch_is_of_the_weights_before_the_update_that_it_waited_for(ahead, load_vlm, digits_task, think):
    trainer, rollout = ahead(pause=0.05)
    first = {name: weight.clone() for name, weight in rollout.policy.state_dict().items()}
    steps = [trainer.step(update) for update in range(4)]
    assert [{row["lag"] for row in step.rows} for step in steps] == [{0}, {1}, {1}, {1}]
    assert [step.metrics["sampling/lag"] for step in steps] == [0, 1, 1, 1]
    assert rollout.threads == ["MainThread", "rollout", "rollout", "rollout"]  # no batch behind the last update

    # the second batch, sampled by hand with the weights that the training began with
    vlm = load_vlm()
    vlm.model.load_state_dict(first)
    own = grpo(vlm, digits_task, think)
    assert sampled(steps[1]) == [c.text for group in own.samples(1, 0).completions for c in group]
    assert sampled(steps[0]) == [c.text for group in own.samples(0, 0).completions for c in group]
    own.close()


def test_what_the_policy_has_moved_since_weighs_each_token(ahead):
    """The ratio's mean over a batch's tokens, from the two log-probabilities themselves."""
    trainer, _ = ahead()
    steps = [trainer.step(0), trainer.step(1)]
    for step, moved in zip(steps, (False, True), strict=True):
        ratio = step.metrics["sampling/importance_sampling_ratio/max"]
        assert (abs(ratio - 1) > 1e-3) is moved
        assert (step.metrics["sampling/sampling_logp_difference/mean"] > 1e-4) is moved
    # the third batch, before its update: the policy of now against what the sampler has reported
    trainer.samples.wait()
    batch = trainer._score(2, trainer.samples.pending[1].result())
    with torch.no_grad():
        ratios = []
        for group, completions in zip(batch.groups, batch.completions, strict=True):
            now = trainer.engine(trainer._pack([group]))[0]
            ratios.append((now - torch.cat([c.logps for c in completions])).exp())
    ratio = torch.cat(ratios).clamp(max=3.0)
    third = trainer.step(2).metrics
    assert third["sampling/importance_sampling_ratio/mean"] == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert third["sampling/importance_sampling_ratio/max"] == pytest.approx(float(ratio.max()), rel=1e-4)


def test_an_evaluation_waits_for_the_batch_that_was_begun(ahead, load_vlm, digits_task, think):
    trainer, rollout = ahead(pause=2.0)
    trainer.step(0)
    assert not trainer.samples.pending[1].done()
    with trainer.sampling():
        assert trainer.samples.pending[1].done() and rollout.version == 1
        policy = rollout.policy.state_dict()
        assert all(torch.equal(policy[name], weight) for name, weight in rollout.vlm.model.state_dict().items())
    assert {row["lag"] for row in trainer.step(1).rows} == {1}


def test_what_breaks_in_the_sampler_ends_the_next_update(ahead):
    trainer, _ = ahead(broken_at=2)
    trainer.step(0)
    with pytest.raises(UserError, match="the sampler is broken"):
        trainer.step(1)


def test_no_thread_is_left_behind(load_vlm, digits_task, think):
    vlm = load_vlm()
    rollout = OwnWeights(vlm, pause=0.2)
    trainer = grpo(vlm, digits_task, think, rollout=rollout, overlap=True, importance_correction="token_mask")
    trainer.step(0)
    trainer.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollout")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "one update old.*trainer.importance_correction=token_truncate"),
        (["trainer.importance_correction=token_mask", "trainer.num_iterations=2"], "num_iterations=1"),
        (["trainer.importance_correction=token_mask", "trainer.zero_variance=resample"], "zero_variance=keep or skip"),
    ],
)
def test_refused_where_it_would_be_wrong(compose, changes, message):
    with pytest.raises(UserError, match=message):
        validate(compose("rollout.overlap=true", *changes))


def test_refused_for_a_sampler_that_shares_the_policys_weights(compose):
    config = validate(compose("rollout.overlap=true", "trainer.importance_correction=token_mask"))
    with pytest.raises(UserError, match="weights of its own.*rollout=vllm"):
        check_logprobs(config, HFRollout)
    check_logprobs(config, OwnWeights)
