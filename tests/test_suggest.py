"""Misspelt keys, groups and options: the error names what is probably meant, and what it names works."""

from __future__ import annotations

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

import run
from common.config import aliases, suggest
from common.config import composition as config
from tests.conftest import REPOSITORY


@pytest.fixture
def default(compose):
    return compose()


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "trainer.learning_rate"),
        ("learning_rate", "trainer.learning_rate"),
        ("trainer.learnig_rate", "trainer.learning_rate"),
        ("trainer.lr", "trainer.learning_rate"),
        ("method.lrr", "trainer.learning_rate"),
        ("tranier.epochs", "trainer.epochs"),
        ("Temperature", "rollout.temperature"),
        ("max-new-tokens", "rollout.max_completion_tokens"),
        ("beta", "trainer.beta"),
        ("shot", "shots"),
        ("gpu", "gpus"),
        ("lora_r", "model.lora.r"),
        ("data.foldr", "data.folder"),
        ("rewards.equalty.weight", "rewards.equality.weight"),
        ("output_dir", "hydra.run.dir (of a sweep: hydra.sweep.dir)"),
        ("method.list_all_below", "+method.list_all_below"),
        ("deepspeed.steps_per_prnt", "+deepspeed.steps_per_print"),
        ("deepspeed.zero_optimization.overlap_comm", "+deepspeed.zero_optimization.overlap_comm"),
        (
            "modle",
            "model=features|gemma3_4b|gemma4_e2b|internvl3_5_1b|internvl3_5_2b|qwen2_5_vl_3b|qwen2_5_vl_7b|qwen2_vl_2b|qwen3_vl_2b|qwen3_vl_4b|qwen3_vl_8b|smolvlm2_256m|smolvlm2_2b|smolvlm2_500m|tiny_gemma3|tiny_qwen2_vl",
        ),
        ("method@mine", f"method={'|'.join(suggest.options('method'))}"),
    ],
)
def test_the_nearest_key_is_named(default, key, meant):
    assert suggest.unknown_key(key, default) == f"unknown config key {key}; did you mean {meant}?"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("zzz", "`python run.py --cfg job` shows all keys"),
        ("name", "`python run.py --cfg job` shows all keys"),  # nine keys end so
        ("model.lora.rr", "model.lora has r, alpha, targets, projector"),
        ("rewards.equality.matc", "rewards.equality has weight, fn"),
        ("method.k", "it belongs to method=alert|alert_sft|alert_zeroshot|dive_k|gemma_1shot, not method=nothinking"),
        ("rewards.reasoning.weight", "it belongs to rewards=alert"),
    ],
)
def test_what_is_said_where_no_key_is_near(default, key, said):
    assert suggest.unknown_key(key, default) == f"unknown config key {key}; {said}"


def test_a_key_that_another_choice_has_is_said_with_that_choice(compose):
    cfg = compose("method=sft")
    assert suggest.unknown_key("trainer.beta", cfg).endswith("it belongs to trainer=grpo, not trainer=sft")
    said = suggest.unknown_key("num_generations", cfg)
    assert "did you mean trainer.group_size (it belongs to trainer=grpo, not trainer=sft)?" in said


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("modle=tiny_gemma3", "model=tiny_gemma3"),
        ("dataset=dtd", "data=dtd"),
        ("dataset=cifar", "data=caltech101|digits|dtd|"),
        ("~rewards.equalty", "rewards.equality?"),
    ],
)
def test_a_given_value_is_taken_over_where_it_is_an_option(default, given, meant):
    said = suggest.unknown_key(given.lstrip("~").partition("=")[0], default, [given])
    assert f"did you mean {meant}" in said and "+" not in said


def test_no_deletion_is_suggested_that_would_fail(default):
    assert "trainer.learning_rate" not in suggest.unknown_key("lr", default, ["~lr"])


@pytest.mark.sampled
@pytest.mark.parametrize(
    "works",
    [
        "+method.list_all_below=3",
        "+deepspeed.steps_per_print=5",
        "+deepspeed.zero_optimization.overlap_comm=true",
        "+rewards.mine={weight:1,fn:common.rewards.accuracy}",
    ],
)
def test_a_suggested_plus_works(compose, works):
    key = works[1:].partition("=")[0]
    assert f"+{key}" in suggest.nearest(key, compose())
    config.validate(compose(works))


def test_every_alias_is_a_key_or_a_group(compose):
    cfg = compose("experiment=shuffled_rewards")
    for word, name in aliases.ALIASES.items():
        known = name in suggest.GROUPS or name == "hydra.run.dir" or OmegaConf.select(cfg, name, default="") != ""
        assert known, f"{word} -> {name}"
        assert word not in suggest.GROUPS and word not in cfg, f"{word} is a key of ours"


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("lr=1e-3", "unknown config key lr; did you mean trainer.learning_rate?"),
        ("modle=tiny_gemma3", "unknown config key modle; did you mean model=tiny_gemma3?"),
        ("~lr", "unknown config key lr;"),
        ("hydra.run.dri=x", "unknown config key hydra.run.dri; hydra.run has dir"),
        (
            "data=digit",
            "Could not find 'data/digit'; did you mean data=digits? Available options in 'data': caltech101 ",
        ),
        ("method=foo", "Could not find 'method/foo'; Available options in 'method': adaptive_thinking alert "),
        ("model=null", "model=null: give one option: features, "),
        (
            "data.question=Which, then?",
            "data.question: Which, then? are several values because of its comma; quote one",
        ),
        ("type", "type: this is no key=value; a value with blanks needs quotes"),
        ("model=[tiny_gemma3]", "model=[tiny_gemma3]: give one option: features, "),
    ],
)
def test_hydras_own_errors_are_explained(compose, argument, said):
    with pytest.raises((HydraException, ValueError)) as error:
        compose(argument)
    explanation = suggest.explain(error.value, ["method=clsrl", argument])
    assert explanation is not None and explanation.startswith(said) and "\n" not in explanation
    assert "search path" not in explanation


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("few_shot.cafo.epochs=2", "unknown config key few_shot.cafo.epochs; it is now few_shot.epochs"),
        ("few_shot.epochs=2", "unknown config key few_shot.epochs; it is of few-shot learners, and this run has none"),
        ("+clip.views=2", "unknown config key clip.views; it is of few-shot learners"),
    ],
)
@pytest.mark.slow
def test_a_run_without_a_few_shot_learner_has_none_of_its_values(compose, argument, said):
    assert [compose("method=clsrl")[key] for key in ("few_shot", "clip", "visual")] == [None] * 3
    with pytest.raises(AssertionError) as error:  # of OmegaConf: there is nothing below null
        compose("method=clsrl", argument)
    assert suggest.explain(error.value, ["method=clsrl", argument]).startswith(said)
    assert suggest.explain(AssertionError("another"), ["method=clsrl"]) is None


def test_a_value_of_another_learner_says_whose_it_is(compose):
    said = suggest.unknown_key("few_shot.alpha", compose("method=coop"))
    assert said.endswith("it belongs to few_shot=ape|ape_t|cafo|timo|tip_adapter|tip_adapter_f, not few_shot=coop")


def test_a_value_of_the_wrong_type_is_hydras_to_explain(compose):
    with pytest.raises(HydraException) as error:
        compose("trainer.learning_rate=fast")
    assert suggest.explain(error.value, ["trainer.learning_rate=fast"]) is None


@pytest.mark.slow
def test_a_key_in_a_file_of_the_users_own_is_explained(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer: {lr: 1}\n")
    assert refusal(monkeypatch, "-cd", str(tmp_path), "experiment=mine") == (
        "error: In 'experiment/mine': unknown config key trainer.lr; did you mean trainer.learning_rate?"
    )


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["lr=1e-3"], ["-m", "lr=1e-3,1e-4"], ["-m", "+trainer.lr=1"]], ids=str)
def test_the_command_line_says_it_in_one_line(monkeypatch, arguments, tmp_path):
    said = refusal(monkeypatch, *arguments, f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/runs")
    assert said.startswith("error: unknown config key") and said.endswith("did you mean trainer.learning_rate?")


def refusal(monkeypatch, *arguments):
    """What `python run.py <arguments>` exits with."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["run.py", "--config-path", str(REPOSITORY / "conf"), *arguments])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        run.run()
    return ended.value.code
