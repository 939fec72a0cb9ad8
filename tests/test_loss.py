"""GRPO's objective: derived by hand, by autograd, and against TRL's own code."""

from __future__ import annotations

import inspect
import itertools
import math
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.config.schema import AGGREGATIONS, LEVELS, LOSS_TYPES, SCALINGS, GRPOConfig
from common.rewards import Scores
from common.rollout.base import Completion
from common.training.grpo import variants
from common.training.grpo.batch import RolloutBatch
from common.training.grpo.loss import (
    LossInputs,
    advantages,
    clipped,
    grpo_loss,
    importance_correction,
    policy_loss,
    scaled,
    token_weights,
)
from common.types import UserError


def inputs(**changes):
    logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    values = {
        "logps": logps,
        "old_logps": logps.detach(),
        "ref_logps": None,
        "advantages": torch.tensor([1.0, -1.0]),
        "weights": token_weights("grpo", torch.tensor([2, 1]), 2, 2, 3, 8),
        "owner": torch.tensor([0, 0, 1]),
    }
    return LossInputs(**{**values, **changes})


def test_on_policy_loss_and_gradient():
    given = inputs()
    out = policy_loss(given, clipped(0.2, 0.2), beta=0.0)
    # completion means -1 and +1, averaged over two completions
    assert out.loss.item() == pytest.approx(0.0)
    out.loss.backward()
    # d/dlogp of -A * ratio / (length * completions) at ratio 1: -1 / 4, -1 / 4, +1 / 2
    assert given.logps.grad.tolist() == pytest.approx([-0.25, -0.25, 0.5])


def test_clipping():
    # ratios e^0.5 = 1.649 and e^-0.5 = 0.607 and 1; advantages 1, 1, -1
    old = torch.tensor([-1.5, -1.5, -0.5])
    given = inputs(old_logps=old)
    out = policy_loss(given, clipped(0.2, 0.2), beta=0.0)
    # token losses -min(1.649, 1.2) = -1.2, -min(0.607, 0.8) = -0.607, +1
    expected = ((-1.2 - math.exp(-0.5)) / 2 + 1) / 2
    assert out.loss.item() == pytest.approx(expected, abs=1e-6)
    assert (out.means["clip_ratio/low_mean"], out.means["clip_ratio/high_mean"]) == ((0, 3), (1, 3))
    assert (out.lowest, out.highest) == (0, 0.5)
    out.loss.backward()
    assert given.logps.grad[0] == 0, "a clipped token has no gradient"


def test_clipping_low():
    given = inputs(old_logps=torch.tensor([-1.0, -2.0, 0.5]))  # ratio e^-1 at advantage -1
    assert policy_loss(given, clipped(0.2, 0.2), 0.0).means["clip_ratio/low_mean"] == (1, 3)


def test_kl_is_k3():
    given = inputs(ref_logps=torch.tensor([-1.5, -2.0, -0.5]), advantages=torch.zeros(2))
    out = policy_loss(given, clipped(0.2, 0.2), beta=0.1)
    # difference -0.5: exp(-0.5) + 0.5 - 1 = 0.10653; the other tokens have none
    kl = math.exp(-0.5) + 0.5 - 1
    assert out.means["kl"] == (pytest.approx(kl, abs=1e-6), 3)
    assert out.loss.item() == pytest.approx(0.1 * (kl / 2) / 2, abs=1e-7)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up(loss_type):
    lengths, size = [2, 1, 3, 2], 2
    logps = torch.randn(8, generator=torch.Generator().manual_seed(0))
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    advantage = torch.tensor([0.3, -1.0, 0.7, 0.1])
    old = logps + 0.1 * torch.arange(8)
    weights = token_weights(loss_type, torch.tensor(lengths), size, 4, 8, 5)

    def loss(tokens, completions, first):
        given = LossInputs(
            logps[tokens], old[tokens], old[tokens], advantage[completions], weights[completions], owner[tokens] - first
        )
        return float(policy_loss(given, clipped(0.2, 0.2), 0.04).loss)

    whole = loss(slice(0, 8), slice(0, 4), 0)
    assert loss(slice(0, 3), slice(0, 2), 0) + loss(slice(3, 8), slice(2, 4), 2) == pytest.approx(whole, abs=1e-7)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 4.0]])
    # row 0: mean 0.5, unbiased std sqrt(1 / 3); row 2: mean 1, unbiased std 2
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (2 + 1e-4)
    expected = [[a, -a, -a, a], [0, 0, 0, 0], [-b, -b, -b, 3 * b]]
    assert scaled(rewards).tolist() == [pytest.approx(row, abs=1e-6) for row in expected]


def test_importance_correction_by_hand():
    # differences ln 2 and ln 8 in the first completion, 0 in the second; sequence ratio 16 and 1
    old, sampled = torch.tensor([2.0, 8.0, 1.0]).log(), torch.zeros(3)
    owner = torch.tensor([0, 0, 1])
    expected = {
        "token_truncate": [2, 3, 1],
        "token_mask": [2, 0, 1],
        "sequence_truncate": [3, 3, 1],
        "sequence_mask": [0, 0, 1],
    }
    for mode, values in expected.items():
        assert importance_correction(old, sampled, owner, 2, mode, cap=3.0).tolist() == pytest.approx(values), mode


def padded(values, lengths):
    """[T] -> [S, R], zeros as padding."""
    return torch.nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True)


def trl_loss(case, loss_type, level, beta, correct_kl, correction, epsilon_high=0.28):
    """TRL's own `_compute_loss` on the same numbers; the trainer around it is a stand-in that hands them over."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    lengths = case["lengths"]
    mask = padded(torch.ones(sum(lengths)), lengths) * case["kept"][:, None]
    logps = padded(case["logps"], lengths).detach().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.ones_like(mask), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        loss_type=loss_type,
        args=SimpleNamespace(
            use_bias_correction_kl=correct_kl,
            delta=None,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
        ),
        use_vllm=correction is not None,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=12,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _entropy_bonus_enabled=False,
        _metrics={"train": {key: [] for key in TRL_METRICS}},
    )
    batch = {
        "prompt_ids": torch.zeros(len(lengths), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(lengths), 1),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask,
        "advantages": case["advantages"],
        "old_per_token_logps": padded(case["old_logps"], lengths),
        "ref_per_token_logps": padded(case["ref_logps"], lengths),
        "num_items_in_batch": mask.sum(),
    }
    if correction is not None:
        batch["importance_sampling_ratio"] = padded(correction, lengths)
    inspect.unwrap(GRPOTrainer._compute_loss)(trainer, None, batch).backward()
    gradient = torch.cat([row[:n] for row, n in zip(logps.grad, lengths, strict=True)])
    loss = inspect.unwrap(GRPOTrainer._compute_loss)(trainer, None, batch)
    return loss.item(), gradient, {key: values[0] for key, values in trainer._metrics["train"].items() if values}


TRL_METRICS = ["kl", "entropy"] + [
    f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")
]
TRL_METRICS.append("cispo_clip_ratio")


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (8,), generator=generator).tolist()

    def near(values, spread):
        return values + spread * torch.randn(len(values), generator=generator, dtype=torch.float64)

    logps = -torch.rand(sum(lengths), generator=generator, dtype=torch.float64) * 3
    return {
        "lengths": lengths,
        "kept": torch.ones(8) if seed % 2 else torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0]),
        "logps": logps.requires_grad_(),
        "old_logps": near(logps.detach(), 0.4),
        "ref_logps": near(logps.detach(), 0.6),
        "sampled_logps": near(logps.detach(), 0.5),
        "advantages": torch.randn(8, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("corrected", [False, True], ids=["", "importance"])
@pytest.mark.parametrize(
    ("beta", "correct_kl"), [(0.0, False), (0.04, False), (0.04, True)], ids=["no kl", "kl", "kl x ratio"]
)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradient_and_metrics_equal_trl(loss_type, level, beta, correct_kl, corrected, seed):
    case = random_case(seed)
    counts = torch.tensor(case["lengths"]) * case["kept"].long()
    owner = torch.repeat_interleave(torch.arange(8), torch.tensor(case["lengths"]))
    correction = None
    if corrected:
        correction = importance_correction(case["old_logps"], case["sampled_logps"], owner, 8, "token_truncate", 3.0)
    given = LossInputs(
        case["logps"],
        case["old_logps"],
        case["ref_logps"] if beta else None,
        case["advantages"],
        # TRL normalises bnpo within the device batch: all eight completions as one group
        token_weights(loss_type, counts, 8 if loss_type == "bnpo" else 4, 8, int(counts.sum()), 12),
        owner,
        correction,
    )
    out = policy_loss(given, clipped(0.2, 0.28), beta, level, correct_kl)
    out.loss.backward()
    loss, gradient, metrics = trl_loss(case, loss_type, level, beta, correct_kl, correction)
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    assert float((case["logps"].grad - gradient).abs().max()) < 1e-6
    ours = {name: total / count for name, (total, count) in out.means.items()}
    ours |= {"clip_ratio/low_min": out.lowest, "clip_ratio/high_max": out.highest}
    del metrics["entropy"]  # not the loss's business
    assert ours == {name: pytest.approx(value, abs=1e-6, nan_ok=True) for name, value in metrics.items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", ["cispo", "sapo"])
def test_other_losses_equal_trl(name, beta, seed):
    case = random_case(seed)
    counts = torch.tensor(case["lengths"]) * case["kept"].long()
    owner = torch.repeat_interleave(torch.arange(8), torch.tensor(case["lengths"]))
    mean = {"cispo": "dapo", "sapo": "grpo"}[name]  # what TRL divides by
    given = LossInputs(
        case["logps"],
        case["old_logps"],
        case["ref_logps"] if beta else None,
        case["advantages"],
        token_weights(mean, counts, 4, 8, int(counts.sum()), 12),
        owner,
    )
    config = GRPOConfig(name="grpo", learning_rate=1e-6, epochs=1.0, group_size=4, beta=beta, epsilon=0.2)
    out = variants.cispo(given, config, cap=1.3) if name == "cispo" else variants.sapo(given, config)
    out.loss.backward()
    loss, gradient, metrics = trl_loss(case, name, "token", beta, False, None, epsilon_high=1.3)
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    assert float((case["logps"].grad - gradient).abs().max()) < 1e-6
    if name == "cispo":
        total, count = out.means["clip_ratio/high_mean"]
        assert total / count == pytest.approx(metrics["cispo_clip_ratio"], abs=1e-6) and total > 0


def test_leave_one_out_compares_with_the_others():
    parts = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([1.0, 0.5])
    total = (parts * weights[:, None, None]).sum(0)
    expected = [[row[i] - (row.sum() - row[i]) / 4 for i in range(5)] for row in total]
    assert torch.allclose(variants.rloo(parts, weights, None), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(k):
    """Every choice of k completions is worth 1 if one of it is right; a completion gets the mean of its choices'."""
    groups = torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0] * 5, [1] * 5])
    found = variants.pass_at_k(2 * groups[None].double(), torch.ones(1), None, k=k, correct_from=2)
    for row, group in zip(found, groups.tolist(), strict=True):
        choices = list(itertools.combinations(range(5), k))
        worth = [max(group[i] for i in choice) for choice in choices]
        mean, spread = np.mean(worth), np.std(worth)
        own = [np.mean([w for w, c in zip(worth, choices, strict=True) if i in c]) - mean for i in range(5)]
        expected = [value / (spread + 1e-4) if spread else 0.0 for value in own]
        assert row.tolist() == pytest.approx(expected, abs=1e-9)
    with pytest.raises(UserError, match="k=6 must be between 1 and trainer.group_size=5"):
        variants.pass_at_k(groups[None], torch.ones(1), None, k=6, correct_from=1)


def test_importance_has_a_floor():
    old, sampled = torch.tensor([0.0, math.log(3.0), 0.0]), torch.tensor([math.log(4.0), 0.0, math.log(2.0)])
    owner = torch.tensor([0, 0, 1])  # ratios 1/4, 3; 1/2: of the completions 3/4 and 1/2
    for mode, values in {
        "token_truncate": [0.6, 2, 0.6],
        "token_mask": [0, 0, 0],
        "sequence_truncate": [0.75, 0.75, 0.6],
        "sequence_mask": [0.75, 0.75, 0],
    }.items():
        found = importance_correction(old, sampled, owner, 2, mode, cap=2.0, floor=0.6)
        assert found.tolist() == pytest.approx(values), mode


def trl_advantages(parts, weights, scaling, aggregation):
    """The statements of TRL that turn rewards into advantages, run as they stand in its source."""
    from trl.trainer import grpo_trainer

    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    start = source.index('        if self.multi_objective_aggregation == "sum_then_normalize":')
    end = source.index("        # Unscorable completions")
    per_function = parts.flatten(1).T.clone()
    values = {
        **vars(grpo_trainer),
        "self": SimpleNamespace(
            multi_objective_aggregation=aggregation,
            scale_rewards=scaling,
            reward_weights=weights,
            reward_funcs=list(weights),
        ),
        "rewards_per_func": per_function,
        "num_generations": parts.shape[2],
        "device": "cpu",
        "unscorable_mask": torch.zeros(len(per_function), dtype=torch.bool),
    }
    exec(textwrap.dedent(source[start:end]), values)
    return values["advantages"].view(parts.shape[1:])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_advantages_equal_trl(scaling, aggregation):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 5, 4, generator=generator)
    parts[:, 2] = parts[:, 2, :1]  # one group without differences
    weights = torch.tensor([1.0, 0.5, 2.0])
    ours, theirs = (f(parts, weights, scaling, aggregation) for f in (advantages, trl_advantages))
    assert float(theirs.abs().max()) > 0.5
    assert float((ours - theirs).abs().max()) < 1e-6


@pytest.mark.parametrize(("high", "held"), [(None, 1.1), (0.3, 1.25)])
def test_the_default_loss_takes_its_values_from_the_configuration(high, held):
    """One token of advantage 1 and ratio 1.25: its loss is the ratio, cut at 1.1 unless epsilon_high lets it through."""
    values = {"epsilon": 0.1, "epsilon_high": high, "beta": 0.0}
    config = GRPOConfig(name="grpo", learning_rate=1e-6, epochs=1.0, group_size=2, **values)
    logps = torch.tensor([math.log(1.25)], requires_grad=True)
    given = LossInputs(logps, torch.zeros(1), None, torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.long))
    assert grpo_loss(given, config).loss.item() == pytest.approx(-held)
    others = {"beta": 0.5, "importance_sampling_level": "sequence", "use_bias_correction_kl": True}
    config = replace(config, **others)
    given = replace(given, ref_logps=torch.tensor([-0.3]))
    expected = policy_loss(given, clipped(0.1, 0.1 if high is None else high), 0.5, "sequence", True)
    other = policy_loss(given, clipped(0.1, 0.1), 0.5)
    assert grpo_loss(given, config).loss.item() == expected.loss.item() != other.loss.item()


@pytest.mark.parametrize(("masked", "expected"), [(False, [2, 3]), (True, [2, 0])])
def test_a_truncated_completion_counts_unless_it_is_masked(masked, expected):
    done, cut = (Completion(torch.zeros(n), torch.zeros(n), "", truncated=n == 3) for n in (2, 3))
    batch = RolloutBatch([], [], [[done, cut]], Scores({}, [0.0, 0.0]), torch.zeros(1, 2))
    assert batch.lengths(without_truncated=masked).tolist() == expected
