"""A folder from somebody else: nothing in it runs code, unless its user says so. Each payload would leave a file."""

from __future__ import annotations

import ast
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from PIL import Image

from common import Classifier
from common.config import composition, trust
from common.export import __main__ as export
from common.predict import __main__ as predict
from common.predict.trained import Trained, config_of
from common.report import __main__ as report
from common.run.run_folder import RunFolder
from common.serve import __main__ as serve
from common.types import UserError
from tests.test_html import NAMES, answered, write  # noqa: F401

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
                node = node.setdefault(name, {})
            node[last] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        return folder

    return make


def placed(place):
    """A place of the configuration with names for its stars."""
    return [{"few_shot": "coop", "rewards": "accuracy", "targets": "dtd"}[place[i - 1]] if name == "*" else name
            for i, name in enumerate(place)]  # fmt: skip


@pytest.mark.parametrize("place", [place for place in trust.PLACES if place[0] != "rewards"], ids=".".join)
def test_no_place_of_a_loaded_configuration_names_foreign_code(foreign, evil, place):
    key = placed(place)
    folder = foreign(**{"__".join(key): "evil" if key[-1] == "recipe" else "evil.attack"})
    with pytest.raises(UserError) as refused:
        config_of(Trained.of(folder))
    said = str(refused.value)
    assert f"{folder / 'config.yaml'} names code that would be run here: {'.'.join(key)}=evil" in said
    assert "is not of this project" in said and "--trust-code" in said and "trust_code=True" in said
    assert not evil()


def test_whoever_trusts_it_runs_it(foreign, evil):
    """The payload is a live one: what the other tests refuse would have run."""
    folder = foreign(method={"name": "mine", "_target_": "evil.attack"})
    config_of(Trained.of(folder, trust_code=True))
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
    assert RunFolder(folder).finished_result(composition.plain(compose())) is not None, "the same command shows it"
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
        ("few_shot.coop._target_", "common.models.host_rows.HostRows", "is no few-shot learner"),
        ("rewards.x.fn", "common.models.host_rows.HostRows", "is no reward"),
        ("few_shot.coop.extra._target_", "os.system", "is not of this project"),
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
            values = {path.stem: values} if path.parent.name == "learners" else values
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
    "self.config.learner.build": "learner.build",
    "config.learner.check": "learner.check",
    "config.load": "clip.load",
    "entry['_target_']": "data.reader._target_",  # and few_shot.<name>._target_
    "reader": "data.reader.reader",
    "fallback['_target_']": "data.reader.fallback._target_",
    "entry['fn']": "rewards.x.fn",
    "path": None,  # inside common/plugins.py; rollout.backend and learner.build; suggestions for any _target_ or fn
    "module": None,  # inside common/plugins.py
    "value": None,  # in common/config/trust.py itself
    "value.rpartition('.')[0]": None,
    "f'{kind.__module__}.{kind.__name__}'": None,  # a class that is there already
}


def test_every_call_that_imports_what_it_is_told_is_known():
    found = set()
    for path in (path for package in trust.OWN for path in (ROOT / package).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            if name in ("locate", "check_call", "check_module", "of_recipe", "import_module", "__import__"):
                found.add(ast.unparse(call.args[0]))
    assert found == set(CALLS), "a new place of the configuration that names code belongs into trust.PLACES"
    assert all(trust.kind_of(tuple(key.split("."))) is not None for key in CALLS.values() if key)


def test_kinds_ask_for_members_that_their_protocols_have():
    from alert.draft.fit.data import FewShot
    from common.method import Method
    from common.models.families import Family
    from common.rollout.base import Rollout

    for kind, protocol in (
        (trust.METHOD, Method),
        (trust.FAMILY, Family),
        (trust.SAMPLER, Rollout),
        (trust.LEARNER, FewShot),
    ):
        assert set(kind.members) <= {*vars(protocol), *protocol.__annotations__}


def test_nothing_of_this_machine_is_looked_up(foreign, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    folder = foreign(data__question="What is ${oc.env:SECRET}?")
    for trusted in (False, True):
        with pytest.raises(UserError, match=r"data.question holds \$\{…\}") as refused:
            config_of(Trained.of(folder, trust_code=trusted))
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_tags_of_yaml_make_no_objects(foreign, tmp_path, capsys, tag, compose):
    folder = foreign()
    (folder / "config.yaml").write_text(f"signature: x\nmethod: {tag} [{tmp_path / 'it ran'}]\n")
    with pytest.raises(UserError, match=r"config.yaml cannot be read"):
        config_of(Trained.of(folder))
    with pytest.raises(UserError, match=r"config.yaml cannot be read"):
        RunFolder(folder).finished_result(composition.plain(compose()))
    report.main(["compare", str(folder)])
    assert "damaged" in capsys.readouterr().out and not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("text", ["- a\n- list\n", "signature: x\n", "signature: x\ngpus: 0\ntracking: 3\ndata: {}\n"])
def test_a_configuration_that_is_none_is_one_line(foreign, text):
    folder = foreign()
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"was not written by a run|is of another version"):
        config_of(Trained.of(folder))
