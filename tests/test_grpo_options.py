"""What the GRPO trainer can do beyond the papers' setting, each against a plain computation or by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common.data.digits import NAMES
from common.data.loading import Loader
from common.forward import packing
from common.forward.logprobs import PolicyScorer
from common.forward.packing import pack_plain
from common.models.encoder import PromptEncoder
from common.rewards import Reward, accuracy, equality
from common.training.base import batch, total_updates
from tests.conftest import NEWER
from tests.test_loss import trl_loss
from tests.test_training import LORA, distance, grpo, grpo_options, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]


def steps(trainer, count):
    found = [trainer.step(update) for update in range(count)]
    trainer.close()
    return found


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_two_updates_per_batch_equal_a_plain_loop(load_vlm, digits_task, think, beta):
    vlm = load_vlm()
    trainer = grpo(vlm, digits_task, think, num_iterations=2, beta=beta, weight_decay=0.0, learning_rate=3e-3)
    first = trainer.step(0)
    batch = trainer.current
    second = trainer.step(1)
    assert trainer.current is batch and first.rows and not second.rows
    trainer.close()

    plain = load_vlm()
    scorer = PolicyScorer(plain, 1.0, 1024)
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0)
    counts = [len(c) for group in batch.groups for c in group.completions]
    old = None
    for _ in range(2):
        logps = scorer(pack_plain(batch.groups, plain.family, plain.pad, plain.device))[0].split(counts)
        old = old or [x.detach() for x in logps]  # also the reference: the weights before the first update
        losses = []
        for mine, before, advantage in zip(logps, old, batch.advantages.flatten(), strict=True):
            ratio = (mine - before).exp()
            kl = (before - mine).exp() - (before - mine) - 1
            losses.append((-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + beta * kl).mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        optimizer.step()
        if _ == 1:
            assert second.metrics["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    assert second.metrics["clip_ratio/region_mean"] > 0, "the second update meets clipped tokens"
    assert distance(weights(vlm.model), weights(plain.model)) < 3e-4  # 5 % of two updates at 3e-3


@pytest.mark.parametrize(("beta", "iterations"), [(0.0, 1), (0.04, 2)])
def test_steps_of_one_rollout_equal_trls(load_vlm, digits_task, think, beta, iterations):
    """`steps_per_generation` of TRL: each update on its own groups, against the policy that sampled all of them.

    The losses and their gradients are those of TRL's own code; torch's SGD makes the steps (Adam's would enlarge the
    rounding of the smallest gradients).
    """
    vlm = load_vlm()
    changes = {"beta": beta, "num_iterations": iterations, "learning_rate": 0.3, "optimizer": "torch.optim.SGD"}
    trainer = grpo(vlm, digits_task, think, steps_per_rollout=2, prompts_per_update=2, **changes)
    found = [trainer.step(update) for update in range(2 * iterations)]
    batch = trainer.current
    assert [bool(step.rows) for step in found] == [True] + [False] * (2 * iterations - 1)
    assert len(batch.groups) == 4 and found[-1].metrics["clip_ratio/region_mean"] > 0
    trainer.close()

    plain = load_vlm()
    scorer = PolicyScorer(plain, 1.0, 1024)
    optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.3)

    def logps_of(groups):
        return scorer(pack_plain(groups, plain.family, plain.pad, plain.device))[0]

    with torch.no_grad():
        old = [logps_of(batch.groups[part : part + 2]).double() for part in (0, 2)]
    losses = []
    for number in range(2 * iterations):
        part = number % 2
        groups = batch.groups[2 * part : 2 * part + 2]
        logps = logps_of(groups)
        case = {
            "lengths": [len(c) for group in groups for c in group.completions],
            "kept": torch.ones(8),
            "logps": logps.detach().double(),
            "old_logps": old[part],
            "ref_logps": old[part],  # the weights before the first update
            "advantages": batch.advantages[2 * part : 2 * part + 2].flatten().double(),
        }
        loss, gradient, _ = trl_loss(case, "grpo", "token", beta, False, None, epsilon_high=0.2)
        losses.append(loss)
        optimizer.zero_grad()
        logps.backward(gradient.to(logps))
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        optimizer.step()
    assert [step.metrics["loss"] for step in found] == pytest.approx(losses, abs=1e-5)
    assert distance(weights(vlm.model), weights(plain.model)) < 1e-5


def test_the_steps_of_a_rollout_are_counted(load_vlm, digits_task, think):
    """Other prompts in each step, a new batch after all of them; updates of an epoch, checkpoints and overlap."""
    trainer = grpo(load_vlm(), digits_task, think, steps_per_rollout=2, prompts_per_update=2)
    found = steps(trainer, 4)
    assert [len(step.rows) for step in found] == [16, 0, 16, 0]
    images = [[row["image"] for row in step.rows[::4]] for step in found[::2]]
    assert len(set(images[0]) | set(images[1])) == 8 or not set(images[0]) & set(images[1])
    config = grpo_options(steps_per_rollout=3, num_iterations=2, prompts_per_update=2, epochs=1.0)
    assert (config.updates_per_rollout, config.prompts_per_rollout) == (6, 6)
    assert total_updates(replace(config, updates=None), 13) == 18, "three batches of six prompts, six updates each"


def test_a_new_batch_after_every_second_update(load_vlm, digits_task, think):
    trainer = grpo(load_vlm(), digits_task, think, num_iterations=2)
    found = steps(trainer, 4)
    assert [bool(step.rows) for step in found] == [True, False, True, False]
    assert ["reward" in step.metrics for step in found] == [True, False, True, False]
    assert found[0].metrics["num_tokens"] == found[1].metrics["num_tokens"] < found[2].metrics["num_tokens"]


def test_skipped_groups_have_no_gradient_anyway(load_vlm, digits_task, think):
    ended = {}
    rewards = {"long": Reward(1.0, lambda samples: [float(len(s.completion) > 40) for s in samples])}
    for choice in ("keep", "skip"):
        vlm = load_vlm()
        found = steps(grpo(vlm, digits_task, think, zero_variance=choice, rewards=rewards), 3)
        ended[choice] = weights(vlm.model)
    assert 0 < found[0].metrics["frac_reward_zero_std"] < 1
    assert distance(ended["keep"], ended["skip"]) < 3e-5


def test_skipping_drops_the_kl_of_skipped_groups(load_vlm, digits_task, think):
    flat = {"never": Reward(1.0, equality)}  # an untrained model is never right
    norms = {}
    for choice in ("keep", "skip"):
        torch.manual_seed(0)
        vlm = load_vlm(lora=LORA)
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)  # away from the reference
        trainer = grpo(vlm, digits_task, think, zero_variance=choice, rewards=flat, beta=0.1)
        norms[choice] = steps(trainer, 1)[0].metrics["grad_norm"]
    assert norms["keep"] > 0 and norms["skip"] == 0


def test_resampling_draws_flat_groups_again_up_to_the_cap(load_vlm, digits_task, think, monkeypatch):
    trainer = grpo(
        load_vlm(),
        digits_task,
        think,
        zero_variance="resample",
        resample_rounds=2,
        self_check=False,
        rewards={"long": Reward(1.0, lambda samples: [float(len(s.completion) > 40) for s in samples])},
    )
    asked = []
    generate = trainer.rollout.generate
    monkeypatch.setattr(
        trainer.rollout, "generate", lambda r, g, d: asked.append([one.seed for one in r]) or generate(r, g, d)
    )
    metrics = steps(trainer, 1)[0].metrics
    assert len(asked[0]) == 4 and 1 <= len(asked) - 1 <= 2
    for attempt, seeds in enumerate(asked[1:]):
        assert all(seed.endswith(f"-again-{attempt}") for seed in seeds) and len(seeds) < 4
    assert metrics["frac_resampled"] == pytest.approx(sum(map(len, asked[1:])) / 4)


def test_refilling_asks_about_other_images_and_repeats_itself(load_vlm, digits_task, think):
    """Every group of an odd digit is flat, so other images take their places, as long as there are rounds."""

    def differs_for_even(samples):
        return [float(NAMES.index(s.label) % 2 == 0 and place % 2) for place, s in enumerate(samples)]

    found = []
    for _ in range(2):
        trainer = grpo(
            load_vlm(),
            digits_task,
            think,
            zero_variance="refill",
            resample_rounds=3,
            self_check=False,
            rewards={"even": Reward(1.0, differs_for_even)},
        )
        before = [trainer.prompts(epoch)[i] for epoch, i in batch(0, 4, len(trainer.prompts), trainer.seed)]
        step = trainer.step(0)
        found.append([(row["image"], row["completion"]) for row in step.rows])
    after = trainer.current.prompts
    flat, left = ([NAMES.index(prompt.label) % 2 for prompt in prompts] for prompts in (before, after))
    assert 0 < sum(flat) < 4 and sum(left) < sum(flat)
    assert [a.image != b.image for a, b in zip(after, before, strict=True)] == [bool(odd) for odd in flat]
    assert len({prompt.image for prompt in (*after, *before)}) == 4 + sum(flat), "none comes twice"
    # completions belong to the prompts that they were sampled for, and so do the encoded forms
    for prompt, group in zip(after, trainer.current.groups, strict=True):
        (alone,) = trainer.samples.encoder([prompt])
        assert torch.equal(group.prompt.ids, alone.ids)
    assert step.metrics["frac_resampled"] > 0 and found[0] == found[1]


def test_refills_are_all_other_prompts_once(load_vlm, digits_task, think):
    """Over all rounds of a batch, whatever the number of ranks; then they begin again."""
    samples = grpo(load_vlm(), digits_task, think, zero_variance="refill").samples
    inside = {i for _, i in batch(2, 4, len(samples.prompts), samples.seed)}
    rounds = (len(samples.prompts) - 4) // 4
    images = [prompt.image for attempt in range(rounds) for prompt in samples._others(2, attempt)]
    everything = [prompt.image for prompt in samples.prompts(0)]
    assert len(set(images)) == len(images) == 4 * rounds
    assert not set(images) & {everything[i] for i in inside}
    # each batch in an order of its own: 80 draws of 160 images show about 160 (1 - 1/e^0.5) = 63
    assert 50 < len({prompt.image for number in range(20) for prompt in samples._others(number, 0)}) < 76


def test_truncated_completions_are_left_out(load_vlm, digits_task, think):
    masked = grpo(load_vlm(), digits_task, think, mask_truncated_completions=True, max_tokens=320)
    step = masked.step(0)
    cut = [c.truncated for group in masked.current.completions for c in group]
    assert any(cut) and not all(cut)
    lengths = masked.current.lengths(without_truncated=True).tolist()
    assert [n == 0 for n in lengths] == cut
    everything = steps(grpo(load_vlm(), digits_task, think), 1)[0]
    assert step.metrics["grad_norm"] != pytest.approx(everything.metrics["grad_norm"], rel=1e-2)
    masked.close()


@pytest.mark.parametrize(
    "loss_type", ["dr_grpo", *(pytest.param(each, marks=pytest.mark.faults) for each in ("grpo", "bnpo", "dapo"))]
)
def test_loss_types_train_the_same_in_any_forwards(load_vlm, digits_task, think, loss_type):
    ended = []
    for budget, at_most in ((None, 4), (150, 4), (None, 1)):
        vlm = load_vlm()
        steps(
            grpo(vlm, digits_task, think, loss_type=loss_type, tokens_per_forward=budget, prompts_per_forward=at_most),
            2,
        )
        ended.append(weights(vlm.model))
    # 5 % of what two updates at 1e-3 can move a weight: Adam scales up the rounding of its smallest gradients
    assert distance(ended[0], ended[1]) < 1e-4 and distance(ended[0], ended[2]) < 1e-4


def test_the_token_budget_bounds_every_forward(load_vlm, digits_task, think, monkeypatch):
    seen = []
    pack = packing.pack_shared
    monkeypatch.setattr(packing, "pack_shared", lambda *a: seen.append(pack(*a).tokens) or pack(*a))
    steps(grpo(load_vlm(), digits_task, think, tokens_per_forward=250, prompts_per_forward=4, self_check=False), 1)
    assert len(seen) > 1 and max(seen) <= 250 < sum(seen)


@pytest.mark.parametrize(("length", "layout"), [(8, "pack_shared"), (900, "pack_plain")])
def test_auto_shares_only_where_it_saves_tokens(load_vlm, digits_task, think, monkeypatch, length, layout):
    used = []
    for name in ("pack_shared", "pack_plain"):
        original = getattr(packing, name)
        monkeypatch.setattr(packing, name, lambda *a, name=name, original=original: used.append(name) or original(*a))
    trainer = grpo(load_vlm(), digits_task, think, group_size=2, self_check=False)
    encoded = trainer.samples.encoder(trainer.prompts(0)[:1])[0]
    # a prompt of 80 tokens with two completions: 176 against 96 tokens, or 1,960 against 1,880
    packed = trainer._pack([packing.PromptGroup(encoded, (torch.full((length,), 100),) * 2)])
    assert used == [layout] and packed.completions == 2
    trainer.close()


def test_importance_correction_weighs_tokens(load_vlm, digits_task, think, monkeypatch):
    def off(trainer):
        generate = trainer.rollout.generate

        def shifted(*arguments):  # a sampler that gave every token e^-0.1 of the trainer's probability
            return [[replace(c, logps=c.logps - 0.1) for c in group] for group in generate(*arguments)]

        monkeypatch.setattr(trainer.rollout, "generate", shifted)
        return trainer

    plain = steps(off(grpo(load_vlm(), digits_task, think, grad_clip=100.0, self_check=False)), 1)[0].metrics
    weighed = steps(
        off(grpo(load_vlm(), digits_task, think, grad_clip=100.0, importance_correction="token_truncate")), 1
    )[0].metrics
    # the policy gradient is multiplied by e^0.1 throughout
    assert weighed["grad_norm"] / plain["grad_norm"] == pytest.approx(1.10517, rel=1e-3)
    assert weighed["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.10517, rel=1e-3)
    assert "sampling/importance_sampling_ratio/mean" not in plain
    assert plain["sampling/sampling_logp_difference/mean"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_two_rewards_are_compared_as_asked(load_vlm, digits_task, think, aggregation):
    rewards = {
        "short": Reward(1.0, lambda samples: [1.0 / (1 + len(s.completion)) for s in samples]),
        "accuracy": Reward(0.5, accuracy),
    }
    trainer = grpo(load_vlm(), digits_task, think, rewards=rewards, multi_objective_aggregation=aggregation)
    trainer.step(0)
    found = trainer.current.advantages
    short = torch.tensor(trainer.current.scores.parts["short"]).view(4, 4)
    each = (short - short.mean(1, keepdim=True)) / (short.std(1, keepdim=True) + 1e-4)
    if aggregation == "normalize_then_sum":  # accuracy is 0 throughout and adds nothing
        each = (each - each.mean()) / (each.std() + 1e-4)
    assert float((found - each).abs().max()) < 1e-3
    trainer.close()


@pytest.mark.parametrize("family", ["qwen2_vl", *NEWER, "gemma3"])
def test_frozen_vision_features_are_the_tower_s(load_vlm, digits_task, think, tmp_path, family):
    from common.models.vision import FeatureStore

    vlm = load_vlm(family=family, freeze_vision=True)
    assert not any(
        p.requires_grad for n, p in vlm.model.named_parameters() if set(n.split(".")) & set(vlm.family.vision)
    )
    store = FeatureStore(tmp_path / family, 2**20)
    prompts = think.train_prompts(digits_task)[:4]
    scorer = PolicyScorer(vlm, 1.0, 64)
    completions = (torch.arange(100, 104), torch.arange(200, 207))
    found = []
    for encoder in (
        PromptEncoder(vlm, Loader(digits_task.images, 32), 512),
        PromptEncoder(vlm, Loader(digits_task.images, 32), 512, store),
        PromptEncoder(vlm, Loader(digits_task.images, 32), 512, store),  # from the disk
    ):
        groups = [packing.PromptGroup(e, completions) for e in encoder(prompts)]
        with torch.no_grad():
            shared = scorer(packing.pack_shared(groups, vlm.family, vlm.device))[0]
            plain = scorer(pack_plain(groups, vlm.family, vlm.pad, vlm.device))[0]
        found += [shared, plain]
    assert max(float((x - found[0]).abs().max()) for x in found[1:]) < 1e-5
    assert len(list((tmp_path / family).glob("*.safetensors"))) == 4


def test_a_feature_store_is_bounded_and_survives_damage(tmp_path):
    from common.models.vision import FeatureStore

    store = FeatureStore(tmp_path, 5000)
    for number in range(12):
        store.put(f"key{number}", torch.full((10, 25), float(number)))  # 1,000 bytes and a header
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5500
    assert store.get("key0") is None and torch.equal(store.get("key11"), torch.full((10, 25), 11.0))
    store.put("huge", torch.zeros(10_000))
    assert store.get("huge") is None
    (tmp_path / "key11.safetensors").write_bytes(b"damaged")
    assert store.get("key11") is None
    assert FeatureStore(tmp_path, 5000).used <= 5500


def test_training_with_frozen_vision_equals_training_with_its_features(load_vlm, digits_task, think, tmp_path):
    from common.models.vision import FeatureStore

    ended = []
    for cached in (False, True):
        vlm = load_vlm(freeze_vision=True)
        trainer = grpo(vlm, digits_task, think)
        if cached:
            trainer.samples.encoder = PromptEncoder(
                vlm, Loader(digits_task.images, 32), 512, FeatureStore(tmp_path, 2**20)
            )
        steps(trainer, 2)
        ended.append(weights(vlm.model))
        assert any(tmp_path.iterdir()) == cached
    assert distance(*ended) < 3e-5
