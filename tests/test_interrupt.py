"""Being asked to stop: the first Ctrl-C, SIGTERM or SIGHUP ends a run after its update and the same command goes on, a
second Ctrl-C stops at once.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from common.config.composition import validate
from common.run import loop
from common.run.checkpoint import Checkpoints, read_state
from common.run.recorder import Recorder
from common.run.run_folder import RunFolder
from common.run.tracking import NullTracker
from common.runtime import interrupt
from common.runtime.interrupt import Interrupted, heeded, left_to_ranks, requested
from common.runtime.progress import Stopwatch
from common.training.base import Step
from common.types import UserError
from tests.conftest import REPOSITORY


def press(number=signal.SIGINT):
    signal.raise_signal(number)


OTHERS = pytest.mark.parametrize("number", interrupt.BESIDE_CTRL_C, ids=lambda number: number.name)


class Counting:
    """A trainer whose only weight is the number of its updates; a signal comes during update `at`, `times` times."""

    def __init__(self, done=0, at=0, times=1, number=signal.SIGINT):
        self.tokens, self.weight, self.at, self.times, self.number = 0.0, done, at, times, number

    def step(self, update):
        assert update == self.weight, "updates follow each other"
        if update + 1 == self.at:
            for _ in range(self.times):
                press(self.number)
        self.weight, self.tokens = update + 1, 10.0 * (update + 1)
        return Step({"reward": 0.5, "num_tokens": self.tokens}, {"update": 0.0}, [])

    @contextmanager
    def sampling(self):
        yield


def attempt(config, folder, updates=4, **when):
    """One attempt of a run in a folder; what the loop raised, and the trainer."""
    checkpoints = Checkpoints(folder / "checkpoints", 2)
    trainer = Counting(0 if checkpoints.state is None else checkpoints.state.update, **when)
    folder.mkdir(exist_ok=True)
    recorder = Recorder(RunFolder(folder), NullTracker(), 1, Stopwatch(), checkpoints.state)

    def save(path):
        (path / "weight").write_text(str(trainer.weight))

    raised = None
    try:
        loop.train(SimpleNamespace(task=None), trainer, updates, config, checkpoints, recorder, save)
    except Interrupted as stop:
        raised = stop
    finally:
        recorder.close(failed=raised is not None)
    return raised, trainer, checkpoints


@pytest.fixture
def config(compose):
    return validate(compose("trainer.evaluate_every=0", "checkpoint.every=0"))


def test_pressed_once_the_run_stops_after_its_update_and_goes_on_to_the_same_end(config, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert attempt(config, tmp_path / "whole")[0] is None
    capsys.readouterr()
    raised, _, checkpoints = attempt(config, tmp_path / "run", at=2)
    assert "update 2 of 4" in str(raised) and "same command" in str(raised)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1, "one line says that it is stopping"
    assert checkpoints.latest().name == "step-000002" and read_state(checkpoints.latest()).update == 2
    raised, trainer, checkpoints = attempt(config, tmp_path / "run")
    assert raised is None and trainer.weight == 4
    for name in ("metrics.jsonl", "checkpoints/step-000004/weight"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert signal.getsignal(signal.SIGINT) is before, "outside a training Ctrl-C is Python's own"


def test_pressed_twice_the_run_stops_at_once(config, tmp_path):
    raised, trainer, checkpoints = attempt(config, tmp_path / "run", at=2, times=2)
    assert "at once" in str(raised) and trainer.weight == 1, "the second update was not finished"
    assert checkpoints.latest() is None


@OTHERS
def test_other_signals_stop_it_after_the_update_however_often_they_come(config, tmp_path, number, capsys):
    """SLURM repeats its SIGTERM when the time of grace is over, and torchrun passes it on."""
    with heeded():
        raised, trainer, checkpoints = attempt(config, tmp_path / "run", at=2, times=3, number=number)
        press(number)  # while the run ends
    assert "update 2 of 4" in str(raised) and trainer.weight == 2
    assert checkpoints.latest().name == "step-000002"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"{number.name}: stopping after this update"
    assert signal.getsignal(number) == signal.SIG_DFL, "as it was before"


@OTHERS
def test_outside_a_training_they_interrupt_once(number):
    with heeded():
        with heeded():  # a run in the process that started it
            with pytest.raises(KeyboardInterrupt):
                press(number)
            press(number)
        press(number)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with heeded(), requested() as request:
            press(signal.SIGHUP)
            assert not request.made
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_child_ends_by_the_signal():
    """A process that a library starts meanwhile, and ends with SIGTERM."""
    for asked in (heeded, requested):
        with heeded(), asked():
            child = os.fork()
            if not child:
                press(signal.SIGTERM)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.slow
def test_an_update_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr(interrupt, "LONGEST_UPDATE", 1)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="at once"), requested():
        press(signal.SIGTERM)
        while time.monotonic() < began + 20:
            time.sleep(0.02)
    assert time.monotonic() - began < 10
    with requested():
        press(signal.SIGTERM)
    assert signal.alarm(0) == 0, "no alarm is left behind"


@pytest.mark.parametrize("last", [False, True])
def test_submitits_warning_reaches_it_once_the_checkpoint_is_written(config, tmp_path, last):
    """It queues the job again, and ends the process."""
    found = []

    def requeue(number, frame):
        found.extend(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        sys.exit(-1)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with heeded():
            with pytest.raises(SystemExit):
                attempt(config, tmp_path / "run", at=4 if last else 2, number=signal.SIGUSR2)
            press(signal.SIGTERM)  # SLURM ends what is queued again; this process is at its end already
        assert found == ["step-000004" if last else "step-000002"]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_outside_a_training_submitits_warning_reaches_it_at_once():
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda *_: seen.append(signal.getsignal(signal.SIGTERM)))
    try:
        with heeded(), heeded():
            press(signal.SIGUSR2)
            assert len(seen) == 1
            with pytest.raises(KeyboardInterrupt):  # it let the process go on
                press(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGUSR2, before)


def wait_as_a_rank(ready, asked):
    with heeded(), requested() as request:
        ready.set()
        until = time.monotonic() + 30
        while not request.made and time.monotonic() < until:
            time.sleep(0.02)
        asked.put(request.by)


@pytest.mark.slow
def test_a_launcher_passes_it_on_to_all_ranks():
    context = multiprocessing.get_context("spawn")
    ready, asked = [context.Event() for _ in range(2)], context.Queue()
    ranks = [context.Process(target=wait_as_a_rank, args=(each, asked)) for each in ready]
    for rank in ranks:
        rank.start()
    assert all(each.wait(60) for each in ready)
    with left_to_ranks() as request:
        press(signal.SIGTERM)
        assert [asked.get(timeout=30) for _ in ranks] == [signal.SIGTERM] * 2 and request.made
        for rank in ranks:
            rank.join(30)
    with pytest.raises(Interrupted), left_to_ranks():
        press(signal.SIGTERM)  # there are none to wait for


def test_a_batch_that_is_half_used_is_finished_first(config, tmp_path):
    config.trainer.num_iterations = 3
    raised, trainer, checkpoints = attempt(config, tmp_path / "run", updates=9, at=4)
    assert trainer.weight == 6 and "update 6 of 9" in str(raised)
    assert checkpoints.latest().name == "step-000006"


def test_pressed_in_the_last_update_the_run_just_ends(config, tmp_path):
    raised, trainer, _ = attempt(config, tmp_path / "run", at=4)
    assert raised is None and trainer.weight == 4


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("patience", "accuracies", "end", "best"),
    [
        (2, [0.5, 0.6, 0.6, 0.55, 0.9], 8, 4),  # an equal one is not better
        (2, [0.5, 0.4, 0.6, 0.5, 0.7], 10, 10),
        (0, [0.5, 0.4, 0.3, 0.2, 0.1], 10, 2),
        (1, [0.5, 0.5], 4, 2),
    ],
)
def test_patience_ends_a_training(compose, tmp_path, monkeypatch, patience, accuracies, end, best):
    """An evaluation every two updates of ten; a run that was killed behind its end makes no further update."""
    config = validate(compose("trainer.evaluate_every=2", f"trainer.patience={patience}", "checkpoint.every=0"))
    values = iter(accuracies)

    def evaluate(*_):
        return SimpleNamespace(summary={"val": SimpleNamespace(accuracy=next(values))}, scalars={})

    monkeypatch.setattr(loop, "_evaluate", evaluate)
    monkeypatch.setattr(loop, "monitor_split", lambda task: "val")
    monkeypatch.setattr(loop, "is_due", lambda config, number, last: number % 2 == 0)
    raised, trainer, checkpoints = attempt(config, tmp_path / "run", updates=10)
    assert raised is None and trainer.weight == end
    assert checkpoints.best().name == f"step-{best:06d}" and checkpoints.latest().name == f"step-{end:06d}"
    assert attempt(config, tmp_path / "run", updates=10)[1].weight == end


def test_patience_needs_evaluations(compose):
    with pytest.raises(UserError, match="trainer.patience=2 waits for evaluations: set trainer.evaluate_every"):
        validate(compose("trainer.patience=2", "trainer.evaluate_every=0"))


def test_what_another_rank_was_told_counts(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "gather", lambda mine: [mine, True])
    raised, trainer, _ = attempt(config, tmp_path / "run")
    assert trainer.weight == 1 and "update 1 of 4" in str(raised)


def test_a_request_alone():
    with requested() as request:
        assert not request.made
        press()
        assert request.made
        with pytest.raises(Interrupted):
            press()


def test_a_stop_between_runs_is_one_line_too(monkeypatch, capsys):
    """While a sweep composes its points, or while other processes run them."""
    import run

    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "main", main)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit) as ended:
        run.run()
    assert ended.value.code == 130 and capsys.readouterr().err == "stopped; the same command goes on\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop", [Interrupted("stopped after update 2 of 4"), KeyboardInterrupt()], ids=["asked", "raw"]
)
def test_the_command_exits_130_with_one_line(monkeypatch, tmp_path, capsys, stop):
    from hydra.core.global_hydra import GlobalHydra

    import run

    def job(cfg, folder):
        raise stop

    GlobalHydra.instance().clear()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # Hydra adds one that would outlive the test
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as run.run sets it
    monkeypatch.setattr(run, "job", job)
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--config-path", str(REPOSITORY / "conf"), f"hydra.run.dir={tmp_path / 'mine'}"]
    )
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mine: ") and "stopped" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raised", "wanted"),
    [
        (Interrupted("stopped after update 2"), Interrupted),
        (KeyboardInterrupt(), Interrupted),
        (UserError("x"), UserError),
    ],
)
def test_a_rank_leaves_the_message_to_its_catcher(monkeypatch, compose, tmp_path, capsys, raised, wanted):
    from common import launch, pipeline
    from common.learner import learner_class

    def stopped(*_):
        raise raised

    monkeypatch.setattr(pipeline, "run", stopped)
    learner_class(validate(compose()))  # so that nothing is waited for, which would be said
    hydras = logging.StreamHandler(sys.stdout)  # Hydra leaves one, which must not say it a second time
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers, hydras])
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(wanted):
        launch.worker(validate(compose()), tmp_path)
    assert capsys.readouterr() == ("", ""), "who catches it prints it, once"
    logged = (tmp_path / "run.log").read_text()
    assert "ERROR" in logged and "Traceback" not in logged
    assert set(logging.getLogger().handlers) == set(handlers)


def test_a_stopped_rank_is_no_success_to_torch_elastic(monkeypatch, tmp_path):
    """It passes over a KeyboardInterrupt and waits for what the rank returns."""

    from common import launch

    def stopped(*_):
        raise Interrupted("stopped after update 3 of 9")

    monkeypatch.setattr(launch, "worker", stopped)
    with pytest.raises(Exception, match="after update 3 of 9"):  # no KeyboardInterrupt
        launch.as_rank(None, tmp_path)


def test_a_stop_while_libraries_are_imported_is_one_too(monkeypatch, compose, tmp_path):
    """A rank that torch elastic has started must not end with a KeyboardInterrupt."""
    from common import launch, learner

    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(learner, "learner_class", stopped)
    with pytest.raises(Interrupted, match="the same command goes on"):
        launch.worker(validate(compose()), tmp_path)
    assert "interrupted" in (tmp_path / "run.log").read_text()


@pytest.mark.faults
def test_ctrl_c_on_the_command_line(untrained_folder, tmp_path):
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "run.py",
        "model.recipe=null",
        f"model.path={untrained_folder}",
        "setting.test_per_class=5",
    ]
    command += ["trainer.updates=2000", "trainer.evaluate_every=0", "label_scoring=false", "tracking=none"]
    command += ["rollout.max_completion_tokens=4", f"hydra.run.dir={folder}", f"cache_dir={tmp_path / 'cache'}"]
    command += ["+rewards.short={weight:1.0,fn:tests.rewards.shorter}", "doctor=false"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        until = time.monotonic() + 240
        log = folder / "metrics.jsonl"
        while not (log.is_file() and '"reward"' in log.read_text()):
            assert process.poll() is None and time.monotonic() < until, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors and "[rank" not in errors
    assert (printed + errors).count("the same command continues it") == 1, printed
    updates = [row["step"] for row in map(json.loads, log.read_text().splitlines()) if "reward" in row]
    assert (folder / "checkpoints" / f"step-{updates[-1]:06d}" / "state.json").is_file()
