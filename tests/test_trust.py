"""A folder from somebody else: nothing in it runs code, unless its user says so. Each payload would leave a file."""

from __future__ import annotations

import ast
import functools
import json
import os
import pickle
import random
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from PIL import Image

from common import Classifier
from common.config import composition, trust
from common.export import __main__ as export
from common.export import card
from common.models import files, meter
from common.models import vlm as vlms
from common.predict import __main__ as predict
from common.predict.trained_model import TrainedModel, config_of
from common.report import __main__ as report
from common.run.run_folder import RunFolder
from common.serve import __main__ as serve
from common.types import Prompt, UserError
from tests.test_html import NAMES, answered, write  # noqa: F401
from tests.test_shared_prefix import LORA

ROOT = Path(__file__).parent.parent


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A package whose import leaves a file; returns whether it has."""
    marker = tmp_path / "it ran"
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\ndef attack(*args, **kwargs): ...\nbuild = meter = attack\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return marker.exists


@pytest.fixture
def foreign(write):  # noqa: F811
    """`foreign(key=value, …)`: a finished run's folder whose config.yaml was changed; keys have `__` for dots."""

    def make(**changes):
        folder = write("run", answered(["a"], ["six"], ["six"], NAMES, [0.9]))
        values = yaml.safe_load((folder / "config.yaml").read_text())
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = values
            for name in parents:
                node[name] = node.get(name) or {}  # of a group that the run has not, too
                node = node[name]
            node[last] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        return folder

    return make


def placed(place):
    """A place of the configuration with names for its stars."""
    return [{"rewards": "accuracy", "targets": "dtd", "learners": "linear_probe"}[place[i - 1]] if name == "*" else name
            for i, name in enumerate(place)]  # fmt: skip


UNUSED = ("rewards", "trainer", "tracking")  # what only a training needs is not taken over from a folder


@pytest.mark.parametrize("place", [place for place in trust.PLACES if place[0] in UNUSED[1:]], ids=".".join)
def test_parts_of_a_training_are_not_taken_over_from_a_folder(foreign, evil, place):
    config = config_of(TrainedModel.of(foreign(**{"__".join(place): "evil.attack"})))
    assert (config.trainer.name, config.tracking.tracker) == ("none", "common.run.tracking.WandbTracker")
    assert config.trainer.optimizer == "torch.optim.AdamW" and not evil()


@pytest.mark.sampled
@pytest.mark.parametrize("place", [place for place in trust.PLACES if place[0] not in UNUSED], ids=".".join)
def test_no_place_of_a_loaded_configuration_names_foreign_code(foreign, evil, place):
    key = placed(place)
    folder = foreign(**{"__".join(key): "evil" if key[-1] == "recipe" else "evil.attack"})
    with pytest.raises(UserError) as refused:
        config_of(TrainedModel.of(folder))
    said = str(refused.value)
    assert f"{folder / 'config.yaml'} names code that would be run here: {'.'.join(key)}=evil" in said
    assert "is not of this project" in said and "--trust-code" in said and "trust_code=True" in said
    assert not evil()


def test_whoever_trusts_it_runs_it(foreign, evil):
    """The payload is a live one: what the other tests refuse would have run."""
    folder = foreign(method={"name": "mine", "_target_": "evil.attack"})
    config_of(TrainedModel.of(folder, trust_code=True))
    assert evil()


@pytest.mark.parametrize("command", ["predict", "serve", "export", "class"])
def test_every_command_that_loads_a_folder_refuses(foreign, tmp_path, capsys, command):
    """The issue's own example: a program is called with arguments."""
    marker = tmp_path / "it ran"
    folder = foreign(method={"name": "mine", "_target_": "subprocess.call", "args": ["touch", str(marker)]})
    if command == "class":
        with pytest.raises(UserError, match=r"method._target_=subprocess.call is not of this project"):
            Classifier.load(folder)
    else:
        Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
        if command == "serve" and find_spec("gradio") is None:
            pytest.skip("needs Gradio")
        main, words = {
            "predict": (predict.main, [str(folder), str(tmp_path / "p.png")]),
            "serve": (serve.main, [str(folder)]),
            "export": (export.main, [str(folder), str(tmp_path / "new")]),
        }[command]
        assert main(words) == 2
        assert "method._target_=subprocess.call is not of this project" in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "new").exists()


def test_reports_and_resuming_only_read_it(foreign, evil, capsys, compose):
    folder = foreign(
        method={"name": "mine", "_target_": "evil.attack"}, rewards={"x": {"weight": 1, "fn": "evil.attack"}}
    )
    report.main(["compare", str(folder)])
    report.main(["html", str(folder)])
    with pytest.raises(UserError, match="already holds a run with other values.*evil.attack"):
        RunFolder(folder).finished_result(composition.plain(compose()))
    assert (folder / "report.html").is_file() and not evil()
    (folder / "manifest.json").write_text(json.dumps({"splits": {"train": {"names": ["a", "b"]}}}))
    assert report.main(["audit", str(folder)]) == 2
    assert "rewards.x.fn=evil.attack is not of this project" in capsys.readouterr().err and not evil()


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("method._target_", "common.plugins.import_module", "is not defined in this project"),
        ("method._target_", "common.run.result.subprocess", "is not defined in this project"),
        ("method._target_", "common.plugins.locate", "is no method"),
        ("method._target_", "common.models.files.of_recipe", "is no method"),
        ("method._target_", "common.report.compare.Table", "is no method"),
        ("setting.build", "common.plugins.locate", "is no setting"),
        ("data.reader._target_", "common.plugins.check_module", "is no reader of a dataset"),
        ("data.hub.reader", "subprocess.call", "is not of this project"),
        ("learner.build", "common.launch.start_ranks", "is no learner"),
        ("rollout.check", "common.models.files.weights_folder", "is no check of a sampler"),
        ("model.recipe", "shutil", "is not of this project"),
        ("few_shot._target_", "common.models.offloaded.OffloadedRows", "is no few-shot learner"),
        ("rewards.x.fn", "common.models.offloaded.OffloadedRows", "is no reward"),
        ("rewards.x.fn", "common.models.offloaded.OffloadedEmbeddings", "is no reward"),
        ("few_shot.extra._target_", "os.system", "is not of this project"),
        ("method._target_", ["os", "system"], "is not of this project"),
        ("method._target_", "common", "is not of this project"),
        ("method._target_", "tests.test_trust.evil", "is not of this project"),
        ("method._target_", "commonplace.x", "is not of this project"),
    ],
)  # fmt: skip
def test_what_is_the_projects_own_is_exact(key, value, why):
    values = value
    for name in reversed(key.split(".")):
        values = {name: values}
    with pytest.raises(UserError) as refused:
        trust.check(values, Path("config.yaml"))
    assert why in str(refused.value)
    trust.check(values, Path("config.yaml"), trust_code=True)


def options():
    """What conf/ and sweeps/ have, each under its keys."""
    for path in [*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("sweeps/data/*.yaml")]:
        group, values = path.relative_to(ROOT).parts[1], yaml.safe_load(path.read_text())
        if isinstance(values, dict) and group != "hydra":
            yield path, values if group in values else {group: values}


def test_what_conf_names_may_be_named():
    named = {(path, key, value): trust._foreign(value, kind)
             for path, values in options() for key, value, kind in trust._named(values)}  # fmt: skip
    assert len(named) > 90 and not {where: why for where, why in named.items() if why}
    assert len({value for _, _, value in named}) > 40


# Every call that turns a dotted path into code, and where the path comes from.
CALLS = {
    "config.method['_target_']": "method._target_",
    "FAMILIES.get(config.model.family, config.model.family)": "model.family",
    "FAMILIES.get(name, name)": "model.family",
    "recipe": "model.recipe",
    "config.model.recipe": "model.recipe",
    "config.setting.build": "setting.build",
    "config.rollout.backend": "rollout.backend",
    "config.rollout.check": "rollout.check",
    "config.learner.build": "learner.build",
    "config.learner.check": "learner.check",
    "config.load": "clip.load",
    "config.tracking.tracker": "tracking.tracker",
    "config.optimizer": "trainer.optimizer",
    "config.loss": "trainer.loss",
    "config.advantages": "trainer.advantages",
    "trainer.loss": "trainer.loss",
    "trainer.advantages": "trainer.advantages",
    "entry['_target_']": "data.reader._target_",  # and few_shot._target_
    "self.target": "few_shot.learners.x._target_",
    "reader": "data.reader.reader",
    "fallback['_target_']": "data.reader.fallback._target_",
    "entry['fn']": "rewards.x.fn",
    "path": None,  # inside common/plugins.py; rollout.backend and learner.build; suggestions for any _target_ or fn
    "module": None,  # inside common/plugins.py
    "value": None,  # in common/config/trust.py itself
    "value.rpartition('.')[0]": None,
    "f'{kind.__module__}.{kind.__name__}'": None,  # a class that is there already
}


@functools.cache
def own_code():
    """The syntax of every file of the repository's packages, by path."""
    return {path: ast.parse(path.read_text()) for package in trust.OWN for path in (ROOT / package).rglob("*.py")}


@pytest.mark.slow
def test_every_call_that_imports_what_it_is_told_is_known():
    found = set()
    for tree in own_code().values():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            if name in ("locate", "check_call", "check_module", "of_recipe", "import_module", "__import__"):
                found.add(ast.unparse(call.args[0]))
    assert found == set(CALLS), "a new place of the configuration that names code belongs into trust.PLACES"
    assert all(trust.kind_of(tuple(key.split("."))) is not None for key in CALLS.values() if key)


def test_kinds_ask_for_members_that_their_protocols_have():
    from common.few_shot.heads.base import FewShotHead
    from common.learner import Learner
    from common.models.families import Family
    from common.rollout.base import Rollout
    from common.vlm.prompting import Prompting

    for kind, protocol in (
        (trust.METHOD, Prompting),
        (trust.FAMILY, Family),
        (trust.SAMPLER, Rollout),
        (trust.LEARNER, FewShotHead),
        (trust.PLACES["learner", "build"], Learner),
    ):
        assert set(kind.members) <= {*dir(protocol), *protocol.__annotations__}


def test_nothing_of_this_machine_is_looked_up(foreign, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    folder = foreign(data__question="What is ${oc.env:SECRET}?")
    for trusted in (False, True):
        with pytest.raises(UserError, match=r"data.question holds \$\{…\}") as refused:
            config_of(TrainedModel.of(folder, trust_code=trusted))
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_tags_of_yaml_make_no_objects(foreign, tmp_path, capsys, tag, compose):
    folder = foreign()
    (folder / "config.yaml").write_text(f"signature: x\nmethod: {tag} [{tmp_path / 'it ran'}]\n")
    with pytest.raises(UserError, match=r"config.yaml cannot be read"):
        config_of(TrainedModel.of(folder))
    with pytest.raises(UserError, match=r"config.yaml cannot be read"):
        RunFolder(folder).finished_result(composition.plain(compose()))
    report.main(["compare", str(folder)])
    assert "damaged" in capsys.readouterr().out and not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("text", ["- a\n- list\n", "signature: x\n", "signature: x\ngpus: 0\ntracking: 3\ndata: {}\n"])
def test_a_configuration_that_is_none_is_one_line(foreign, text):
    folder = foreign()
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"was not written by a run|is of another version"):
        config_of(TrainedModel.of(folder))


class Bomb:
    """What unpickling it calls leaves a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bomb(tmp_path):
    return Bomb(tmp_path / "it ran")


def test_random_states_of_a_resumed_run_are_plain_values(tmp_path, bomb):
    from common.run.checkpoint import Checkpoints, State, seed_generators

    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    seed_generators(7)
    state = State(1, 0.0, None, 1, 7, None, "", {}, 0.0)
    checkpoints.write(state, lambda folder: None)
    drawn = random.random(), numpy.random.rand(3).tolist(), torch.rand(3).tolist()
    checkpoints.restore_generators(7)
    assert drawn == (random.random(), numpy.random.rand(3).tolist(), torch.rand(3).tolist())
    torch.save({"python": bomb}, checkpoints.latest() / "random-0.pt")
    with pytest.raises(UserError, match=r"random-0.pt holds more than tensors and plain values"):
        checkpoints.restore_generators(7)
    assert not bomb.path.exists()
    torch.load(checkpoints.latest() / "random-0.pt", weights_only=False)
    assert bomb.path.exists(), "the payload is a live one"


@pytest.mark.parametrize("name", ["deepspeed/mp_rank_00_model_states.pt", "universal/zero/w/fp32.pt"])
def test_a_checkpoint_of_deepspeed_is_looked_at_before_deepspeed_loads_it(tmp_path, bomb, process_group, name):
    from common.config.schema import TrainerConfig
    from common.training.engine import Engine

    settings = {"zero_optimization": {"stage": 2}}
    trainer = TrainerConfig(name="sft", learning_rate=0.1, epochs=1.0)
    engine = Engine(torch.nn.Linear(2, 2), trainer, settings, 4)
    for update in (0, 1):
        engine.backward(engine(torch.ones(1, 2)).sum(), last=True)
        engine.step(update)
        if update == 0:
            engine.save(tmp_path / "deepspeed")
            kept = engine.engine.module.weight.detach().clone()
    engine.restore(tmp_path / "deepspeed")
    assert torch.equal(engine.engine.module.weight, kept), "what DeepSpeed writes itself is loaded"
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": bomb}, path)
    with pytest.raises(UserError, match=f"{path.name} holds more than tensors and plain values"):
        engine.restore(path.parents[name.count("/") - 1])
    engine.close()
    assert not bomb.path.exists()


def test_a_few_shot_learners_state_is_plain_values(tmp_path, bomb):
    from common.runtime import saved

    torch.save({"means": torch.ones(2), "mix": (1.0, 2)}, tmp_path / "good.pt")
    assert saved.load(tmp_path / "good.pt")["mix"] == (1.0, 2)
    for write_it in (lambda path: torch.save(bomb, path), lambda path: path.write_bytes(pickle.dumps(bomb))):
        write_it(tmp_path / "few_shot.pt")
        with pytest.raises(UserError, match=r"few_shot.pt (holds more than|cannot be read)"):
            saved.load(tmp_path / "few_shot.pt")
    (tmp_path / "few_shot.pt").write_bytes(b"PK cut off")
    with pytest.raises(UserError, match=r"few_shot.pt (holds more than|cannot be read)"):
        saved.load(tmp_path / "few_shot.pt")
    assert not bomb.path.exists()


@pytest.mark.slow
def test_nothing_else_unpickles():
    """Every call of `torch.load` and `numpy.load` says so itself; pickle is used nowhere."""
    for path, tree in own_code().items():
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, words = ast.unparse(call.func), {each.arg: ast.unparse(each.value) for each in call.keywords}
            if name == "torch.load":
                assert words.get("weights_only") == "True", path
            if name in ("np.load", "numpy.load"):
                assert words.get("allow_pickle") == "False", path
            assert name not in ("yaml.unsafe_load", "yaml.full_load", "torch.jit.load"), path
            assert words.get("trust_remote_code", "False") == "False", path


def test_candidates_of_somebody_else_are_arrays_of_numbers(tmp_path, bomb):
    from common.few_shot import candidates
    from common.few_shot.candidates import Candidates, Origin

    found = Candidates(("a",), numpy.zeros((1, 1), int), numpy.zeros((1, 1)), Origin("coop", "dtd", 1, 1, False))
    candidates.write_candidates(tmp_path / "test", found, ["one"], [0])
    assert candidates.read_candidates(tmp_path / "test", ["a"], ["one"], "dtd", "test").images == ("a",)
    numpy.savez(tmp_path / "test.npz", image_id=numpy.array([bomb], object), topk_idx=[[0]], topk_logit=[[0.0]])
    with pytest.raises(UserError, match=r"test.npz is no .npz file or"):
        candidates.read_candidates(tmp_path / "test", ["a"], ["one"], "dtd", "test")
    assert not bomb.path.exists()


def test_a_bank_of_somebody_else_is_tensors(tmp_path, bomb):
    from alert.bank import file as bank_file

    bank_file.export(tmp_path, torch.ones(2, 1, 3), ["a", "b"], "qwen2_vl")
    assert bank_file.read(tmp_path, ["a", "b"]).shape == (2, 1, 3)
    for name, read in (
        ("bank", lambda: bank_file.read(tmp_path, ["a", "b"])),
        ("begun", lambda: bank_file.read_begun(tmp_path)),
    ):
        torch.save(bomb, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=f"{name}.safetensors is damaged"):
            read()
    assert not bomb.path.exists()


def test_adapters_import_nothing(load_vlm, model_config, tmp_path, evil, bomb):
    """PEFT imports what an entry of adapter_config.json names, and would load weights that are pickled."""
    folder = tmp_path / "adapters"
    load_vlm(lora=LORA).model.save_pretrained(folder)
    config, path = model_config(path=str(folder)), folder / "adapter_config.json"
    torch.save(bomb, folder / "adapter_model.bin")
    vlms.load(folder, config, torch.device("cpu"))
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"megatron_config": {"x": 1}, "megatron_core": "evil"}))
    with pytest.raises(UserError, match="the adapters in .* do not load"):
        vlms.load(folder, config, torch.device("cpu"))
    path.write_text(json.dumps(values))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors is missing"):
        files.find(str(folder), None)
    assert not evil() and not bomb.path.exists()


@pytest.fixture
def model(untrained_folder, tmp_path, evil):
    """A model's folder that brings Python along: its configurations ask for it, as those of the hub do."""
    folder = tmp_path / "model"
    shutil.copytree(untrained_folder, folder)
    shutil.copy(tmp_path / "packages" / "evil.py", folder / "modeling_evil.py")
    (folder / "custom_generate").mkdir()
    shutil.copy(tmp_path / "packages" / "evil.py", folder / "custom_generate" / "generate.py")
    kinds = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        values["auto_map"] = {kind: "modeling_evil.attack" for kind in kinds}
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("known", [True, False], ids=["a known architecture", "one of its own"])
def test_python_files_of_a_model_folder_are_not_run(model, model_config, evil, monkeypatch, known):
    monkeypatch.setattr("builtins.input", lambda question: "y")
    config = model_config(path=str(model))
    if known:
        assert meter.of_folder(model, "qwen2_vl").tokenizer is not None
        assert vlms.load(model, config, torch.device("cpu")).model.config.model_type == "qwen2_vl"
    else:
        values = json.loads((model / "config.json").read_text()) | {"model_type": "evil", "architectures": ["Evil"]}
        (model / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=f"model {model} does not load"):
            vlms.load(model, config, torch.device("cpu"))
    assert not evil()


def test_a_chat_template_reaches_for_nothing(model, model_config, tmp_path):
    payload = "{{ cycler.__init__.__globals__.os.mkdir('%s') }}" % (tmp_path / "it ran")
    for text, said in ((payload, "unsafe"), ("{% if %}", "Expected")):
        (model / "chat_template.jinja").write_text(text)
        with pytest.raises(UserError, match=f"chat template cannot be used.*{said}"):
            meter.of_folder(model, "qwen2_vl").tokens([Prompt("a", "?", "b")], 32)
        with pytest.raises(UserError, match=f"chat template cannot be used.*{said}"):
            vlms.load(model, model_config(path=str(model)), torch.device("cpu"))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors"])
def test_an_index_of_weights_names_files_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match=f"names {name}, which is no file of this folder"):
        files.weight_files(tmp_path)


def test_links_out_of_a_folder_are_not_given_away(foreign, tmp_path, capsys):
    (tmp_path / "secret").write_text("mine")
    folder = foreign()
    (folder / "model").mkdir()
    (folder / "model" / "notes.txt").symlink_to(tmp_path / "secret")
    (folder / "model" / "same.txt").symlink_to("other.txt")
    for kind in ("model", "adapter", "bank"):
        assert export.main([str(folder), str(tmp_path / "new"), "--as", kind]) == 2
        assert f"notes.txt is a link to {tmp_path / 'secret'}, outside of" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"notes.txt is a link"):
        card.plan(folder / "model", "me/birds")
    assert not (tmp_path / "new").exists()


def test_a_clip_is_one_of_the_librarys_own_names(tmp_path):
    clip = pytest.importorskip("common.few_shot.encoders.clip")
    for name in (f"local-dir:{tmp_path}", "hf-hub:owner/name"):
        with pytest.raises(UserError, match=f"clip.options.model={name} is no name of open_clip's own models"):
            clip.load("clip", torch.device("cpu"), tmp_path, torch.float32, name, pretrained="openai")


def test_a_cache_of_another_machine_is_replaced_by_this_ones(foreign, monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSHOT_CACHE", str(tmp_path))
    folder = foreign(cache_dir="/of/another/machine")
    assert config_of(TrainedModel.of(folder)).cache_dir == str(tmp_path)
    (tmp_path / "export").mkdir()
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("/of/another/machine", "/"))
    assert config_of(TrainedModel.of(folder)).cache_dir == "/", "the run's own, where it is there"
    folder.rename(tmp_path / "export" / "run")
    assert config_of(TrainedModel.of(tmp_path / "export")).cache_dir == str(tmp_path), "an export has none"
