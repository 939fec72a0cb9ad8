"""What a log shows of a command: a first line within two seconds, a line a minute, and nothing more of a short step."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
from rich.console import Console

from common.runtime import progress

ROOT = Path(__file__).parent.parent


@pytest.fixture
def said(monkeypatch):
    """The lines where nobody looks, and a clock that only the test moves."""
    file, clock = io.StringIO(), [1000.0]
    shown = Console(file=file, width=200)
    monkeypatch.setattr(progress, "console", lambda: shown)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "_spoken", 0.0)
    return (lambda: file.getvalue().splitlines()), clock


def test_a_line_a_minute_where_nobody_looks(said):
    """40 s a step, begun by an earlier attempt at 10 of 20: after three steps 2 min are gone, and 7 steps are left."""
    lines, clock = said
    with progress.bar("training", 20, done=10) as shown:
        for note in ("a", None, "reward 0.5"):
            clock[0] += 40.0
            shown.advance(note)
        assert lines() == ["training: 12 of 20, 1 min gone, about 5 min left; a"]
        clock[0] += 60.0
        shown.advance()
    assert lines()[1:] == ["training: 14 of 20, 3 min gone, about 4 min left; reward 0.5"]


def test_what_is_short_says_nothing(said):
    lines, clock = said
    for _ in progress.progress(range(50), "evaluating", 50):
        clock[0] += 1.0
    assert lines() == []


def test_another_line_is_as_good(said):
    """What speaks every half minute by itself needs no line a minute."""
    lines, clock = said
    with progress.bar("training", 9) as shown:
        for _ in range(9):
            clock[0] += 30.0
            progress.say("an evaluation")
            shown.advance()
    assert lines() == ["an evaluation"] * 9


def test_on_a_terminal_there_are_bars_instead(said, monkeypatch):
    monkeypatch.setattr(progress, "console", lambda: Console(file=io.StringIO(), force_terminal=True, width=100))
    _, clock = said
    with progress.bar("training", 3) as shown:
        clock[0] += 600.0
        assert progress._present(clock[0]) == "" == shown.line(clock[0])
        spoken = progress._spoken
        shown.advance()
    assert progress._spoken == spoken


def test_the_innermost_thing_is_named(said):
    """120 s after all began; a step that takes longer than a minute by itself says how far its bar is."""
    _, clock = said
    assert progress._present(clock[0]) == ""
    with progress.doing("running"):
        clock[0] += 60.0
        with progress.doing("reading dtd"), progress.bar("checking images", 8):
            clock[0] += 60.0
            assert progress._present(clock[0]) == "checking images: 0 of 8, 1 min gone"
        assert progress._present(clock[0]) == "running: 2 min gone"
        with progress.quiet():
            assert progress._present(clock[0]) == ""
        progress.turn_to("multirun")
        assert progress._present(clock[0] + 180.0) == "multirun: 3 min gone"
    assert progress._present(clock[0]) == ""


@pytest.fixture
def fast(monkeypatch):
    """A line every twentieth of a second, by the real clock."""
    file = io.StringIO()
    shown = Console(file=file, width=200)
    monkeypatch.setattr(progress, "console", lambda: shown)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    monkeypatch.setattr(progress, "_spoken", 0.0)
    return lambda: file.getvalue().splitlines()


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("never")


def test_a_silent_step_is_watched_from_beside(fast):
    """Nothing is advanced inside, and yet there are lines; after the end there are no more, and no thread stays."""

    def watching():  # by name: threads of libraries come and go meanwhile
        return [thread for thread in threading.enumerate() if thread.name == "progress"]

    with progress.watched("reading birds"):
        assert len(watching()) == 1
        assert fast() == ["reading birds"], "at once"
        with progress.watched("running", progress.SOON):  # as a run inside of a sweep
            wait_for(lambda: len(fast()) >= 3)
    assert set(fast()[1:]) == {"running: 0 min gone"}
    assert not watching() and not progress._is_watched


def test_what_ends_soon_is_quiet(fast):
    with progress.watched("comparing", first=0.2):
        pass
    assert fast() == []
    with progress.watched("comparing", first=0.01):
        wait_for(fast)
    assert fast()[0] == "comparing"


def test_an_error_ends_the_watch(fast):
    with pytest.raises(SystemExit), progress.watched("reading"):
        raise SystemExit(1)
    assert not progress._is_watched and not progress._stages


class Slow(Exception):
    """Stands for what would take minutes."""


def slow(*_, **__):
    raise Slow


COMMANDS = {  # what each says before the step that may be slow
    "predict": (["outputs/none", "README.md"], "common.predict.photos.find", "looking for pictures, then outputs/none"),
    "serve": (["outputs/none"], "common.predict.classifier.Classifier.load", "loading outputs/none"),
    "export": (["outputs/none", "x", "--push", "a/b"], "common.export.card.check_name", "exporting outputs/none"),
    "report": (
        ["compare", "outputs/none"],
        "common.report.folders.find_runs",
        "compare: reading what the runs have written",
    ),
    "data.check": (["dtd"], "common.data.check.configured", "reading the configurations of dtd"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_speak_before_they_are_slow(name, monkeypatch, capsys):
    """Those that may be quick speak a second later, so here the clock of `watched` is replaced."""
    arguments, step, line = COMMANDS[name]
    module = import_module(f"common.{name}" if name == "data.check" else f"common.{name}.__main__")
    asked = []

    @contextmanager
    def watched(what, first=0.0):
        asked.append((what, first))
        yield

    monkeypatch.setattr(step, slow)
    monkeypatch.setattr(module, "watched", watched)
    with pytest.raises(Slow):
        module.main(arguments)
    ((what, first),) = asked
    assert what.startswith(line) and first <= 0.5


SCRIPT = """
import runpy, sys, time
sys.argv = {argv!r}
{slow}
runpy.run_path("run.py", run_name="__main__")
"""
SLEEP = "lambda *_, **__: time.sleep(600)"
READS, EXPANDS = "import common.data.task as m; m.read_datasets", "import common.sweep.sweeper as m; m.expand"
COMPOSES = "import hydra._internal.config_loader_impl as m; m.create_defaults_list"
RUNS = {  # the first line, and a step behind it that takes ten minutes here
    "composition": ([], COMPOSES, "composing the configuration"),
    "manifest": (["manifest=true"], READS, "reading digits"),
    "multirun": (["-m", "seed=1,2"], "import common.config.composition as m; m.validate", "composing every run before"),
    "sweep": (["-cd", "sweeps", "-cn", "clsrl_table2", "dry=true"], EXPANDS, "composing and checking every point"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_speak_before_they_are_slow(name, tmp_path):
    """Piped: the line is there while the step is under way."""
    words, step, line = RUNS[name]
    argv = ["run.py", *words, "tracking=none", f"hydra.sweep.dir={tmp_path}", f"hydra.run.dir={tmp_path}/one"]
    code = SCRIPT.format(argv=argv, slow=f"{step} = {SLEEP}")
    began = [sys.executable, "-c", code]
    with subprocess.Popen(began, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as command:
        first = command.stdout.readline()
        if "composing the configuration" in first and line not in first:  # on a busy machine
            first = command.stdout.readline()
        command.kill()
    assert line in first
