"""The engine, SFT and GRPO on the untrained model: against plain PyTorch, and shared against plain."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clsrl.prompting import ClassListPrompt
from common.config.schema import GRPOConfig, LoraConfig, TrainerConfig
from common.data.loading import Loader
from common.forward import attention
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, pack_plain, pack_shared, score_prompts
from common.models.encoder import PromptEncoder
from common.models.meter import messages
from common.report import dashboard
from common.rewards import Reward, accuracy, strict_format
from common.rollout.base import Decoding
from common.rollout.hf import HFRollout
from common.run import tracking
from common.training.base import Epochs
from common.training.engine import Engine
from common.training.grpo.trainer import GRPOTrainer
from common.training.sft import SFTTrainer
from common.types import UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]
ZERO = {stage: {"zero_optimization": {"stage": stage}} for stage in (0, 1, 2)}
# persistence 0: really shard, small as the tensors are
ZERO[3] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
# random completions of an untrained model are never right: this reward gives every group something to learn
REWARDS = {"short": Reward(1.0, lambda samples: [1.0 / (1 + len(s.completion)) for s in samples])}


def options(**changes):
    return TrainerConfig(
        **{
            "name": "sft",
            "learning_rate": 1e-3,
            "schedule": "constant",
            "epochs": 1.0,
            "prompts_per_update": 4,
            "prompts_per_forward": 2,
            "weight_decay": 0.01,
            **changes,
        }
    )


def grpo_options(**changes):
    return GRPOConfig(
        **{
            "name": "grpo",
            "learning_rate": 1e-3,
            "schedule": "constant",
            "epochs": 1.0,
            "prompts_per_update": 4,
            "prompts_per_forward": 2,
            "group_size": 4,
            "beta": 0.0,
            "epsilon": 0.2,
            **changes,
        }
    )


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def distance(a, b):
    """Largest difference of a weight.

    Biases of keys are left out, also those in the middle of a fused projection: softmax does not see them, their
    gradient is rounding noise, which Adam scales up.
    """

    def counted(name, weight):
        if name.endswith("k_proj.bias"):
            return weight[:0]
        if name.endswith("qkv.bias"):
            return torch.cat(weight.chunk(3)[::2])
        return weight

    return max(
        float((counted(name, a[name]) - counted(name, b[name])).abs().amax())
        for name in a
        if counted(name, a[name]).numel()
    )


@pytest.mark.parametrize("stage", ZERO)
def test_engine_equals_plain_adamw(stage):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    oracle = copy.deepcopy(model)
    plain = torch.optim.AdamW(oracle.parameters(), lr=1e-2, weight_decay=0.01)
    engine = Engine(model, options(learning_rate=1e-2, grad_clip=0.5), ZERO[stage], updates=3)
    for update in range(3):
        x = torch.randn(6, 6, generator=torch.Generator().manual_seed(update))
        parts = x.split(2 + update)  # a different number of micro-batches every time
        for number, part in enumerate(parts):
            engine.backward(engine(part).pow(2).sum(), last=number + 1 == len(parts))
        found = engine.step(update)
        oracle(x).pow(2).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
        assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert found["learning_rate"] == 1e-2
    with engine.whole_weights():
        assert distance(weights(model), weights(oracle)) < 1e-6
    engine.close()


SFT = {
    "clean": ("answer", {}),
    "official": (
        "everything",
        {"train_system_prompt": "think", "train_question": "bare", "train_image": "last", "train_target": "tagged"},
    ),
}


@pytest.mark.parametrize(("loss", "options_of_method"), SFT.values(), ids=SFT.keys())
def test_sft_loss_equals_transformers(load_vlm, digits_task, loss, options_of_method):
    vlm = load_vlm()
    method = ClassListPrompt(instruction="no_think", seed=1, **options_of_method)
    load = Loader(digits_task.images, 32)
    prompts = method.train_prompts(digits_task)[::20][:4]
    trainer = SFTTrainer(
        vlm=vlm,
        rollout=HFRollout(vlm),
        encoder=PromptEncoder(vlm, load, 512),
        prompts=Epochs(lambda epoch: prompts),
        loss=loss,
        config=options(),
        deepspeed=ZERO[2],
        updates=1,
        seed=1,
        reply=method.label_response,
    )
    # the whole conversation through the processor at once, as in the authors' collate function
    replies = [f"<answer>{p.label}</answer>" if loss == "everything" else p.label for p in prompts]
    said = [[*messages(p), {"role": "assistant", "content": r}] for p, r in zip(prompts, replies, strict=True)]
    texts = [
        vlm.processor.apply_chat_template(c, tokenize=False, add_generation_prompt=loss == "everything") for c in said
    ]
    pictures = [[picture] for picture in load([p.image for p in prompts])]
    batch = vlm.processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].clone()
    labels[torch.isin(labels, torch.tensor([vlm.pad, *vlm.banned]))] = -100
    if loss == "answer":
        for row, reply in zip(labels, replies, strict=True):
            length = len(vlm.processor.tokenizer(reply)["input_ids"])
            start = int((row != -100).nonzero()[-1]) - 1 - length  # behind the reply: its end and a line break
            row[:start], row[start + length + 1 :] = -100, -100
    with torch.no_grad():
        stock = vlm.model(**batch).logits[:, :-1]
        stock[..., torch.tensor(vlm.banned)] = -torch.inf
        expected = F.cross_entropy(stock.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert trainer.step(0).metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    trainer.close()


def sft_losses(vlm, task, method):
    """The losses of twenty updates on four images."""
    trainer = SFTTrainer(
        vlm=vlm,
        rollout=HFRollout(vlm),
        encoder=PromptEncoder(vlm, Loader(task.images, 32), 512),
        prompts=Epochs(lambda epoch: method.train_prompts(task)[::20][:4]),
        loss="answer",
        config=options(),
        deepspeed=ZERO[2],
        updates=20,
        seed=1,
    )
    losses = [trainer.step(update).metrics["loss"] for update in range(20)]
    trainer.close()
    return losses


def test_sft_learns_the_labels(load_vlm, digits_task, no_think):
    losses = sft_losses(load_vlm(), digits_task, no_think)
    assert losses[-1] < 0.3 * losses[0]


def test_score_prompts_skips_images_and_first_tokens(load_vlm, digits_task, no_think):
    vlm = load_vlm()
    encoded = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(no_think.train_prompts(digits_task)[:2])
    packed = pack_shared([PromptGroup(e, (torch.tensor([9, 2]),)) for e in encoded], vlm.family, vlm.device)
    scored = score_prompts(packed, vlm.banned, vlm.model.get_output_embeddings().weight.shape[0])
    ids = packed.inputs["input_ids"][0]
    assert not set(scored.targets.tolist()) & set(vlm.banned)
    prompt_tokens = sum(int((~torch.isin(e.ids[1:], torch.tensor(vlm.banned))).sum()) for e in encoded)
    assert len(scored.targets) == prompt_tokens + 4
    inside = scored.owner == -1
    assert torch.equal(ids[scored.predictors[inside] + 1], scored.targets[inside])


def grpo(vlm, task, method, **changes):
    rewards, deepspeed = changes.pop("rewards", REWARDS), changes.pop("deepspeed", ZERO[2])
    max_tokens, top_k = changes.pop("max_tokens", 12), changes.pop("top_k", 0)
    rollout = changes.pop("rollout", None) or HFRollout(vlm)
    overlap = changes.pop("overlap", False)
    config = grpo_options(**changes)
    return GRPOTrainer(
        vlm=vlm,
        encoder=PromptEncoder(vlm, Loader(task.images, 32), 512),
        rollout=rollout,
        prompts=Epochs(lambda epoch: method.train_prompts(task)),
        rewards=rewards,
        decoding=Decoding(1.0, top_k, 1.0, max_tokens),
        config=config,
        deepspeed=deepspeed,
        updates=4,
        seed=1,
        overlap=overlap,
    )


def run(vlm, task, method, updates=3, **changes):
    trainer = grpo(vlm, task, method, **changes)
    steps = [trainer.step(update) for update in range(updates)]
    trainer.close()
    return steps


LORA = LoraConfig(r=4, alpha=8, targets=r".*(language|text)_model.*\.(q_proj|v_proj)")


@pytest.mark.parametrize(
    ("lora", "family"),
    [
        pytest.param(LoraConfig(), "qwen2_vl", id="qwen2_vl-full"),
        pytest.param(LORA, "gemma3", id="gemma3-lora", marks=pytest.mark.faults),
        pytest.param(LORA, "qwen2_vl", id="qwen2_vl-lora", marks=pytest.mark.faults),
        pytest.param(LoraConfig(), "gemma3", id="gemma3-full", marks=pytest.mark.faults),
        pytest.param(LoraConfig(), "qwen2_5_vl", id="qwen2_5_vl-full", marks=pytest.mark.faults),
        pytest.param(LORA, "qwen3_vl", id="qwen3_vl-lora", marks=pytest.mark.faults),
        pytest.param(LoraConfig(), "qwen3_vl", id="qwen3_vl-full", marks=pytest.mark.faults),
    ],
)
def test_zero_stages_sample_and_end_the_same(load_vlm, digits_task, think, lora, family):
    ended, steps = {}, {}
    for stage in ZERO:
        torch.manual_seed(0)
        vlm = load_vlm(lora=lora, family=family)
        trainer = grpo(vlm, digits_task, think, deepspeed=ZERO[stage], beta=0.04)
        steps[stage] = [trainer.step(update) for update in range(3)]
        with trainer.sampling():
            ended[stage] = weights(vlm.model)
        trainer.close()
    for stage in (1, 2, 3):
        # 3 % of what three updates at 1e-3 can move a weight: Adam scales up the rounding of its smallest gradients
        assert distance(ended[stage], ended[0]) < 1e-4, stage
        for a, b in zip(steps[stage], steps[0], strict=True):
            assert [r["completion"] for r in a.rows] == [r["completion"] for r in b.rows]
            assert a.metrics == {key: pytest.approx(value, rel=1e-3, abs=1e-6) for key, value in b.metrics.items()}


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_shared_and_plain_training_end_at_the_same_weights(load_vlm, digits_task, think, beta):
    plain = load_vlm()
    expected = run(plain, digits_task, think, impl="plain", beta=beta)
    for how in ("copy",) if beta == 0 else ("copy", "merge"):
        vlm = load_vlm()
        attention.install(vlm.model, how)
        steps = run(vlm, digits_task, think, impl="shared", beta=beta)
        assert distance(weights(vlm.model), weights(plain.model)) < 2e-4  # a tenth of the three updates' step size
        for a, b in zip(steps, expected, strict=True):
            assert [r["completion"] for r in a.rows] == [r["completion"] for r in b.rows]
            assert a.metrics["grad_norm"] == pytest.approx(b.metrics["grad_norm"], rel=1e-3)


def test_micro_batch_size_does_not_matter(load_vlm, digits_task, think):
    ended, steps = [], []
    for size in (1, 3, 4):
        vlm = load_vlm()
        steps.append(run(vlm, digits_task, think, updates=2, prompts_per_forward=size)[0].metrics)
        ended.append(weights(vlm.model))
    assert distance(ended[0], ended[1]) < 1e-4 and distance(ended[0], ended[2]) < 1e-4
    for other in steps[1:]:
        assert other == {key: pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in steps[0].items()}


def test_logp_difference_is_the_largest_of_all_micro_batches(load_vlm, digits_task, think, monkeypatch):
    trainer = grpo(load_vlm(), digits_task, think, prompts_per_forward=1, self_check=False)
    generate = trainer.rollout.generate

    def first_is_off(*arguments):
        groups = generate(*arguments)
        groups[0][0].logps[0] -= 3.0  # a sampler that disagrees with the trainer on one token of the first prompt
        return groups

    monkeypatch.setattr(trainer.rollout, "generate", first_is_off)
    assert trainer.step(0).metrics["sampling/sampling_logp_difference/max"] == pytest.approx(3.0, abs=1e-3)
    trainer.close()


def test_training_repeats_itself_to_the_bit(load_vlm, digits_task, think):
    ended = []
    for _ in range(2):
        vlm = load_vlm()
        run(vlm, digits_task, think)
        ended.append(weights(vlm.model))
    assert distance(*ended) == 0.0


@pytest.mark.parametrize(
    "lora",
    [LoraConfig(), LoraConfig(r=4, alpha=8, targets=r".*(language|text)_model.*\.(q_proj|v_proj)")],
    ids=["full", "lora"],
)
def test_reference_stays_and_kl_grows(load_vlm, digits_task, think, lora):
    torch.manual_seed(0)
    vlm = load_vlm(lora=lora)
    steps = run(vlm, digits_task, think, updates=4, beta=0.04)
    kl = [step.metrics["kl"] for step in steps]
    assert abs(kl[0]) < 1e-6 and kl[-1] > 1e-5 and all(value > -1e-6 for value in kl)


def test_lora_trains_only_the_adapter(load_vlm, digits_task, think):
    torch.manual_seed(0)
    vlm = load_vlm(lora=LoraConfig(r=4, alpha=8, targets=r".*(language|text)_model.*\.(q_proj|v_proj)"))
    before = weights(vlm.model)
    run(vlm, digits_task, think, updates=2)
    moved = {name for name, value in weights(vlm.model).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_groups_without_differences_leave_the_weights_alone(load_vlm, digits_task, think):
    vlm = load_vlm()
    before = weights(vlm.model)
    steps = run(
        vlm,
        digits_task,
        think,
        updates=2,
        weight_decay=0.0,
        rewards={"format": Reward(1.0, strict_format), "accuracy": Reward(1.0, accuracy)},
    )
    assert all(step.metrics["frac_reward_zero_std"] == 1.0 and step.metrics["grad_norm"] == 0.0 for step in steps)
    assert distance(before, weights(vlm.model)) == 0.0


def test_step_reports_trl_names_and_rows(load_vlm, digits_task, think):
    step = run(load_vlm(), digits_task, think, updates=1)[0]
    expected = {
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "entropy",
        "epoch",
        "rewards/short/mean",
        "rewards/short/std",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/clipped_ratio",
        "completions/mean_terminated_length",
        "completions/min_terminated_length",
        "completions/max_terminated_length",
        "clip_ratio/low_mean",
        "clip_ratio/low_min",
        "clip_ratio/high_max",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
    }
    assert expected <= step.metrics.keys()
    assert len(step.rows) == 16
    rewards = [row["reward"] for row in step.rows]
    assert step.metrics["reward"] == pytest.approx(sum(rewards) / 16)
    assert [row["rewards/short"] for row in step.rows] == rewards
    assert sum(row["advantage"] for row in step.rows[:4]) == pytest.approx(0, abs=1e-3)
    assert step.metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert set(step.seconds) == {"rollout", "reward", "update"}


def test_the_dashboard_shows_what_a_training_logs(load_vlm, digits_task, think):
    """Every metric of W&B's view is logged, under the prefix that it gets there."""
    step = run(load_vlm(), digits_task, think, updates=1)[0]
    logged = {tracking.prefixed(name) for name in [*step.metrics, "step_time", "eval/test/accuracy", "eval/test/ece"]}
    logged |= {f"time/{phase}_s" for phase in step.seconds}
    spec = json.loads(dashboard.workspace("me", "p")._to_model().model_dump_json())["spec"]
    sections = spec["section"]["panel_bank_config"]["sections"]
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    shown = {name for config in panels for name in config.get("metrics") or []}
    patterns = [config["metric_regex"] for config in panels if config.get("metric_regex")]
    assert len(shown) >= 8 and shown <= logged
    assert len(patterns) == 4 and all(any(re.search(pattern, name) for name in logged) for pattern in patterns)


def test_self_check_refuses_a_wrong_forward(load_vlm, digits_task, think, monkeypatch):
    from common.training import agreement as module

    def wrong(groups, family, device):
        packed = pack_shared(groups, family, device)
        packed.inputs["position_ids"] = packed.inputs["position_ids"] + torch.arange(packed.tokens) // 70
        return packed

    monkeypatch.setattr(module, "pack_shared", wrong)
    trainer = grpo(load_vlm(), digits_task, think)
    with pytest.raises(RuntimeError, match="differs from the plain one.*trainer.impl=plain"):
        trainer.step(0)
    trainer.close()


class Shifted(HFRollout):
    """It reports every token as a little less probable than it was."""

    def generate(self, *arguments):
        return [[replace(c, logps=c.logps - 0.01) for c in group] for group in super().generate(*arguments)]


def test_a_sampler_that_disagrees_is_refused_before_anything_is_learnt(load_vlm, digits_task, think):
    vlm = load_vlm()
    trainer = grpo(vlm, digits_task, think, rollout=Shifted(vlm))
    before = weights(vlm.model)
    with pytest.raises(UserError, match="differ by 1.0e-02 nats.*allowed: 1e-04.*other weights.*rollout=hf"):
        trainer.step(0)
    assert all(torch.equal(before[name], now) for name, now in weights(vlm.model).items())
    trainer.close()
    for excuse in ({"importance_correction": "token_mask"}, {"self_check": False}):
        vlm = load_vlm()
        trainer = grpo(vlm, digits_task, think, rollout=Shifted(vlm), **excuse)
        assert trainer.step(0).metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.01, rel=1e-2)
        trainer.close()


def test_numbers_of_another_distribution_are_not_compared(load_vlm, digits_task, think):
    class Truncated(Shifted):
        logprobs_untruncated = False

    vlm = load_vlm()
    trainer = grpo(vlm, digits_task, think, top_k=5, rollout=Truncated(vlm))
    assert not any("logp_difference" in name for name in trainer.step(0).metrics)
    trainer.close()


def test_shuffled_rewards_keep_the_values_but_not_their_places(load_vlm, digits_task, think):
    fair, mixed = (run(load_vlm(), digits_task, think, updates=1, shuffle_rewards=x)[0] for x in (False, True))
    rewards = [[row["reward"] for row in step.rows] for step in (fair, mixed)]
    assert [row["completion"] for row in fair.rows] == [row["completion"] for row in mixed.rows]
    assert rewards[0] != rewards[1] and sorted(rewards[0]) == sorted(rewards[1])
    assert fair.metrics["reward_std"] == pytest.approx(mixed.metrics["reward_std"])


def test_gradient_checkpointing_is_at_work_in_an_update(load_vlm, digits_task, think):
    calls = []
    for checkpointing in (False, True):
        vlm = load_vlm(gradient_checkpointing=checkpointing)
        trainer = grpo(vlm, digits_task, think, self_check=False)
        counted, generate = [], trainer.rollout.generate
        trainer.rollout.generate = lambda *a, g=generate, c=counted: (g(*a), c.clear())[0]  # count from here on
        vlm.model.model.language_model.layers[0].input_layernorm.register_forward_pre_hook(
            lambda *_, c=counted: c.append(1)
        )
        trainer.step(0)
        trainer.close()
        calls.append(len(counted))
    assert calls[1] == 2 * calls[0], "every layer is computed again in the backward pass"


def test_scorer_chunks_do_not_matter(load_vlm, digits_task, think):
    vlm = load_vlm()
    encoded = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(think.train_prompts(digits_task)[:1])
    packed = pack_plain(
        [PromptGroup(encoded[0], (torch.arange(100, 117), torch.arange(200, 209)))], vlm.family, vlm.pad, vlm.device
    )
    with torch.no_grad():
        whole, small = (PolicyScorer(vlm, 1.0, chunk)(packed)[0] for chunk in (1000, 4))
    assert float((whole - small).abs().max()) < 1e-5
