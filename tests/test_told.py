"""What a run tells about itself: constant rewards, the best evaluation, the bar, the seconds, and results on disk."""

from __future__ import annotations

import io
import json
import logging
import math
from dataclasses import MISSING, fields, replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from common import pipeline, preflight
from common.config.composition import validate
from common.config.schema import TrainerConfig
from common.data import task
from common.report import tables
from common.run import doctor, loop
from common.run.checkpoint import Checkpoints, State
from common.run.result import FORMAT, Result
from common.runtime import progress
from common.training.signs import Signs
from common.types import Answers, Prediction, UserError
from tests import data_tree
from tests.test_tables import result, summary

# ---- rewards that pay everybody or nobody


def test_the_doctor_names_silent_rewards():
    parts = {"never": [0.0] * 4, "always": [1.0] * 4, "fair": [0.0, 1.0, 1.0, 0.0]}
    finding = doctor.check_rewards([1.0, 2.0, 2.0, 1.0], parts, 2)
    assert finding.verdict == "warning"
    assert "'never' was always 0" in finding.seen and "'always' was always the same" in finding.seen
    assert "fair" not in finding.seen + finding.fix
    assert "~rewards.never" in finding.fix and "~rewards.always" in finding.fix and "SFT" in finding.fix
    assert doctor.check_rewards([1.0, 2.0], {"fair": [0.0, 1.0]}, 2).verdict == "ok"


def test_the_table_names_silent_rewards_with_what_would_help():
    constant = {"format": "always 0", "length": "always the same"}
    lines = tables.training_lines(result({}, {}, train={"updates": 3, "constant_rewards": constant}))
    assert len(lines) == 2
    assert "'format' was always 0" in lines[0] and "begin with SFT" in lines[0] and "~rewards.format" in lines[0]
    assert "'length' was always the same" in lines[1] and "~rewards.length" in lines[1]


def metrics(format_mean):
    std = 0.5 if 0 < format_mean < 1 else 0.0
    return {"reward": format_mean, "rewards/format/mean": format_mean, "rewards/format/std": std}


@pytest.mark.parametrize(
    ("paid", "warnings", "constant"),
    [
        ([0.0] * 12, 1, {"format": "always 0"}),
        ([0.0] * 9, 0, {}),
        ([0.0] * 9 + [0.1] * 3, 0, {}),
        ([0.0] * 10 + [0.1], 1, {}),
        ([0.0] * 10 + [0.1, 0.0], 1, {}),
        ([0.0] * 10 + [1.0], 1, {}),
    ],
)
def test_a_training_warns_once_after_ten_updates(paid, warnings, constant, caplog):
    watch = loop.Watch([])
    with caplog.at_level(logging.WARNING):
        for mean in paid:
            watch.see(metrics(mean))
            watch.see({"loss": 0.0})  # the second update over the same completions
    assert len(caplog.records) == warnings and watch.constant == constant
    assert all("'format' was always 0 in 10 updates" in record.getMessage() for record in caplog.records)


def test_a_continued_training_remembers_what_was_paid_before(caplog):
    earlier = [metrics(0.1), {"step": 1, "eval/val/accuracy": 0.0}]
    watch = loop.Watch(earlier)
    for _ in range(9):
        watch.see(metrics(0.0))
    assert not caplog.records, "the first update paid somebody"


# ---- signs that a training goes wrong


def updates(rewards, flat=0.0, cut=0.0, **others):
    """What updates report that earned these rewards."""
    shares = {"frac_reward_zero_std": flat, "completions/clipped_ratio": cut}
    return [
        {"reward": reward, **shares, "entropy": 0.5, "completions/mean_length": 30.0, **others} for reward in rewards
    ]


def evaluation(step, accuracy, n=200):
    return {"step": step, "eval/val/accuracy": accuracy, "eval/val/n": n}


RATE = "trainer.learning_rate is probably too high"
SIGNS = {
    "it learns": (updates([0.2] * 10 + [0.5] * 20), {}),
    "groups that never differed": (updates([0.0] * 10, flat=1.0), {"flat": "raise trainer.group_size"}),
    "nine such updates": (updates([0.0] * 9, flat=1.0), {}),
    "one group differs": (updates([0.3] * 5) + updates([0.1] * 30, flat=15 / 16), {}),
    "they differ no more": (updates([0.4] * 5) + updates([0.1] * 10, flat=1.0), {"flat": f"0.400 to 0.100; {RATE}"}),
    "nothing left to learn": (
        updates([0.4] * 5) + updates([1.0] * 10, flat=1.0),
        {"flat": "0.400 to 1.000, so there is little left"},
    ),
    "an interruption of it": (
        updates([0.4] * 5) + updates([0.1] * 9, flat=1.0) + updates([0.1]) + updates([0.1] * 9, flat=1.0),
        {},
    ),
    "cut, and so never paid": (
        updates([0.0] * 10, flat=1.0, cut=0.92),
        {"cut": "92 % of completions were cut at rollout.max_completion_tokens=64", "flat": "raise rollout.max_comp"},
    ),
    "few are cut": (updates([0.2] * 30, cut=0.09), {}),
    "cut later on": (updates([0.2] * 20) + updates([0.2] * 10, cut=0.5), {"cut": "1"}),
    "surer without earning more": (
        updates([0.4] * 10) + updates([0.4] * 10, entropy=0.04),
        {"entropy": "the entropy of the tokens fell from 0.5 to 0.04"},
    ),
    "surer and earning more": (updates([0.4] * 10) + updates([0.5] * 10, entropy=0.04), {}),
    "a little surer": (updates([0.4] * 10) + updates([0.4] * 10, entropy=0.06), {}),
    "chaos": (
        updates([0.4] * 10) + updates([0.2] * 10, entropy=1.6),
        {"entropy": f"jumped from 0.5 to 1.6, and the mean reward went from 0.400 to 0.200; {RATE}"},
    ),
    "short without earning more": (
        updates([0.4] * 10) + updates([0.3] * 10, **{"completions/mean_length": 9.0}),
        {"completions/mean_length": "the length of completions fell from 30 to 9"},
    ),
    "long without earning more": (
        updates([0.4] * 10) + updates([0.4] * 10, **{"completions/mean_length": 91.0}),
        {"completions/mean_length": "jumped from 30 to 91"},
    ),
    "accuracy falls": (
        [evaluation(0, 0.4875), *updates([0.4] + [0.1] * 19), evaluation(20, 0.0)],
        {"eval/val/accuracy": f"on val fell from 48.75 % before training to 0.00 % after update 20: {RATE}"},
    ),
    "accuracy falls while rewards rise": (
        [evaluation(0, 0.5), *updates([0.4] + [0.8] * 19), evaluation(20, 0.2)],
        {"eval/val/accuracy": "pay for something else than right answers"},
    ),
    "accuracy of few images falls": ([evaluation(0, 0.5, 20), *updates([0.4] * 20), evaluation(20, 0.3, 20)], {}),
    "accuracy falls a little": ([evaluation(0, 0.5, 9000), evaluation(20, 0.41, 9000)], {}),
    "supervised, and falling": ([evaluation(0, 0.5), {"loss": 1.0}, evaluation(20, 0.1)], {"eval/val/accuracy": RATE}),
    "repeated batches": ([row for row in updates([0.0] * 6, flat=1.0) for row in (row, {"loss": 0.0})], {}),
}


@pytest.mark.parametrize(("rows", "expected"), SIGNS.values(), ids=SIGNS.keys())
def test_signs_with_their_causes(rows, expected):
    found = Signs(rows, 64).found
    assert found.keys() == expected.keys()
    for name, text in expected.items():
        assert text in found[name] and "\n" not in found[name]


def test_a_sign_is_told_once_also_to_a_training_that_goes_on(caplog):
    rows = [evaluation(0, 0.5), *updates([0.4] * 5), *updates([0.1] * 20, flat=1.0), evaluation(25, 0.1)]
    watch = loop.Watch(rows[:1], 64)
    with caplog.at_level(logging.WARNING):
        for row in rows[1:]:
            watch.see(row)
        assert len(caplog.records) == 2 and watch.signs.flat == 20
        assert "no group's completions have differed" in caplog.records[0].getMessage()
        assert "accuracy on val fell" in caplog.records[1].getMessage()
        again = loop.Watch(rows, 64)
        for row in updates([0.1] * 20, flat=1.0):
            again.see(row)
    assert len(caplog.records) == 2 and again.signs.flat == 40


def test_what_is_cut_is_named_before_what_follows_from_it(caplog):
    rows = [{**metrics(0.0), "frac_reward_zero_std": 1.0, "completions/clipped_ratio": 0.92}] * 10
    watch = loop.Watch([], 64)
    with caplog.at_level(logging.WARNING):
        for row in rows:
            watch.see(row)
    first, *_, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("92 % of completions were cut at rollout.max_completion_tokens=64: raise it")
    assert "'format' was always 0" in last and "raise rollout.max_completion_tokens first" in last
    assert loop.note(rows[0], None, watch.constant).startswith("92 % cut at max_completion_tokens · reward")
    learner = SimpleNamespace(task=SimpleNamespace(train=SimpleNamespace(items=[0] * 40)))
    config = SimpleNamespace(
        trainer=TrainerConfig("grpo", 1e-3, updates=10), rollout=SimpleNamespace(max_completion_tokens=64)
    )
    told = pipeline.training_facts(config, learner, 10, rows)
    assert told["cut"] == {"share": pytest.approx(0.92), "limit": 64} and "planned" not in told
    before = {"test": summary(accuracy=0.0, truncated=0.95), "val": summary(accuracy=0.0, truncated=0.01)}
    train = {"updates": 10, "constant_rewards": {"format": "always 0"}, **told}
    lines = tables.overall_lines(result(before, {}, train=train))
    assert lines[0].startswith(
        "95 % of the replies to test, zero-shot, were cut at rollout.max_completion_tokens: raise"
    )
    assert lines[1].startswith("92 % of completions were cut at rollout.max_completion_tokens=64")
    assert "raise rollout.max_completion_tokens first; if they do end, the model never" in lines[-1]
    assert sum("92 %" in line for line in lines) == 1


def test_the_doctor_names_what_is_cut_before_what_follows_from_it():
    finding = doctor.check_rewards([0.0] * 4, {"format": [0.0] * 4}, 2, cut=0.92, limit=64)
    with pytest.raises(UserError) as error:
        doctor.refuse([finding])
    message = str(error.value)
    assert message.startswith("doctor: rewards: 92 % of completions were cut at rollout.max_completion_tokens=64")
    assert ". Raise rollout.max_completion_tokens; 'format': most completions are cut" in message
    some = doctor.check_rewards([0.0, 1.0], {"format": [0.0, 1.0]}, 2, cut=0.2, limit=64)
    assert some.verdict == "warning" and some.seen.startswith("20 % of completions were cut")
    assert doctor.check_rewards([0.0, 1.0], {"format": [0.0, 1.0]}, 2, cut=0.05, limit=64).verdict == "ok"


# ---- numbers that are none


def test_a_reward_that_is_no_number_is_named_and_not_the_learning_rate():
    rows = [{"image": f"{n}.png", "completion": "six", "rewards/fair": 1.0, "rewards/mine": n} for n in (3.0, math.nan)]
    rows.insert(0, {**rows[0], "rewards/mine": None})  # of a judge that did not answer
    values = {"loss": math.nan, "rewards/fair/mean": 1.0, "rewards/mine/mean": math.nan, "reward": math.nan}
    with pytest.raises(UserError) as error:
        loop.check_finite(values, 3, rows)
    message = str(error.value)
    assert message.startswith("update 3: loss, reward, rewards/mine/mean not finite")
    assert "reward 'mine': it gave nan for 'six' to image nan.png" in message and "rewards.mine.fn" in message
    assert "learning_rate" not in message and "fair" not in message
    with pytest.raises(UserError, match=r"update 3: grad_norm not finite.*Lower trainer.learning_rate"):
        loop.check_finite({**dict.fromkeys(values, 1.0), "grad_norm": math.inf}, 3, rows)
    loop.check_finite(dict.fromkeys(values, 1.0), 3, rows)


def test_the_doctor_names_a_reward_that_is_no_number():
    finding = doctor.check_rewards([math.nan, 1.0], {"fair": [0.0, 1.0], "mine": [math.nan, 0.0]}, 2)
    assert finding.verdict == "failed" and "'mine' gave nan for 1 of 2 completions" in finding.seen
    assert "rewards.mine.fn" in finding.fix


# ---- patience


def test_patience_needs_validation_images():
    config = SimpleNamespace(
        evaluate="last", trainer=SimpleNamespace(name="grpo", patience=2), data=SimpleNamespace(name="dtd")
    )
    with pytest.raises(UserError, match="trainer.patience=2 .*data=dtd has none.*trainer.patience=0"):
        preflight.check_choice(config, {"test": []})
    preflight.check_choice(config, {"val": [], "test": []})
    config.trainer.name = "none"
    preflight.check_choice(config, {"test": []})


def test_a_training_that_patience_has_ended_says_so():
    config = SimpleNamespace(
        trainer=TrainerConfig("sft", 1e-3, updates=8), rollout=SimpleNamespace(max_completion_tokens=64)
    )
    told = pipeline.training_facts(
        config, SimpleNamespace(task=SimpleNamespace(train=SimpleNamespace(items=[0] * 16))), 2, []
    )
    assert told["planned"] == 8
    best = {"best": {"update": 0, "accuracy": 0.4875, "split": "val"}, "tested": 2, "last": {"accuracy": 0.4}}
    lines = tables.training_lines(result({}, {}, train={"updates": 2, **told, **best}))
    assert lines[0] == "stopped by patience after 2 of 8 updates"
    assert "the best evaluation was before training (48.75 % on val" in lines[1]


def test_the_untrained_model_is_the_first_that_can_be_the_best(process_group):
    right = [Prediction(str(i), "x", 0, "x", good, good) for i, good in enumerate((True, False, True, True))]
    recorder = SimpleNamespace(
        kept=lambda phase, split: Answers(right, 0.0) if (phase, split) == ("before", "val") else 1
    )
    predictor = SimpleNamespace(task=SimpleNamespace(evaluation={"val": [], "test": []}))
    config = SimpleNamespace(trainer=SimpleNamespace(evaluate_every=5, evaluate_limit=None))
    assert loop.untrained(predictor, config, recorder) == (0, 0.75)
    config.trainer.evaluate_limit = 2  # the images that are watched
    assert loop.untrained(predictor, config, recorder) == (0, 1.0)
    config.trainer.evaluate_every = 0
    assert loop.untrained(predictor, config, recorder) is None


# ---- evaluate=best


@pytest.mark.slow
def test_best_needs_evaluations_and_validation_images(compose, tmp_path):
    with pytest.raises(UserError, match="evaluate=best.*trainer.evaluate_every"):
        validate(compose("evaluate=best", "trainer.evaluate_every=0"))
    root = data_tree.build(tmp_path)
    chosen = ["evaluate=best", "trainer.evaluate_every=5", "shots=1", "data=dtd", f"data.root={root}"]
    config = validate(compose(*chosen, "validation=none"))
    with pytest.raises(UserError, match="evaluate=best.*validation images.*evaluate=last"):
        preflight.check_choice(config, task.build(config).task.evaluation)
    config = validate(compose(*chosen, "checkpoint.max_checkpoints=1"))
    with pytest.raises(UserError, match="checkpoint.max_checkpoints=2"):
        preflight.check_choice(config, task.build(config).task.evaluation)
    config = validate(compose(*chosen))
    preflight.check_choice(config, task.build(config).task.evaluation)


@pytest.fixture
def finished(tmp_path):
    """Checkpoints whose last one, after update 9, says that update 6 was the best so far, with 0.75."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    for number in (6, 9):
        state = State(number, 0.0, (6, 0.75), 1, 1, None, "", {}, 0.0)
        checkpoints.write(state, lambda folder: None)
    return checkpoints


@pytest.mark.parametrize(
    ("evaluate", "last", "tested", "best"),
    [("best", 1.0, 6, (6, 0.75)), ("last", 0.5, 9, (6, 0.75)), ("last", 1.0, 9, (9, 1.0))],
)
def test_the_tested_update_and_the_best_one(finished, evaluate, last, tested, best):
    right = [Prediction("a", "x", 0, "x", True, True), Prediction("b", "x", 0, "y", last == 1, last == 1)]
    config = SimpleNamespace(evaluate=evaluate, trainer=SimpleNamespace(evaluate_limit=None))
    learner = SimpleNamespace(task=SimpleNamespace(evaluation={"val": [], "test": []}))
    after = SimpleNamespace(answers={"val": Answers(right, 0.0)})
    rows = [{"step": 6, "eval/val/accuracy": 0.75}, {"step": 9, "loss": 1.0}, {"step": 9, "eval/val/accuracy": 0.5}]
    told = pipeline.best_evaluation(config, learner, finished, after, 9, rows)
    both = {"best": best, "last": (9, 0.5 if evaluate == "best" else last)}
    expected = {name: {"update": number, "accuracy": right, "split": "val"} for name, (number, right) in both.items()}
    assert told == {"tested": tested, **expected}
    (line,) = tables.training_lines(result({}, {}, train={"updates": 9, **told}))
    assert f"after the last one {100 * both['last'][1]:.2f} %" in line
    assert f"update {tested} of 9" in line and f"after update {best[0]}" in line and "on val" in line


def test_the_last_update_is_evaluated_only_to_choose():
    config = SimpleNamespace(evaluate="best", trainer=SimpleNamespace(evaluate_every=4))
    due = [number for number in range(1, 11) if loop.is_due(config, number, number == 10)]
    assert due == [4, 8, 10]
    config.evaluate = "last"
    assert [number for number in range(1, 9) if loop.is_due(config, number, number == 8)] == [4]


# ---- the bar


@pytest.fixture
def terminal(monkeypatch):
    shown = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "console", lambda: shown)
    return shown.file


def test_the_bar_says_reward_and_best_accuracy(terminal):
    with progress.bar("training (mine)", 4, done=1) as shown:
        shown.advance(loop.note({"reward": 0.5312, "loss": 0.1}, (2, 0.8123)))
    last = terminal.getvalue()
    assert "training (mine)" in last and "2/4" in last
    assert "reward 0.531" in last and "best accuracy 81.2 %" in last


@pytest.mark.parametrize(("total", "done"), [(0, 0), (6, 6)])
def test_nothing_to_do_has_no_bar(terminal, total, done):
    with progress.bar("training (mine)", total, done):
        pass
    assert terminal.getvalue() == ""


# ---- seconds


def test_seconds_by_phase_and_other_add_up(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    clock = progress.Stopwatch()
    clock.earlier = 20.0  # of a former attempt, whose phases are not known
    for name, inside, outside in (("data", 3.0, 1.0), ("model", 5.0, 0.5), ("data", 2.0, 0.0)):
        with clock.phase(name):
            now += inside
        now += outside
    with pytest.raises(ValueError), clock.phase("failed"):
        now += 4.0
        raise ValueError
    split = clock.split({"update": 7.0})
    # 20 before + 11.5 + 4 now; data 5, model 5, failed 4, and 7 of the updates: 14.5 are nobody's
    assert split == {"data": 5.0, "model": 5.0, "failed": 4.0, "update": 7.0, "other": 14.5, "total": 35.5}
    assert sum(seconds for phase, seconds in split.items() if phase != "total") == split["total"]


# ---- results on disk

NEEDED = [field.name for field in fields(Result) if field.default is MISSING and field.default_factory is MISSING]
NOW = replace(
    Result(**dict.fromkeys(NEEDED, "x")),
    weights={"path": "m", "sha256": "1"},
    before={"test": summary(accuracy=0.25)},
    after={"test": summary(accuracy=0.75)},
    overall={"before": {"mean": 0.25}, "after": {"mean": 0.75}},
    train={"updates": 3},
)


def written(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "metrics.json").write_text(text)
    return folder


def test_a_result_is_read_as_it_was_written(tmp_path):
    assert Result.load(written(tmp_path, NOW.to_json())) == NOW
    assert Result.load(tmp_path / "metrics.json").final["test"].accuracy == 0.75


DAMAGED = {
    "a newer format": ({**NOW.to_json(), "format": FORMAT + 1}, "format 2, and this version reads 1"),
    "cut short": (json.dumps(NOW.to_json())[:200], "damaged"),
    "empty": ("", "damaged"),
    "a list": ([1, 2], "damaged"),
    "a key too few": ({k: v for k, v in NOW.to_json().items() if k != "before"}, "damaged"),
    "a key too many": ({**NOW.to_json(), "strange": 1}, "damaged.*strange"),
    "a split without numbers": ({**NOW.to_json(), "before": {"test": {}}}, "damaged"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_what_cannot_be_read_is_one_error_that_names_the_file(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        Result.load(written(tmp_path, content))
    assert str(tmp_path / "metrics.json") in str(error.value)


def test_a_folder_without_a_result_is_named(tmp_path):
    with pytest.raises(UserError, match="no finished run.*metrics.json"):
        Result.load(tmp_path)


# ---- all of it in one run


@pytest.mark.slow
def test_a_run_tests_its_best_update_and_tells_all(runner, untrained_folder, tmp_path):
    folder = tmp_path / "run"
    arguments = [f"data.root={data_tree.build(tmp_path / 'data')}", "data=dtd", "shots=1", "trainer.updates=2"]
    arguments += ["model.recipe=null", f"model.path={untrained_folder}", f"cache_dir={tmp_path / 'cache'}"]
    arguments += ["+rewards.short={weight:1.0,fn:tests.rewards.shorter}", "rollout.max_completion_tokens=4"]
    arguments += ["evaluate=best", "trainer.evaluate_every=1", "trainer.learning_rate=1e-3", "label_scoring=false"]
    assert runner(folder, [*arguments, "trainer.prompts_per_update=2", "tracking=none"]) == 0
    found = Result.load(folder)
    # this model is never right, so no evaluation is better than the one before training
    assert found.train["tested"] == 0 and found.train["best"] == {"update": 0, "accuracy": 0.0, "split": "val"}
    assert "update 0 of 2; the best evaluation was before training (0.00 % on val" in "".join(
        tables.training_lines(found)
    )
    assert found.train["constant_rewards"] == {"equality": "always 0"}
    seconds = found.train["seconds"]
    assert sum(value for phase, value in seconds.items() if phase != "total") == pytest.approx(seconds["total"])
    assert {"data", "model", "rollout", "update", "evaluation before", "evaluation after"} <= seconds.keys()
    best, last, tested = (
        (folder / name / "model.safetensors").read_bytes()
        for name in ("checkpoints/step-000000/model", "checkpoints/step-000002/model", "model")
    )
    assert tested == best != last
