"""Names that users give are shown as they are: no formula in a figure, no markup and no emoji on the terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text
from rich.console import Console

from alert import inspect
from common.data import check
from common.report import figures, tables
from common.run import doctor
from common.run.doctor import Finding
from common.runtime import progress
from tests.test_tables import result as result_with
from tests.test_tables import summary as summary_with

NAMES = [r"a $\frac b$", "[/bold]", "[red]x[/red]", ":dog:", r"100 $ and \$ more", "$", r"$\undefined$"]


def console():
    return Console(file=io.StringIO(), width=300, force_terminal=True, color_system=None)


@pytest.fixture
def drawn(monkeypatch):
    """The texts of the figures that are drawn, as they were at the end."""
    texts: list[str] = []

    def close(figure):
        figure.draw_without_rendering()
        found = [text for text in figure.findobj(Text) if text.get_text()]
        assert not any(text.get_parse_math() or text.get_usetex() for text in found)
        texts.extend(text.get_text() for text in found)

    monkeypatch.setattr(plt, "close", close)
    return texts


@pytest.mark.parametrize("usetex", [False, True], ids=["", "where matplotlib asks LaTeX"])
def test_names_in_a_matrix(drawn, tmp_path, usetex):
    table = [[int(x == y) for x in range(len(NAMES) + 1)] for y in range(len(NAMES))]
    with matplotlib.rc_context({"text.usetex": usetex}):
        figures.save(figures.confusion(table, NAMES), tmp_path / "matrix.png", NAMES[0])
        assert matplotlib.rcParams["text.usetex"] == usetex, "nobody else's figures change"
    assert all(drawn.count(name) >= 2 for name in NAMES) and (tmp_path / "matrix.png").stat().st_size > 1000


def test_names_in_a_list_of_confusions(drawn, tmp_path):
    names = [*NAMES, *(f"class {number}" for number in range(figures.LEGIBLE))]
    table = [[0] * (len(names) + 1) for _ in names]
    table[0][1], table[5][6] = 3, 2
    figures.save(figures.confusion(table, names), tmp_path / "pairs.png", "[/bold]")
    assert {f"{NAMES[0]} → {NAMES[1]}", f"{NAMES[5]} → {NAMES[6]}"} <= set(drawn)


def test_names_in_curves(drawn, tmp_path):
    rows = [{"step": step, "loss": 1.0, f"eval/{NAMES[0]}/accuracy": 0.5} for step in (1, 2)]
    rows = [row | {f"rewards/{NAMES[6]}/mean": 0.5} for row in rows]
    figures.save(figures.curves(rows), tmp_path / "curves.png", f"{NAMES[0]}\n{NAMES[6]}")
    assert {f"accuracy, {NAMES[0]}", NAMES[6], f"{NAMES[0]}\n{NAMES[6]}"} <= set(drawn)


def test_names_in_the_figure_of_a_bank(drawn, tmp_path):
    inspect.figure([(name, 1.0, 0.5, name, 0.5) for name in NAMES], tmp_path / "bank.png")
    assert set(NAMES) <= set(drawn)


def test_names_in_the_table_of_a_bank():
    shown = console()
    shown.print(inspect.table([(name, 1.0, 0.5, name, 0.5) for name in NAMES]))
    assert all(shown.file.getvalue().count(name) >= 2 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_table_of_a_run(name, tmp_path):
    same = dict.fromkeys(("method", "data", "model", "setting", "protocol"), name)
    values = {"origins": {name: name}, "short_classes": {name: 1}, "train": {"updates": 0, "seconds": {}}}
    result = result_with({name: summary_with()}, {}, shots=1, seed=1, **same, **values)
    shown = console()
    tables.show(result, tmp_path / name, shown)
    lines = " ".join(shown.file.getvalue().split())  # a title is as wide as its table
    assert lines.count(name) == 6 + 1 + 1 + 1, "title, split, short class, folder"


def test_notes_on_the_data_stand_below_the_table(monkeypatch, tmp_path):
    found = {"passed_over": {"litter": 3}, "refilled": {"cat": 2, "dog": 1}, "duplicates": {"train_and_test": 4}}
    result = result_with({}, {}, **found)
    for name in ("result_table", "time_line"):
        monkeypatch.setattr(tables, name, lambda *_: "")
    for name in ("overall_lines", "probability_lines", "paired_lines"):
        monkeypatch.setattr(tables, name, lambda _: [])
    shown = console()
    tables.show(result, tmp_path, shown)
    assert shown.file.getvalue().strip().splitlines()[:3] == [
        "passed over in the folders of the data: 3 litter",
        "3 training pictures were replaced by others of their class, since they cannot be decoded",
        "identical pictures in training and test: 4 (manifest.json lists them)",
    ]


def test_names_in_the_report_of_the_doctor():
    shown = console()
    shown.print(doctor.report([Finding("prompts", "failed", f"image folder/{name}", name) for name in NAMES]))
    assert all(shown.file.getvalue().count(name) >= 2 for name in NAMES)


def test_names_in_the_check_of_the_data(monkeypatch):
    (data,) = check.configured(["digits"], [])
    shown = console()
    for name in NAMES:
        report = check.Report(replace(data, name=name, root=f"/{name}"), True, name, problems=(name,))
        shown.print(check.table([report]))
    assert all(shown.file.getvalue().count(name) >= 3 for name in NAMES)


def test_names_in_the_lines_of_the_check(monkeypatch, capsys):
    data = SimpleNamespace(name="[/bold]", root=None, published={})
    monkeypatch.setattr(check, "configured", lambda *_: [data])
    monkeypatch.setattr(check, "examine", lambda _: check.Report(data, True, problems=(":dog: [/red]",)))
    assert check.main([]) == 1
    assert "[/bold]: :dog: [/red]; see docs/datasets.md\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_names_beside_a_bar_and_in_a_line(name, monkeypatch):
    shown = console()
    monkeypatch.setattr(progress, "console", lambda: shown)
    assert list(progress.progress([1, 2], f"evaluating {name}", 2)) == [1, 2]
    progress.say(f"left out {name}")
    assert f"evaluating {name}" in shown.file.getvalue() and f"left out {name}\n" in shown.file.getvalue()
