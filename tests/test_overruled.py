"""A key that another one makes meaningless: typed by a user, it is refused and says what goes first."""

from __future__ import annotations

import pytest
import yaml
from omegaconf import OmegaConf

from common.config.composition import validate
from common.config.suggest import GROUPS
from common.types import UserError
from tests.test_cli import run

PAPER = ["method=clsrl", "data=dtd", "model=qwen2_vl_2b"]
REFUSED = [
    (
        ["trainer.epochs=1"],
        "trainer.epochs=1 has no effect: trainer.updates=100, from a file of conf/, goes first; add",
    ),
    (["trainer.epochs=1", "trainer.updates=30"], "trainer.epochs=1 has no effect: trainer.updates=30 goes first"),
    (["method=alert", "model=tiny_gemma3", "trainer.epochs=2"], "trainer.updates=80"),
    (["trainer.evaluate_every=0", "trainer.evaluate_limit=50"], "trainer.evaluate_every=0 goes first"),
    (["trainer.schedule=constant", "trainer.final_ratio=0.5"], "trainer.schedule=constant goes first"),
    (["trainer.importance_cap=2"], "trainer.importance_correction=none"),
    (["trainer.resample_rounds=5"], "trainer.zero_variance=skip"),
    (["model.recipe=mine", "model.path=/m"], "model.recipe=mine has no effect: model.path=/m goes first"),
    (["model.revision=main"], "model.path=None"),
    ([*PAPER, "model.lora.alpha=8"], "model.lora.r=0"),
    (["sampler=coop", "protocol.sampler=clsrl"], "sampler=coop goes first"),
    (["method.list_share=0.5", "setting.list_share=0.2"], "method.list_share=0.5 goes first"),
    (["setting=open_set", "data.question=What is it?"], "open questions are data.open_question"),
    (
        ["data.open_question=What is it?"],
        "method.list_share=0.4, from a file of conf/, goes first; use setting=open_set",
    ),
    (["data=dtd", "data.source=hub", "data.folder=photos"], "data.source=hub goes first"),
    (["data=dtd", "data.source=hub", "data.reader.images=photos"], "data.source=hub goes first"),
    (["data=dtd", "data.hub.id=me/mine"], "data.hub.id=me/mine has no effect: data.source=local"),
    (["method=cafo", "clip.prompts=a.json", "clip.templates=['of {}']"], "clip.prompts=a.json goes first"),
    (["method=alert", "model=tiny_gemma3", "method.draft_file=x"], "method.draft=class_means, from a file of conf/,"),
    (
        ["method=alert", "model=tiny_gemma3", "method.bank=b", "method.initialisation=random"],
        "method.bank=b goes first",
    ),
    (["method=alert", "model=tiny_gemma3", "few_shot=cafo"], "few_shot=cafo has no effect: method.draft=class_means"),
    (["method=clsrl", "few_shot=cafo"], "few_shot=cafo has no effect: method=clsrl goes first; a learner is fitted by"),
    (["run_name=mine", "label=other"], "label=other has no effect: run_name=mine goes first"),
]
TAKEN = [
    ["trainer.epochs=1", "trainer.updates=null"],
    [*PAPER, "trainer.epochs=1"],
    [*PAPER, "trainer.updates=2"],
    ["trainer.updates=3"],
    ["model.recipe=null", "model.path=/m"],
    ["sampler=coop", "protocol.sampler=coop"],
    ["protocol.sampler=clsrl"],
    ["setting.list_share=0.2"],
    ["setting=open_set", "data.open_question=What is it?"],
    ["data.question=What is it?"],
    ["method=zeroshot", "trainer.epochs=1"],  # of a sweep over methods
    ["method=alert", "model=tiny_gemma3", "few_shot=cafo", "few_shot.epochs=2", "method.draft=few_shot"],
    ["label=mine"],
]


def made(compose, typed):
    """What becomes of a command line; only its groups take a composition."""
    groups = [each for each in typed if each.partition("=")[0] in GROUPS]
    cfg = compose(*groups)
    for key, _, value in (each.partition("=") for each in typed if each not in groups):
        OmegaConf.update(cfg, key, yaml.safe_load(value))
    return cfg


@pytest.mark.sampled
@pytest.mark.parametrize(("typed", "message"), REFUSED, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_what_is_typed_without_effect_is_refused(compose, typed, message):
    cfg = made(compose, typed)
    with pytest.raises(UserError) as error:
        validate(cfg, typed)
    assert message in str(error.value) and "has no effect" in str(error.value)
    validate(cfg)  # a file may say so


@pytest.mark.sampled
@pytest.mark.parametrize("typed", TAKEN, ids=lambda typed: typed[-1])
def test_what_has_an_effect_is_taken(compose, typed):
    validate(made(compose, typed), typed)


@pytest.mark.slow
def test_the_command_line_refuses_it(tmp_path):
    done = run("trainer.epochs=1", folder=tmp_path / "run")
    assert done.returncode == 1 and "trainer.epochs=1 has no effect: trainer.updates=100" in done.stderr
    assert run("trainer.epochs=1", "trainer.updates=null", "dry=true", folder=tmp_path / "run").returncode == 0
