"""Whole runs with rollout=vllm: refused where it cannot be, the same on two ranks, resumed after an engine broke."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common.config.composition import validate
from common.config.schema import FAMILIES
from common.models import families
from common.rollout.vllm import check, weights
from common.types import UserError
from tests.conftest import REPOSITORY
from tests.test_ranks import metrics, sampled, trained

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs make setup-vllm")


# ---- refused at once


def test_without_vllm_the_command_that_installs_it_is_named(compose, monkeypatch):
    config = validate(compose("rollout=vllm"))
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed; install it with make setup-vllm, or use rollout=hf"):
        check.check(config)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.load_in_8bit=true", "model.lora.r=4"], "no weights in 8 bits.*model.load_in_8bit=false"),
        (["model=tiny_gemma3", "method=alert"], "gpus=0.*model.image_attention=causal"),
        (
            ["rollout.overlap=true", "trainer.importance_correction=token_mask", "gpus=2"],
            "works during updates, so set rollout.options.sleep_level=0",
        ),
    ],
)
def test_what_the_engine_cannot_compute_is_refused(compose, monkeypatch, changes, message):
    monkeypatch.setattr(check, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=message):
        check.check(validate(compose("rollout=vllm", *changes)))
    check.check(validate(compose("rollout=vllm", "model=tiny_gemma3", "method=alert", "model.image_attention=causal")))


def test_a_family_from_outside_says_itself_what_the_engine_must_do(compose, monkeypatch):
    class Other(families.Gemma3):
        both_ways = False

    monkeypatch.setattr(families, "Other", Other, raising=False)
    monkeypatch.setattr(check, "find_spec", lambda name: object())
    other = ["rollout=vllm", "model=tiny_gemma3", "method=alert", "model.family=common.models.families.Other"]
    check.check(validate(compose(*other)))
    Other.both_ways = True
    with pytest.raises(UserError, match="gpus=0.*model.image_attention=causal"):
        check.check(validate(compose(*other)))


# ---- weights as an engine takes them


def test_adapters_are_added_to_the_weights_they_stand_on(load_vlm):
    """Against PEFT's own merge; the policy is not touched."""
    from common.config.schema import LoraConfig

    lora = LoraConfig(r=4, alpha=8, targets=r".*language_model.*\.(q_proj|down_proj)", projector="lora")
    for family in ("qwen2_vl", "gemma3"):
        vlm = load_vlm(family=family, lora=lora)
        with torch.no_grad():
            for name, weight in vlm.model.named_parameters():
                if "lora_" in name:
                    weight += torch.randn(weight.shape) * 0.1
        before = {name: weight.clone() for name, weight in vlm.model.named_parameters()}
        pushed, moved = dict(weights.named(vlm)), dict(weights.named(vlm, trained=True))
        assert all(torch.equal(before[name], weight) for name, weight in vlm.model.named_parameters())
        merged = {vlm.family.hub_name(n): w for n, w in vlm.model.merge_and_unload().named_parameters()}
        assert pushed.keys() == merged.keys()
        assert all(torch.allclose(pushed[name], merged[name], atol=1e-6) for name in merged)
        text = {name for name in pushed if ".language_model." in name}
        # with biases, keys, values and gates, which an engine keeps in one tensor with what is adapted
        adapted = {name for name in text if any(part in name for part in (".self_attn.", ".mlp."))}
        projector = {name for name in pushed if "merger.mlp" in name or "input_projection" in name}
        assert moved.keys() == adapted | projector and projector


def test_saved_buffers_are_pushed_with_all_weights_alone(load_vlm):
    """Gemma 4 multiplies what leaves a layer by a number that is no parameter."""
    vlm = load_vlm(family="gemma4")
    everything, moved = dict(weights.named(vlm)), dict(weights.named(vlm, trained=True))
    buffers = everything.keys() - dict(vlm.model.named_parameters()).keys()
    assert buffers == vlm.model.state_dict().keys() - {"lm_head.weight", *dict(vlm.model.named_parameters())}
    assert {"model.language_model.layers.0.layer_scalar"} < buffers and not buffers & moved.keys()


def test_a_whole_projector_is_pushed_under_its_own_name(load_vlm):
    from common.config.schema import LoraConfig

    vlm = load_vlm(family="gemma3", lora=LoraConfig(r=0, targets=None, projector="full"))
    with torch.no_grad():
        for weight in vlm.model.parameters():
            if weight.requires_grad:
                weight.add_(1.0)
    moved = dict(weights.named(vlm, trained=True))
    names = {
        f"model.multi_modal_projector.{name}" for name in ("mm_input_projection_weight", "mm_soft_emb_norm.weight")
    }
    copies = {name: weight for name, weight in vlm.model.named_parameters() if weight.requires_grad}
    assert moved.keys() == names and {float(w.sum()) for w in moved.values()} == {
        float(w.sum()) for w in copies.values()
    }
    assert weights.named(vlm) and set(dict(weights.named(vlm))) >= names


# ---- runs


def of_model(folders, family):
    attention = ["model.image_attention=causal"] if families.family(family).both_ways else []
    return ["model.recipe=null", f"model.family={family}", f"model.path={folders[family]}", *attention]


@pytest.fixture(scope="module")
def job(untrained_folders):
    return [
        "rollout=vllm",
        *of_model(untrained_folders, "qwen2_vl"),
        "trainer.updates=5",
        "trainer.schedule=constant",
        "trainer.warmup_ratio=0",
        "trainer.prompts_per_update=4",
        "trainer.evaluate_every=0",
        "trainer.beta=0.04",
        "checkpoint.every=2",
        "rollout.max_completion_tokens=8",
        "rewards=none",
        "+rewards.short={weight:1.0,fn:tests.rewards.shorter}",
        "label_scoring=false",
        "setting.test_per_class=5",
        "tracking=none",
    ]


def updates(folder):
    return [row for row in metrics(folder) if "reward" in row]


def start(folder, arguments, ranks=1, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] * (ranks > 1)
    command = [*(command or [sys.executable]), "run.py", f"hydra.run.dir={folder}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400, **options
    )


@needs_vllm
@pytest.mark.faults
class TestRuns:
    @pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
    def test_two_ranks_with_an_engine_each_train_as_one(self, job, tmp_path, deepspeed):
        """On the same samples, which the first run has kept, every metric agrees to 1e-3."""
        remembered = ["rollout.backend=tests.vllm_backends.Replaying", f"+rollout.options.samples={tmp_path / 'kept'}"]
        for name, ranks in (("one", 1), ("two", 2)):
            apart = ["deepspeed=zero3", "+deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]
            done = start(tmp_path / name, [*job, *remembered, *(apart if deepspeed == "zero3" else [])], ranks)
            assert done.returncode == 0, done.stderr[-3000:]
        one, two = tmp_path / "one", tmp_path / "two"
        assert sampled(one) == sampled(two)
        for a, b in zip(metrics(one), metrics(two), strict=True):
            compared = [key for key in a if "logp_difference" not in key]  # of samples of the other run's weights
            assert a.keys() == b.keys()
            assert [a[key] for key in compared] == pytest.approx([b[key] for key in compared], rel=1e-3, abs=1e-5)
        assert max(row["sampling/sampling_logp_difference/max"] for row in updates(two)) < 1e-3
        first, second = trained(one), trained(two)
        assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 2.5e-4

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_trains_adapters_with_an_engine(self, job, untrained_folders, tmp_path, family):
        """On some of the matrices that an engine keeps in one tensor; two pushes of what has moved."""
        lora = ["model.lora.r=4", r"model.lora.targets='.*(language|text)_model.*\.(q|v|up)_proj'"]
        arguments = [
            *job,
            *of_model(untrained_folders, family),
            *lora,
            "trainer.updates=3",
            "trainer.learning_rate=0.01",
        ]
        done = start(tmp_path / "run", arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = updates(tmp_path / "run")
        assert [row["step"] for row in rows] == [1, 2, 3] and all(row["grad_norm"] > 0 for row in rows)
        assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4

    def test_ranks_do_not_sample_alike(self, job, tmp_path):
        done = start(tmp_path / "two", [*job, "trainer.updates=1"], 2)
        assert done.returncode == 0, done.stderr[-3000:]
        texts = [text for _, _, text in sampled(tmp_path / "two")]
        assert len(set(texts)) > len(texts) / 2

    @pytest.mark.parametrize("how", ["raise", "hang", "die"])
    def test_a_broken_engine_ends_the_job_with_its_cause_and_the_same_command_goes_on(self, job, tmp_path, how):
        folder, marker = tmp_path / "run", tmp_path / "broken"
        breaking = [
            "rollout.backend=tests.vllm_backends.Failing",
            f"+rollout.options.how={how}",
            "+rollout.options.at=3",
            f"+rollout.options.marker={marker}",
            "rollout.options.timeout=60",
        ]
        done = start(folder, [*job, *breaking])
        assert done.returncode not in (0, None) and marker.is_file()
        if how == "raise":
            assert "vLLM failed while sampling (OutOfMemoryError: CUDA out of memory" in done.stderr.splitlines()[-1]
            assert done.returncode == 1 and "Traceback" in (folder / "run.log").read_text()
        if how == "hang":
            assert "vLLM has been sampling for 60 s" in done.stderr and "time.sleep" not in done.stdout
            assert "vLLM has been sampling" in (folder / "run.log").read_text()
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
        again = start(folder, [*job, *breaking])
        assert again.returncode == 0, again.stderr[-3000:]
        assert [row["step"] for row in updates(folder)] == [1, 2, 3, 4, 5]
        assert json.loads((folder / "metrics.json").read_text())["train"]["updates"] == 5


def test_the_best_weights_are_pushed_although_they_are_older():
    """`restore` says how many updates the weights have seen, so that a sampler does not keep those of the last."""
    from common.training.engine import EngineTrainer

    trainer = EngineTrainer()
    trainer.engine, trainer.version = SimpleNamespace(restore=lambda folder: None), 5
    trainer.restore(None, 3)
    assert trainer.version == 3
