"""Shared fixtures: an isolated environment, compositions without a command line, and models."""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from contextlib import contextmanager
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as run.py does, before torch is imported
# one core for each of the processes that share the tests, and the same rounding for one that runs them all: with more
# threads it depends on the size of a batch
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from common.runtime import process

resting = process.garbage_collector_paused()  # as a run does, until all tests are imported
resting.__enter__()

# families whose positions count tokens and that see each image once, equally large
SQUARE = ("smolvlm", "internvl", "gemma4")
# families whose tests beside those of tests/test_families.py are slow, or in make test-faults
NEWER = [
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2_5_vl", "qwen3_vl")),
    *(pytest.param(family, marks=pytest.mark.faults) for family in SQUARE),
]
# those of them that embeddings beside the vocabulary can be given to
EXTENDING = [each for each in NEWER if each.values != ("gemma4",)]

REPOSITORY = Path(__file__).parent.parent
GROUPS = {file.parent.name for file in REPOSITORY.glob("conf/*/*.yaml")}
CACHE = Path(os.environ.get("FEWSHOT_CACHE", REPOSITORY / "cache"))


# files that train at length go first
LONG = ("test_end_to_end", "test_ranks", "test_faults", "test_alert", "test_datasets", "test_judge_runs")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """What is long is slow, too, and so are the middle cases of what is sampled. Files that train at length go first,
    so that the two processes end together."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("faults"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("sampled"):
            cases[item.path, item.originalname].append(item)
    for item in (item for each in cases.values() for item in each[1:-1]):
        item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish():
    resting.__exit__(None, None, None)


def prompts_of(config):
    """What a run asks before its model is loaded."""
    from common.data import task
    from common.vlm import prompting

    return prompting.ask(prompting.of_config(config), task.build(config).task)


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No tracker, no hub, nothing written outside the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FEWSHOT_CACHE", str(CACHE))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def initialized():
    """Hydra as the command line starts it."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    registered()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        yield lambda *overrides: copy.deepcopy(composed(overrides))
    GlobalHydra.instance().clear()


@cache
def registered():
    """The schemas stay known to Hydra."""
    from common.config import composition

    composition.register()


@cache
def composed(overrides):
    """What a command line gives. Choosing among groups costs Hydra a third of a second and values nearly nothing, so
    values are applied, by Hydra's own function, to a copy of what the groups give."""
    import hydra
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    def is_value(word):
        key = word.lstrip("+~").partition("=")[0]
        return key not in GROUPS and not set("/@") & set(key)

    values = [] if any(word.startswith("hydra") for word in overrides) else list(filter(is_value, overrides))
    parsed = OverridesParser.create().parse_overrides(values) if values else []
    if not values or any(each.is_sweep_override() for each in parsed):
        return hydra.compose("config", list(overrides))
    cfg = copy.deepcopy(composed(tuple(word for word in overrides if not is_value(word))))
    ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
    return cfg


@pytest.fixture
def compose_named():
    """`compose_named("method=clsrl", ...)` as the command line would."""
    with initialized() as compose:
        yield compose


@pytest.fixture
def compose(compose_named, monkeypatch):
    """The same."""
    return compose_named


class Untrained(dict):
    """Folders by family, made when first asked for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, family):
        self[family] = self.make(family)
        return self[family]


@pytest.fixture(scope="session")
def untrained_folders(tmp_path_factory):
    """The tiny models without pre-training, by family; random weights scaled up so that logits are not flat."""
    from importlib import import_module

    import torch

    def make(family):
        folder, recipe = tmp_path_factory.mktemp(family), import_module(f"common.models.tiny.{family}")
        processor = recipe.build_processor()
        with torch.no_grad(), torch.random.fork_rng():  # whoever asks first has drawn its own numbers
            model = recipe.build_model(processor.tokenizer, seed=0)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(2.0)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return Untrained(make)


@pytest.fixture(scope="session")
def untrained_folder(untrained_folders):
    return untrained_folders["qwen2_vl"]


TOKENIZERS = REPOSITORY.parent / "shared" / "data" / "tokenizers"
REAL = {"qwen2_vl": ("qwen2_vl_2b", "qwen2_5"), "gemma3": ("gemma3_4b", "gemma3")}


@pytest.fixture(scope="session")
def real_vocabulary(tmp_path_factory):
    """`real_vocabulary(family)`: a folder in the hub's format with the real tokenizer; a narrow model of two layers."""
    from benchmarks.rehearse import checkpoint

    @cache
    def folder(family):
        model, tokenizer = REAL[family]
        if not (TOKENIZERS / tokenizer).is_dir():
            pytest.skip("the real tokenizers are not there")
        target = tmp_path_factory.mktemp(f"real_vocabulary_{family}")
        return checkpoint.write(model, target, 2, 1, TOKENIZERS / tokenizer, narrow=True)

    return folder


@pytest.fixture
def model_config(untrained_folders):
    """`ModelConfig` of an untrained folder; keywords override."""
    from common.config.schema import ModelConfig

    def make(**changes):
        values = {
            "name": "untrained",
            "family": "qwen2_vl",
            "dtype": "float32",
            "image_size": 32,
            "max_prompt_tokens": 512,
            **changes,
        }
        return ModelConfig(**{"path": str(untrained_folders[values["family"]]), **values})

    return make


@pytest.fixture
def load_vlm(untrained_folders, model_config):
    """A fresh copy of an untrained model on the CPU."""
    import torch

    from common.models import vlm

    def load(**changes):
        config = model_config(**changes)
        return vlm.load(untrained_folders[config.family], config, torch.device("cpu"))

    return load


@pytest.fixture(scope="session")
def digits_task():
    """16 shots of the real digits, seed 1."""
    from common.config.composition import validate
    from common.data import task

    with initialized() as compose:
        return task.build(validate(compose("method=sft"))).task


@pytest.fixture
def no_think():
    from clsrl.prompting import ClassListPrompt

    return ClassListPrompt(instruction="no_think", seed=1)


@pytest.fixture
def think():
    from clsrl.prompting import ClassListPrompt

    return ClassListPrompt(instruction="think", seed=1)


@pytest.fixture(scope="session")
def runner():
    """Runs whole jobs in processes that fork from one that has imported everything (tests/faults.py)."""
    from tests.faults import Runner

    return Runner()


@pytest.fixture(scope="session")
def process_group():
    """This process as a group of one."""
    from common.runtime.group import init_process_group

    return init_process_group(gpus=0)


@pytest.fixture
def ranks(monkeypatch):
    """Functions called as several ranks would, without processes (tests/ranks.py)."""
    from tests.ranks import Ranks

    return Ranks(monkeypatch)
