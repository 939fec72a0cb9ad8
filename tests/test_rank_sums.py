"""Two ranks compute what one does: every denominator, spread and metric counts the data of both. No processes."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from common.config.schema import AGGREGATIONS, LOSS_TYPES, SCALINGS, ModelConfig
from common.data.loading import Loader
from common.forward.packing import PromptGroup
from common.models import vlm
from common.models.encoder import EncodedPrompt, PromptEncoder
from common.rewards import Reward, Scores
from common.rollout.base import Completion, Decoding
from common.runtime.distributed import interleave, share_of
from common.training.base import Epochs
from common.training.grpo import batch
from common.training.grpo import trainer as grpo_module
from common.training.grpo.batch import RolloutBatch
from common.training.grpo.loss import grpo_advantages
from common.training.grpo.trainer import GRPOTrainer
from common.training.sft import SFTTrainer
from common.types import Prompt
from tests.test_training import grpo_options, options


class PlainEngine:
    """Autograd and nothing else; averages of the gradients over ranks are taken by the test, as DeepSpeed would."""

    def __init__(self, module, *_):
        self.module = module.train()

    def __call__(self, *inputs):
        return self.module(*inputs)

    def backward(self, loss, last):
        loss.backward()

    def step(self, update):
        return {}

    def whole_weights(self):
        return nullcontext()


class Replies:
    """A sampler of replies that are known by prompt: the longer the place of its picture, the longer the reply."""

    def __init__(self, policy):
        self.allowed = [i for i in range(100, 200) if i not in policy.banned]

    def generate(self, requests, group_size, decoding):
        return [[self.reply(request.seed, place) for place in range(group_size)] for request in requests]

    def refresh(self, version):
        assert version == 0, "one update alone"

    def wake(self): ...

    def rest(self): ...

    def reply(self, seed, place):
        number = int(seed.rpartition("-")[2])  # of the prompt in the update
        ids = torch.tensor([self.allowed[(7 * number + 3 * place + j) % 90] for j in range(1 + number + place)])
        return Completion(ids, torch.full((len(ids),), -2.0), f"{number} {place}", truncated=place == number % 3)


# differs within groups, and from rank to rank in spread and mean
REWARDS = {
    "short": Reward(1.0, lambda samples: [float(len(s.completion)) / (1 + int(s.completion[0])) for s in samples]),
    "odd": Reward(0.5, lambda samples: [float(int(s.completion[0]) * int(s.completion[2]) % 3) for s in samples]),
}


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(one, several):
    """Of a step as one rank and as several: the same metrics everywhere, and the same mean gradient."""
    (metrics, gradient), found = one, [gradient for _, gradient in several]
    for other, _ in several:
        assert other == {key: pytest.approx(value, rel=1e-4, abs=1e-7) for key, value in metrics.items()}
    largest = max(float(g.abs().max()) for g in gradient.values())
    assert largest > 1e-3
    for name, value in gradient.items():
        mean = sum(g[name] for g in found) / len(found)
        assert float((mean - value).abs().max()) < 1e-4 * largest, name


@pytest.fixture(scope="module")
def policies(untrained_folder):
    """The same model for the one rank (None) and for each of two; nothing here takes an optimizer step."""
    config = ModelConfig(
        "untrained", "qwen2_vl", str(untrained_folder), dtype="float32", image_size=32, max_prompt_tokens=512
    )
    return {number: vlm.load(untrained_folder, config, torch.device("cpu")) for number in (None, 0, 1)}


@pytest.fixture
def grpo_step(policies, digits_task, think, monkeypatch):
    """One update of the real trainer on this rank: its metrics, and the gradient of its weights."""
    monkeypatch.setattr(grpo_module, "Engine", PlainEngine)
    prompts = think.train_prompts(digits_task)[:40:5]

    def step(number, **changes):
        policy = policies[number]
        policy.model.zero_grad(set_to_none=True)
        trainer = GRPOTrainer(
            vlm=policy,
            encoder=PromptEncoder(policy, Loader(digits_task.images, 32), 512),
            rollout=Replies(policy),
            prompts=Epochs(lambda epoch: prompts),
            rewards=REWARDS,
            decoding=Decoding(0.8, 0, 1.0, 12),
            config=grpo_options(group_size=3, self_check=False, **changes),
            deepspeed={},
            updates=1,
            seed=1,
        )
        return trainer.step(0).metrics, gradients(policy.model)

    return step


@pytest.mark.sampled
@pytest.mark.parametrize(
    "changes",
    [
        *({"loss_type": kind} for kind in LOSS_TYPES),
        {"loss_type": "dapo", "mask_truncated_completions": True},
        {"scale_rewards": "batch"},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"shuffle_rewards": True},
    ],
    ids=lambda changes: ", ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_a_grpo_update_of_two_ranks_is_that_of_one(ranks, grpo_step, changes):
    assert_same(grpo_step(None, **changes), ranks(2, lambda number: grpo_step(number, **changes)))


@pytest.mark.parametrize("loss", ["answer", "everything"])
def test_an_sft_update_of_two_ranks_is_that_of_one(ranks, policies, digits_task, no_think, monkeypatch, loss):
    monkeypatch.setattr("common.training.sft.Engine", PlainEngine)
    prompts = no_think.train_prompts(digits_task)[::40][:4]

    def step(number):
        policy = policies[number]
        policy.model.zero_grad(set_to_none=True)
        trainer = SFTTrainer(
            vlm=policy,
            encoder=PromptEncoder(policy, Loader(digits_task.images, 32), 512),
            rollout=Replies(policy),
            prompts=Epochs(lambda epoch: prompts),
            loss=loss,
            config=options(),
            deepspeed={},
            updates=1,
            seed=1,
            reply=lambda label: f"{label} " * (1 + len(label)),  # ranks get different numbers of tokens
        )
        return trainer.step(0).metrics, gradients(policy.model)

    assert_same(step(None), ranks(2, step))


GENERATOR = torch.Generator().manual_seed(0)
PARTS = torch.rand(2, 6, 4, generator=GENERATOR, dtype=torch.float64) * torch.arange(1, 7)[:, None]
WEIGHTS = {"a": 1.0, "b": 0.5}


def scores(which):
    """The rewards of some of the six prompts."""
    parts = {name: values[which].flatten().tolist() for name, values in zip("ab", PARTS, strict=True)}
    total = [a + 0.5 * b for a, b in zip(parts["a"], parts["b"], strict=True)]
    return Scores(parts, total, {"b": [place % 5 == 0 for place in which for _ in range(4)]})


@pytest.mark.parametrize("seed", [None, 3], ids=["", "shuffled"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_completions_are_compared_over_all_ranks(ranks, scaling, aggregation, seed):
    def compare(_):
        config = SimpleNamespace(scale_rewards=scaling, multi_objective_aggregation=aggregation)
        return batch.compare(
            scores(share_of(list(range(6)))), WEIGHTS, 4, partial(grpo_advantages, config=config), seed
        )

    (whole, expected), found = compare(None), ranks(3, compare)
    both = torch.stack(interleave([list(advantages) for _, advantages in found]))
    assert torch.allclose(both, expected, atol=1e-6)
    groups = [torch.tensor(used.total).view(-1, 4) for used, _ in found]
    assert torch.equal(torch.stack(interleave([list(group) for group in groups])).flatten(), torch.tensor(whole.total))
    gaps = [[used.missing["b"][start : start + 4] for start in range(0, 8, 4)] for used, _ in found]
    assert [gap for group in interleave(gaps) for gap in group] == whole.missing["b"]
    if seed is not None:
        assert sorted(whole.total) == pytest.approx(sorted(scores(range(6)).total)) and whole != scores(range(6))


def rollout(which):
    """The completions of some of the six prompts; prompts and completions of all lengths, some truncated."""
    groups, completions = [], []
    for place in which:
        lengths = range(1 + place, 5 + place)
        group = [Completion(torch.arange(n), torch.zeros(n), f"{place} {n}", n == 2 * place) for n in lengths]
        prompt = EncodedPrompt(torch.arange(10 + place), torch.zeros(1, 10 + place))
        completions.append(group)
        groups.append(PromptGroup(prompt, tuple(c.ids for c in group)))
    prompts = [Prompt(str(place), "?", "six") for place in which]
    advantages = torch.tensor([[place + 0.25 * j for j in range(4)] for place in which])
    return RolloutBatch(prompts, groups, completions, scores(which), advantages, resampled=len(which) // 2)


def test_a_rollout_is_described_over_all_ranks(ranks):
    whole = batch.describe(rollout(range(6)))
    assert whole.keys() >= {"reward", "rewards/b/mean", "rewards/b/missing", "tokens"}
    for found in ranks(2, lambda number: batch.describe(rollout(share_of(list(range(6)))))):
        # each rank has drawn one of its three prompts again, the one rank three of six
        assert found == {key: pytest.approx(value) for key, value in {**whole, "frac_resampled": 2 / 6}.items()}


def test_rows_of_all_ranks_stand_in_the_order_of_the_prompts(ranks):
    whole = batch.rows(1, rollout(range(6)))
    assert [row["image"] for row in whole] == [str(place) for place in range(6) for _ in range(4)]
    for found in ranks(3, lambda number: batch.rows(1, rollout(share_of(list(range(6)))))):
        assert found == whole
