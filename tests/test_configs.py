"""Every YAML file composes and validates; the paper's configuration holds the paper's numbers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.config import composition as config
from common.types import UserError
from common.vlm import check

CONF = Path(__file__).parent.parent / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


FILES = sorted(str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml") if path.name != "config.yaml")


# methods, models and datasets are composed below
AS_THEY_ARE = [
    pytest.param(file, marks=pytest.mark.slow if file.startswith(("tune/", "experiment/")) else ())
    for file in FILES
    if not file.startswith(("data/", "method/", "model/", "few_shot/", "tune/few_shot/"))
]


@pytest.mark.sampled
@pytest.mark.parametrize("file", AS_THEY_ARE)
def test_every_file_composes_and_validates(compose, file):
    group, name = str(Path(file).parent), Path(file).stem
    if group.startswith("tune/"):
        # reached through the names in its own, as the defaults list does
        *first, last = name.split("-")
        kind = group.removeprefix("tune/")
        groups = {
            "model": ("", "model"),
            "trainer": ("trainer", "model"),
            "method": ("method", "model"),
            "data": ("model", "data"),
            "clip": ("clip", "method"),
        }
        before, after = groups.get(kind, ("", ""))
        if kind == "encoders":
            config.validate(compose("method=cafo", f"data={name}"))
        elif (
            kind == "learner"
        ):  # it is chosen by its method: few_shot-official is of all, few_shot-official-cafo of one
            config.validate(compose(f"method={last if len(first) == 2 else 'coop'}", "protocol=official"))
        elif name == "clip_adapter-official-imagenet":
            checked = config.validate(compose("method=clip_adapter", "protocol=official", "data=imagenet"))
            assert len(checked.clip.templates) == 1
        else:
            config.validate(compose(*(f"{before}={part}" for part in first), f"{after}={last}"))
    elif (group, name) == ("rewards", "none"):
        config.validate(compose("rewards=none", "method=zeroshot"))
    else:
        config.validate(compose(f"{group}={name}"))


@pytest.mark.slow
@pytest.mark.parametrize("learner", sorted(path.name for path in (CONF / "tune" / "few_shot").iterdir()))
def test_values_of_a_dataset_are_values_of_its_learner(compose, learner):
    """One of them as the defaults list reaches it, the others as Hydra would merge them."""
    files = sorted((CONF / "tune" / "few_shot" / learner).iterdir())
    assert {path.stem for path in files} <= set(options("data"))
    # with the published encoder; the tiny one brings values of its own
    reached = compose(f"method={learner}", f"data={files[0].stem}", "clip=rn50").few_shot
    cfg = compose(f"method={learner}")
    for path in files:
        published = OmegaConf.load(path)
        merged = OmegaConf.merge(cfg, published)
        config.validate(merged)
        if path == files[0]:
            assert all(reached[key] == merged.few_shot[key] for key in published.few_shot)


# what asks a language model, with the models of the papers, and one method with all; few-shot learners have no such model
ASKING = [name for name in options("method") if not (CONF / "few_shot" / f"{name}.yaml").is_file()]
LEARNERS = [name for name in options("method") if name not in ASKING]
OF_THE_PAPERS = ("qwen2_vl_2b", "gemma3_4b")
COMBINATIONS = [
    *(pytest.param(method, "digits", "features") for method in LEARNERS),
    *(
        pytest.param(
            *(method, "digits", model),
            marks=()
            if model.startswith("tiny")
            else pytest.mark.slow
            if model in OF_THE_PAPERS or method == "clsrl"
            else pytest.mark.faults,
        )
        for method, model in itertools.product(ASKING, options("model"))
        if model != "features"
    ),
    *(pytest.param(*c, marks=pytest.mark.slow) for c in itertools.product(["clsrl"], options("data"), ["qwen2_vl_2b"])),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("method", "data", "model"), COMBINATIONS)
def test_every_method_data_model_composes(compose, method, data, model):
    checked = config.validate(compose(f"method={method}", f"data={data}", f"model={model}"))
    assert (checked.method["name"], checked.data.name, checked.model.name) == (method, data, model)


def test_default_is_the_demo(compose):
    checked = config.validate(compose())
    assert (checked.method["name"], checked.data.name, checked.model.name, checked.shots) == (
        "nothinking",
        "digits",
        "tiny_qwen2_vl",
        16,
    )


@pytest.mark.parametrize(("method", "rewards"), [("clsrl", {"format", "accuracy"}), ("nothinking", {"equality"})])
def test_paper_configuration(compose, method, rewards):
    # authors' training script and section 4.1
    c = config.validate(compose(f"method={method}", "model=qwen2_vl_2b", "shots=4"))
    assert (c.model.path, c.model.lora.r, c.model.dtype, c.gpus) == ("Qwen/Qwen2-VL-2B-Instruct", 0, "bfloat16", 8)
    assert (c.model.image_size, c.model.max_prompt_tokens) == (384, None)  # prompts are never cut
    t = c.trainer
    assert (t.group_size, t.prompts_per_update, t.epochs, t.updates) == (4, 16, 50, None)
    assert (t.learning_rate, t.schedule, t.warmup_ratio, t.weight_decay, t.grad_clip) == (1e-6, "linear", 0, 0, 1)
    assert (t.beta, c.rollout.temperature, c.rollout.top_k, c.rollout.top_p) == (0.04, 1.0, 50, 1.0)
    assert c.rollout.max_completion_tokens == 1024
    assert set(c.rewards) == rewards and all(entry["weight"] == 1 for entry in c.rewards.values())


@pytest.mark.parametrize(("method", "rate"), [("clsrl", 2e-5), ("sft", 1e-4)])
@pytest.mark.slow
def test_adapters_have_a_rate_of_their_own(compose, method, rate):
    chosen = [f"method={method}", "model=qwen2_vl_2b", "shots=4", "gpus=1"]
    c = config.validate(compose(*chosen, "experiment=lora"))
    assert (c.trainer.learning_rate, c.model.lora.r, c.model.lora.alpha) == (rate, 16, 32)
    whole = config.validate(compose(*chosen, "model.lora.r=16"))
    assert replace(c.trainer, learning_rate=1e-6) == whole.trainer and c.model == whole.model, "and nothing else"
    said = check.still_adapters(whole)
    assert said is not None and "trainer.learning_rate=1e-06" in said and "experiment=lora" in said
    assert check.still_adapters(c) is None and check.still_adapters(config.validate(compose(*chosen))) is None


@pytest.mark.slow
def test_adapters_of_alert_keep_the_papers_rate(compose):
    c = config.validate(compose("method=alert"))
    assert (c.trainer.learning_rate, c.model.lora.r, c.model.lora.alpha) == (5e-6, 16, 32)
    assert check.still_adapters(c) is None
    untrained = ["method=zeroshot", "model=qwen2_vl_2b"]
    assert check.still_adapters(config.validate(compose(*untrained, "model.lora.r=4"))) is None


@pytest.mark.sampled
@pytest.mark.parametrize(("data", "epochs"), [("imagenet", 10), ("sun397", 25), ("eurosat", 100), ("dtd", 50)])
@pytest.mark.parametrize("method", ["clsrl", "sft"])
def test_epochs_of_a_dataset(compose, method, data, epochs):
    assert config.validate(compose(f"method={method}", f"data={data}", "model=qwen2_vl_2b")).trainer.epochs == epochs


@pytest.mark.slow
def test_method_chooses_trainer_and_rewards(compose):
    assert config.validate(compose("method=sft")).trainer.name == "sft"
    assert config.validate(compose("method=zeroshot")).trainer.name == "none"
    assert set(config.validate(compose("method=clsrl", "rewards=nothinking")).rewards) == {"equality"}


@pytest.mark.slow
def test_protocol_switches_reach_rewards_and_method(compose):
    c = config.validate(compose("method=clsrl", "protocol=official"))
    assert c.rewards["accuracy"]["match"] == c.rewards["format"]["match"] == "official"
    assert c.method["evaluation_prompt"] == "official"
    sft = config.validate(compose("method=sft", "protocol=official")).method
    train = {key: value for key, value in sft.items() if key.startswith("train_")}
    assert list(train.values()) == ["think", "bare", "last", "tagged"] and sft["instruction"] == "no_think"
    one_switch = config.validate(compose("method=clsrl", "protocol.accuracy_match=official"))
    assert one_switch.rewards["format"]["match"] == "strict"


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+foo=1"], "foo"),
        (["+trainer.lrr=1"], "trainer.lrr"),
        (["+method.lrr=1"], "lrr"),
        (["+rewards.equality.tag=x"], "tag"),
        (["rewards.equality.fn=common.rewards.nope"], "nope"),
        (
            ["method=clsrl", "rewards.accuracy.match=loose"],
            "rewards.accuracy.fn=clsrl.rewards.accuracy_reward: match=loose: choose one of strict, official",
        ),
        (["method=clsrl", "rewards.format.match=no"], "match=no: choose one of strict, official"),
        (["rewards.equality.weight=heavy"], "rewards.equality.weight"),
        (["~rewards.equality"], "rewards is empty"),
        (["trainer.group_size=1"], "trainer.group_size=1"),
        (["trainer.schedule=sudden"], "trainer.schedule=sudden"),
        (["trainer.learning_rate=0"], "trainer.learning_rate"),
        (["rollout.temperature=0"], "rollout.temperature"),
        (["rollout.top_p=0"], "rollout.top_p"),
        (["shots=0"], "shots"),
        (["gpus=-1"], "gpus=-1"),
        (["gpus=3"], "must be divisible by gpus=3"),
        (["trainer.betas=[0.9]"], "trainer.betas"),
        (["trainer.head_chunk=0"], "trainer.head_chunk"),
        (["trainer.evaluate_limit=0"], "trainer.evaluate_limit"),
        (["+deepspeed.foo=1"], "deepspeed.foo"),
        (["deepspeed.zero_optimization.stage=4"], "stage=4"),
        (["protocol.sft_question=short"], "protocol.sft_question=short: choose one of instructed, bare"),
        (["protocol.sft_image=middle"], "protocol.sft_image=middle: choose one of first, last"),
        (["protocol.sft_target=think"], "protocol.sft_target=think: choose one of label, tagged"),
        (["protocol.sft_loss=prompt"], "protocol.sft_loss=prompt: choose one of answer, everything"),
        (["doctor=maybe"], "doctor=maybe: choose one of auto, true, false"),
        (["trainer.warmup_ratio=3"], "trainer.warmup_ratio=3"),
        (["trainer.evaluate_every=-1"], "trainer.evaluate_every=-1"),
        (["trainer.betas=[1.5,0.9]"], "trainer.betas=[1.5, 0.9]"),
        (["trainer.loss_type=ppo"], "trainer.loss_type=ppo: choose one of grpo, bnpo, dr_grpo, dapo"),
        (["trainer.zero_variance=drop"], "trainer.zero_variance=drop"),
        (["trainer.num_iterations=3"], "checkpoint.every=50 must be divisible by the updates on a rollout batch, 3"),
        (["checkpoint.max_checkpoints=0"], "checkpoint.max_checkpoints=0"),
        (["model.feature_cache_gb=1"], "model.feature_cache_gb needs model.freeze_vision=true"),
        (["model.load_in_8bit=true"], "model.load_in_8bit=true needs adapters"),
        (["model.load_in_4bit=true"], "model.load_in_4bit=true needs adapters: 4-bit"),
        (["model.load_in_8bit=true", "model.load_in_4bit=true"], "load_in_8bit and model.load_in_4bit are both true"),
        (["rollout.backend=common.rollout.nope.Backend"], "rollout.backend"),
        (["rewards.equality.fn=builtins.max"], "builtins.max"),
        (["+rewards.mine={weight:1,fn:tests.test_rewards.Counting}"], "missing a required argument: 'limit'"),
        (["+rewards.mine={weight:1,fn:tests.test_rewards.Counting,limit:x}"], "limit='x' should be of type int"),
        (["+rewards.mine={weight:1,fn:tests.test_rewards.Counting,limit:-1}"], "rewards.mine.limit=-1"),
        (["+rewards.mine={weight:1,fn:tests.test_rewards.Silent}"], "rewards.mine.fn"),
        (["model.dtype=float16"], "model.dtype"),
        (["model.family=llava"], "model.family"),
        (["model.recipe=null"], "set model.path="),
        (["data.question=${data.nme}"], "data.nme"),
        (["data.question=???"], "data.question"),
        (["method.seed=one"], "seed"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_values_are_named(compose, overrides, message):
    with pytest.raises(UserError) as error:
        config.validate(compose(*overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rewards_may_import_their_types_for_checkers_only(compose, tmp_path, monkeypatch):
    (tmp_path / "typed_reward.py").write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from common.types import Sample\n"
        "def mine(samples: list[Sample], *, limit: int = 1) -> list[float]:\n    return [0.0 for _ in samples]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config.validate(compose("+rewards.mine={weight:1,fn:typed_reward.mine,limit:3}"))


@pytest.mark.slow
def test_signature_ignores_where_and_how_it_is_watched(compose):
    base = config.signature(config.plain(compose()))
    assert config.signature(config.plain(compose("tracking=none", "run_name=x", "cache_dir=y"))) == base
    assert config.signature(config.plain(compose("seed=2"))) != base
    assert config.signature(config.plain(compose("trainer.patience=1"))) != base
    assert config.signature(config.plain(compose("+rewards.extra={weight:1,fn:common.rewards.accuracy}"))) != base


@pytest.mark.slow
def test_label_scoring_is_on_and_part_of_the_result(compose):
    on, off = compose(), compose("label_scoring=false")
    assert config.validate(on).label_scoring is True and config.validate(off).label_scoring is False
    assert config.validate(compose("label_scoring=direct")).label_scoring == "direct"
    with pytest.raises(UserError, match="label_scoring=often"):
        config.validate(compose("label_scoring=often"))
    assert config.signature(config.plain(on)) != config.signature(config.plain(off))


def test_plain_values_hold_no_interpolations(compose):
    values = config.plain(compose())
    assert values["run_name"].startswith("nothinking-digits-few_shot-clean-tiny_qwen2_vl-s16-seed1-")
    assert "${" not in OmegaConf.to_yaml(values)


@pytest.mark.sampled
@pytest.mark.parametrize("clip", [name for name in options("clip") if name != "none"])
def test_every_clip_composes_with_a_learner_that_reads_texts(compose, clip):
    """Each also says which second encoder stands beside it."""
    chosen = config.validate(compose("method=tip_adapter", f"clip={clip}"))
    assert (chosen.clip.name, chosen.few_shot["name"]) == (clip, "tip_adapter") and chosen.visual is not None


@pytest.mark.sampled
@pytest.mark.parametrize("visual", [name for name in options("visual") if name != "none"])
def test_every_visual_encoder_composes_with_a_learner_that_only_looks(compose, visual):
    chosen = config.validate(compose("method=linear_probe", "clip=none", f"visual={visual}"))
    assert (chosen.clip.name, chosen.visual.name) == ("none", visual)
