"""Own photos are found from where the user is, other datasets inside $DATA."""

from __future__ import annotations

import sys

import pytest

import run
from common.config.command_line import literal
from common.config.composition import plain, signature, validate
from common.data import check, source, task
from common.types import UserError
from tests import data_tree


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory, a home and a $DATA; photos lie in none of them yet."""
    for name in ("work", "home", "data"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    return tmp_path


def photos(folder):
    for name in ("cat", "dog"):
        for number in (1, 2):
            data_tree.picture(folder / name / f"{number}.png")


@pytest.mark.sampled
@pytest.mark.parametrize("given", ["photos", "./photos", "~/photos", "../work/photos"])
@pytest.mark.parametrize("data", [True, False], ids=["with $DATA", "without"])
def test_every_way_to_write_a_folder(here, given, data, compose, monkeypatch):
    photos(here / ("home" if given.startswith("~") else "work") / "photos")
    if not data:
        monkeypatch.delenv("DATA")
    config = validate(compose("data=folder", *literal([f"data.folder={given}"]), "shots=1"))
    assert len(task.build(config).task.train.items) == 2


def test_the_working_directory_goes_first(here, compose):
    chosen = ["data=folder", "data.folder=photos"]
    photos(here / "data/photos")
    assert source.find(validate(compose(*chosen)).data).folder == here / "data/photos"
    photos(here / "work/photos")
    assert source.find(validate(compose(*chosen)).data).folder == here / "work/photos"


@pytest.mark.slow
def test_one_error_names_both_places(here, compose, monkeypatch):
    chosen = ["data=folder", "data.folder=birds"]
    with pytest.raises(UserError, match=f"neither {here}/work/birds nor {here}/data/birds exists.*datasets.md#folder"):
        task.build(validate(compose(*chosen)))
    monkeypatch.delenv("DATA")
    with pytest.raises(UserError, match=f"data=folder: {here}/work/birds does not exist"):
        task.build(validate(compose(*chosen)))
    with pytest.raises(UserError, match="data=folder: /nowhere/birds does not exist"):
        task.build(validate(compose("data=folder", "data.folder=/nowhere/birds")))


def test_other_datasets_stay_inside_the_root(here, compose):
    data_tree.build(here / "work")
    with pytest.raises(UserError, match=f"{here}/data/dtd does not exist"):
        task.build(validate(compose("data=dtd")))


@pytest.mark.slow
def test_the_place_changes_neither_manifest_nor_signature(here, compose):
    found = []
    for root in ("work/photos", "data/else"):
        photos(here / root)
        found.append(task.build(validate(compose("data=folder", f"data.folder={here / root}", "shots=1"))).manifest)
    assert found[0] == found[1]
    roots = [plain(compose("data=folder", f"data.root={root}")) for root in ("/a", "/b")]
    assert signature(roots[0]) == signature(roots[1])


def test_the_check_of_the_data_finds_them_too(here, capsys):
    photos(here / "home/photos")
    assert check.main(["folder", "data.folder=~/photos"]) == 0
    assert "found" in capsys.readouterr().out


ARGUMENTS = {
    "home": ("data.folder=~/photos", "data.folder='~/photos'"),
    "umlaut": ("data.folder=/tmp/v\u00f6gel", "data.folder='/tmp/v\u00f6gel'"),
    "equals": ("model.path=/runs/epoch=3/model", "model.path='/runs/epoch=3/model'"),
    "blanks and umlaut": ("data.question=Welche V\u00f6gel?", "data.question='Welche V\u00f6gel?'"),
    "appended": ("+a.b=~/c", "+a.b='~/c'"),
}


@pytest.mark.parametrize(("argument", "expected"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_hydra_cannot_read_are_quoted(argument, expected):
    assert literal([argument]) == [expected] == literal([expected])


@pytest.mark.parametrize(
    "argument",
    [
        *(
            "data=folder",
            "shots=4",
            "seed=1,2,3",
            "data=glob(*)",
            "~data.aliases",
            "-m",
            "--cfg",
            "hydra.run.dir=/a/b c",
        ),
        *("+rewards.mine={weight:0.5,fn:a.b}", "data.folder='~/x'", "shots=", "--config-dir=/tmp/\u00f6"),
    ],
)
def test_other_arguments_stay_as_they_are(argument):
    assert literal([argument]) == [argument]


@pytest.mark.parametrize("value", ["[dtd", "/a/[b] c", "a'b", "{x", "f(x", "[/bold] $x$"])
def test_values_that_cannot_be_read_name_their_key(value):
    with pytest.raises(UserError, match="data.folder=.* cannot be read .* needs quotes.*'data.folder=") as error:
        literal(["data=folder", f"data.folder={value}"])
    assert "\n" not in str(error.value)


def test_the_command_line_quotes(monkeypatch):
    for name in (
        "HYDRA_FULL_ERROR",
        "OMP_WAIT_POLICY",
        "MKL_DYNAMIC",
        "OMP_DYNAMIC",
    ):  # set by the entry point, restored after the test
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "argv", ["run.py", "data=folder", "data.folder=~/photos"])
    monkeypatch.setattr(run, "main", lambda: None)
    run.run()
    assert sys.argv == ["run.py", "data=folder", "data.folder='~/photos'"]


def test_predicting_is_a_command_of_its_own():
    with pytest.raises(UserError, match=r"task=predict is a command of its own now: python -m common.predict outputs/"):
        literal(["task=predict", "run=outputs/a", "pictures=b.png"])
