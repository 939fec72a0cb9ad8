"""Run names: readable, and different exactly where results may differ."""

from __future__ import annotations

import copy
import itertools
import sys

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import run
from common.config import composition as config
from common.types import UserError
from tests.conftest import REPOSITORY

DEFAULT = "nothinking-digits-few_shot-clean-tiny_qwen2_vl-s16-seed1"


def of_its_own(cfg):
    """The name without the digits behind it, which are the first of its signature."""
    front, _, digits = cfg.run_name.rpartition("-")
    assert config.signature(config.plain(cfg)).startswith(digits) and len(digits) == 6
    return front


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.learning_rate=1e-3", "trainer=grpo", "rewards=nothinking", "experiment=none"],  # as they are anyway
        ["tracking=none", "tracking.group=${run_name}", "hydra.job.name=x"],
    ],
    ids=str,
)
def test_what_changes_no_result_is_not_in_the_name(compose_named, overrides):
    assert compose_named(*overrides).run_name == (usual := compose_named()).run_name and of_its_own(usual) == DEFAULT


@pytest.mark.slow
def test_what_is_left_out_counts(compose_named):
    names = {compose_named("method=clsrl", *left).run_name for left in ([], ["~rewards.format"], ["~rewards.accuracy"])}
    assert len(names) == 3


@pytest.mark.slow
def test_the_named_choices_stand_in_front(compose_named):
    cfg = compose_named(
        "method=sft", "data=dtd", "setting=open_set", "protocol=official", "model=qwen2_vl_2b", "shots=all"
    )
    assert of_its_own(cfg) == "sft-dtd-open_set-official-qwen2_vl_2b-sall-seed1"


# choices of groups, then values: each of another result, or as its neighbour in the same line
POINTS = [
    [([], {}), ([], {"gpus": 4, "tracking.mode": "offline", "cache_dir": "/x", "data.root": "/x"})],
    [([], {"trainer.learning_rate": 5e-4}), ([], {"trainer.learning_rate": 5e-4, "checkpoint.every": 3})],
    [([], {"trainer.learning_rate": 5e-4, "trainer.beta": 0.1})],
    [([], {"trainer.beta": 0.1})],
    [([], {"trainer.beta": 0.2})],
    [([], {"seed": 2})],
    [([], {"seed": 2, "trainer.beta": 0.1})],
    [([], {"shots": 4})],
    [([], {"rewards.equality.weight": 1})],  # 1 and 1.0 have different signatures
    [([], {"rewards.mine": {"weight": 1, "fn": "common.rewards.accuracy"}})],
    [([], {"rewards": {}})],
    [([], {"label_scoring": False})],
    [([], {"method.name": "mine"})],  # no option has this name
    [([], {"method.name": "mine", "trainer.beta": 0.1})],
    [(["deepspeed=zero3"], {}), ([], {"deepspeed.zero_optimization.stage": 3})],
    [(["data=folder"], {"data.folder": "/a"})],
    [(["data=folder"], {"data.folder": "/b"}), (["data=folder"], {"data.folder": "/b", "data.skip_bad": True})],
    [(["method=alert"], {}), (["method=alert"], {"rewards.reasoning.runtime.retries": 8})],
    [(["method=alert"], {"rewards.reasoning.judge.max_tokens": 8})],
    [(["method=alert"], {"method.draft_file": "/a"})],
    [(["method=alert"], {"method.bank": "/a"})],
    [(["setting=shift"], {}), (["setting=shift"], {"setting.targets.imagenet_v2.cache_gb": 0})],
    [(["setting=shift"], {"setting.targets.imagenet_v2.question": "What?"})],
]


@pytest.mark.slow
def test_names_are_equal_exactly_where_signatures_are(compose_named):
    composed = {groups: compose_named(*groups) for groups in {tuple(groups) for line in POINTS for groups, _ in line}}
    named = []
    for number, (groups, values) in ((number, point) for number, line in enumerate(POINTS) for point in line):
        cfg = copy.deepcopy(composed[tuple(groups)])
        for key, value in values.items():
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        named.append((number, cfg.run_name, config.signature(config.plain(cfg))))
    for (one, name, signature), (other, another, its) in itertools.combinations(named, 2):
        assert (name == another) == (signature == its) == (one == other), f"{POINTS[one]}, {POINTS[other]}: {name}"


@pytest.mark.slow
def test_a_label_and_a_name_of_ones_own(compose_named):
    assert of_its_own(compose_named("label=lr_sweep")) == f"lr_sweep-{DEFAULT}"
    assert compose_named("label=lr_sweep", "shots=4").run_name.startswith("lr_sweep-nothinking-digits")
    assert compose_named("run_name=mine", "trainer.beta=0.1").run_name == "mine"
    assert compose_named("run_name='mine${run_suffix:}'", "trainer.beta=0.1").run_name == compose_named(
        "label=mine", "trainer.beta=0.1"
    ).run_name.replace(f"-{DEFAULT}", "")


@pytest.mark.sampled
@pytest.mark.parametrize("label", ["a/b", "..", "a b", "-x"])
def test_a_label_that_is_no_part_of_a_folder_name_is_refused(compose_named, label):
    with pytest.raises(UserError, match="^label="):
        config.validate(compose_named(f"label='{label}'"))


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(
    ("chosen", "front"),
    [
        ("none", ""),
        ("alert_no_judge", "alert_no_judge-"),
        ("[alert_no_judge,shuffled_rewards]", "alert_no_judge-shuffled_rewards-"),
    ],
)
def test_presets_stand_in_front_and_folders_are_named_alike(compose_named, monkeypatch, chosen, front):
    arguments = [f"experiment={chosen}", "label=x"]
    cfg = hydra.compose("config", arguments, return_hydra_config=True)  # as Hydra has it when it makes the folder
    name = cfg.run_name
    assert name.startswith(f"x-{front}")
    assert OmegaConf.select(cfg, "hydra.run.dir") == f"outputs/{name}"
    assert OmegaConf.select(cfg, "hydra.sweep.subdir") == name
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    HydraConfig.instance().set_config(cfg)
    assert compose_named(*arguments).run_name == name, "the job's own configuration has no part of Hydra's any more"
    assert config.decides_result({"label": "x", "run_name": name}) == {}


@pytest.mark.slow
def test_the_points_of_a_sweep_have_folders_of_their_own(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "job", lambda cfg, folder: seen.append((cfg.run_name, folder)))
    arguments = ["trainer.learning_rate=1e-3,5e-4", f"hydra.sweep.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", "--config-path", str(REPOSITORY / "conf"), *arguments])
    GlobalHydra.instance().clear()
    run.main()
    names = [name for name, _ in seen]
    assert len(set(names)) == 2 and all(name.startswith(f"{DEFAULT}-") for name in names)
    assert [folder for _, folder in seen] == [tmp_path / name for name in names]


def test_a_name_can_be_read_where_hydra_has_finished(compose_named):
    cfg = compose_named("trainer.beta=0.1")
    inside = cfg.run_name
    GlobalHydra.instance().clear()
    assert cfg.run_name == inside
