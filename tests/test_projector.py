"""The projector as what is trained: by LoRA or whole, saved, loaded, merged, and absent from the reference."""

from __future__ import annotations

import pytest
import torch

from common.config.composition import validate
from common.config.schema import LoraConfig
from common.models import files, vlm
from common.types import UserError
from tests.conftest import NEWER
from tests.test_adapters import scores
from tests.test_grpo_options import steps
from tests.test_training import grpo

CPU = torch.device("cpu")
FAMILIES = ("qwen2_vl", *NEWER, "gemma3")
WAYS = {"lora": LoraConfig(r=4, alpha=8, targets=None, projector="lora"), "full": LoraConfig(projector="full")}
BOTH = LoraConfig(r=4, alpha=8, targets=r".*(language|text)_model.*\.q_proj", projector="full")
KINDS = {**WAYS, "full beside LoRA": BOTH}


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moved(policy, seed=1):
    """The same model after an imagined training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(policy.model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def difference(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", WAYS.values(), ids=WAYS)
def test_the_projector_alone_is_trained(load_vlm, family, lora):
    policy = load_vlm(family=family, freeze_vision=True, lora=lora)
    found = trained(policy.model)
    assert found and all(f".{policy.family.projector}." in name for name in found)
    whole = sum(p.numel() for p in load_vlm(family=family).model.get_submodule(policy.family.projector).parameters())
    assert (sum(p.numel() for p in found.values()) == whole) == (lora.projector == "full")
    if lora.projector == "lora":
        matrices = 1 if family in ("gemma3", "smolvlm", "gemma4") else 2
        assert len(found) == 2 * matrices and all("lora_" in name for name in found)


def test_the_projector_beside_the_language_model(load_vlm):
    found = trained(load_vlm(family="gemma3", freeze_vision=True, lora=BOTH).model)
    inside = [name for name in found if ".multi_modal_projector." in name]
    assert len(inside) == 2 and 0 < sum(".q_proj.lora_" in name for name in found) == len(found) - 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_a_folder_answers_as_the_model_that_wrote_it(
    load_vlm, model_config, digits_task, no_think, tmp_path, family, lora
):
    policy = load_vlm(family=family, freeze_vision=True, lora=lora)
    begun = scores(policy, digits_task, no_think)
    assert torch.equal(begun, scores(load_vlm(family=family), digits_task, no_think)), "nothing is changed yet"
    expected = scores(moved(policy), digits_task, no_think)
    assert difference(expected, begun) > 1e-2
    policy.model.save_pretrained(tmp_path)
    with policy.model.disable_adapter():
        assert torch.equal(scores(policy, digits_task, no_think), begun), "the reference sees the untouched projector"
    assert torch.equal(scores(policy, digits_task, no_think), expected), "and the policy has its own back"
    config = model_config(family=family, freeze_vision=True, lora=lora)
    kept = vlm.load(tmp_path, config, CPU, train=False)
    assert torch.equal(scores(kept, digits_task, no_think), expected), "to the bit"
    merged = vlm.load(tmp_path, model_config(family=family), CPU)
    assert difference(scores(merged, digits_task, no_think), expected) <= 1e-4
    assert not hasattr(merged.model, "disable_adapter") and len(trained(merged.model)) > 20
    further = vlm.load(tmp_path, config, CPU)
    start = scores(moved(further, seed=2), digits_task, no_think)
    with further.model.disable_adapter():
        reference = scores(further, digits_task, no_think)
    assert difference(reference, expected) <= 1e-4 < difference(start, expected), "trained further from where it was"


@pytest.mark.parametrize("family", ["gemma3", pytest.param("gemma4", marks=pytest.mark.faults)])
@pytest.mark.parametrize("lora", WAYS.values(), ids=WAYS)
def test_rounded_models_train_the_projector_unrounded(
    load_vlm, model_config, digits_task, no_think, tmp_path, lora, family
):
    policy = moved(load_vlm(family=family, dtype="bfloat16", freeze_vision=True, lora=lora))
    assert {p.dtype for p in trained(policy.model).values()} == {torch.float32}, "bf16 would lose small updates"
    policy.model.save_pretrained(tmp_path)
    config = model_config(family=family, dtype="bfloat16", freeze_vision=True)
    kept = vlm.load(tmp_path, config, CPU, train=False)
    assert torch.equal(scores(kept, digits_task, no_think), scores(policy, digits_task, no_think))
    merged = vlm.load(tmp_path, config, CPU)
    assert {p.dtype for p in merged.model.parameters()} == {torch.bfloat16}
    assert difference(scores(merged, digits_task, no_think), scores(policy, digits_task, no_think)) < 1.0


def test_the_hash_covers_a_whole_projector(load_vlm, untrained_folders, tmp_path):
    policy = load_vlm(family="gemma3", lora=WAYS["full"])
    policy.model.save_pretrained(tmp_path / "first")
    moved(policy).model.save_pretrained(tmp_path / "second")
    hashes = {files.weights_hash(tmp_path / name) for name in ("first", "second")}
    assert len(hashes | {files.weights_hash(untrained_folders["gemma3"])}) == 3


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(r=4, targets="nothing", projector="lora"), "model.lora.targets=nothing matches no module"),
        (LoraConfig(r=4, targets="nothing", projector="full"), "model.lora.targets=nothing matches no module"),
        (LoraConfig(r=4, targets="*", projector="lora"), r"model.lora.targets=\* is no regular expression"),
        (LoraConfig(r=4, targets=r".*visual\.merger\.mlp\.0"), "freeze_vision=true, but model.lora.targets=.*merger"),
        (LoraConfig(r=4, targets=r".*qkv", projector="lora"), "freeze_vision=true, but model.lora.targets=.*qkv"),
    ],
    ids=["lora", "full", "no pattern", "frozen projector", "frozen tower"],
)
def test_a_wrong_target_names_the_key(load_vlm, lora, message):
    with pytest.raises(UserError, match=message):
        load_vlm(freeze_vision=True, lora=lora)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["model.lora.projector=all"], "model.lora.projector=all: choose one of none, lora, full"),
        (["model.lora.projector=lora"], "model.lora.projector=lora needs a rank"),
        (["model.lora.r=4", "model.lora.targets=null"], "model.lora.targets=null leaves nothing"),
        (
            ["model.lora.r=4", "model.lora.projector=lora", "model.feature_cache_gb=1"],
            "model.feature_cache_gb must be 0: it keeps what",
        ),
        (["model.lora.projector=full", "model.feature_cache_gb=1"], "model.feature_cache_gb must be 0: it keeps what"),
    ],
)
def test_refused_combinations_name_the_key(compose, values, message):
    with pytest.raises(UserError, match=message):
        validate(compose("method=nothinking", "model.freeze_vision=true", *values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "way"),
    [
        (["model.lora.projector=lora", "model.lora.targets=null", "model.lora.r=16"], "lora"),
        (["model.lora.projector=full", "model.lora.r=0"], "full"),
    ],
)
@pytest.mark.parametrize("model", ["gemma3_4b", "tiny_gemma3"])
def test_alert_may_train_the_projector_alone(compose, load_vlm, values, way, model):
    used = validate(compose("method=alert", f"model={model}", "data=digits", "model.freeze_vision=true", *values)).model
    assert (used.lora.projector, used.freeze_vision, used.load_in_8bit) == (way, True, model == "gemma3_4b")
    found = trained(load_vlm(family="gemma3", freeze_vision=True, lora=used.lora).model)
    assert found and all(".multi_modal_projector." in name for name in found)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", WAYS.values(), ids=WAYS)
def test_updates_move_the_projector_and_not_the_reference(load_vlm, digits_task, think, no_think, family, lora):
    torch.manual_seed(0)
    policy = load_vlm(family=family, freeze_vision=True, lora=lora)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    begun = scores(policy, digits_task, no_think)
    found = steps(grpo(policy, digits_task, think, beta=0.04), 3)
    after = dict(policy.model.named_parameters())
    still = [name for name in trained(policy.model) if torch.equal(after[name], before[name])]
    assert trained(policy.model) and not still, "every trained weight got a gradient"
    frozen = before.keys() - trained(policy.model).keys()
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert all(step.metrics["grad_norm"] > 0 for step in found)
    kl = [step.metrics["kl"] for step in found]
    assert abs(kl[0]) < 1e-7 < kl[-1], kl
    with policy.model.disable_adapter():
        assert torch.equal(scores(policy, digits_task, no_think), begun)
    assert difference(scores(policy, digits_task, no_think), begun) > 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("lora", WAYS.values(), ids=WAYS)
def test_a_resumed_training_ends_as_an_uninterrupted_one(load_vlm, digits_task, think, tmp_path, lora):
    def begin():
        torch.manual_seed(0)
        policy = load_vlm(family="gemma3", freeze_vision=True, lora=lora)
        return policy, grpo(policy, digits_task, think, beta=0.04)

    whole, trainer = begin()
    expected = steps(trainer, 4)
    _, trainer = begin()
    found = [trainer.step(update) for update in range(2)]
    trainer.save(tmp_path / "step")
    trainer.close()
    resumed, trainer = begin()
    trainer.restore(tmp_path / "step", 2)
    found += [trainer.step(update) for update in range(2, 4)]
    trainer.close()
    ours, theirs = ([{**step.metrics, "num_tokens": 0} for step in part] for part in (found, expected))
    assert ours == theirs, "but for the count, which the loop saves"
    ended = trained(whole.model)
    assert ended and all(torch.equal(p, ended[name]) for name, p in trained(resumed.model).items())
