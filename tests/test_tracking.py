"""The W&B mirror: what ends up in the offline file, and where."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from common.config.composition import validate
from common.config.schema import TrackingConfig
from common.data.digits import Digits
from common.evaluation.evaluate import Evaluation
from common.report import __main__ as command
from common.report import publish, tables
from common.report.paper import page, results
from common.run import tracking
from common.types import Answers, Prediction, Reply
from tests.test_tables import result as result_with
from tests.test_tables import summary as summary_with
from tests.wandb_log import summary_of


@pytest.mark.slow
def test_offline_file_holds_the_run(tmp_path):
    folder = tmp_path / "clsrl-digits"
    folder.mkdir()
    config = TrackingConfig(name="wandb", project="p", group="digits-few_shot-s16", tags=["extra"], completions_rows=2)
    values = {"method": {"name": "clsrl"}, "shots": 16}
    tracker = tracking.WandbTracker(config, folder, "train", ["clsrl", "digits"], values, ["test"], Digits().open)
    rows = [{"step": 1, "image": str(i), "label": "six", "completion": "six", "reward": 1.0} for i in range(3)]
    for step in (1, 2):
        tracker.log({"reward": 0.5 * step, "eval/test/accuracy": 0.6, "time/rollout_s": 0.1}, step)
        tracker.completions(rows, step)
    tracker.close(failed=False)
    (file,) = folder.rglob("*.wandb")
    found = summary_of(file)
    assert (found["project"], found["group"], found["job_type"], found["name"]) == (
        "p",
        "digits-few_shot-s16",
        "train",
        "clsrl-digits",
    )
    assert found["tags"] == ["clsrl", "digits", "extra"] and found["exit"] == 0
    assert found["config"]["method"] == {"name": "clsrl"}, "nested values, not a string"
    assert ("*", "step") in found["metrics"] and ("eval/test/accuracy", "step") in found["metrics"]
    logged = [row for row in found["history"] if "train/reward" in row]
    assert [(row["step"], row["train/reward"], row["time/rollout_s"]) for row in logged] == [
        (1, 0.5, 0.1),
        (2, 1.0, 0.1),
    ]
    tables = [row for row in found["history"] if "completions._type" in row]
    assert [row["completions._type"] for row in tables] == ["incremental-table-file"] * 2
    written = [json.loads(path.read_text())["data"] for path in folder.rglob("*.table.json")]
    assert [len(rows) for rows in written] == [2, 2], "only the new rows, at most completions_rows"
    staged = [path.read_bytes()[:8] for path in (folder / "wandb" / "data").rglob("*") if path.is_file()]
    assert staged.count(b"\x89PNG\r\n\x1a\n") >= 2, "images of the table lie inside the run folder"


@pytest.mark.slow
def test_a_page_is_logged_beside_its_runs(tmp_path):
    sweep = results.Sweep("clsrl_table2", {"rows": ["method"], "columns": ["data"]}, {}, [])
    ours = [page.TableCell({"method": "sft", "data": "dtd"}, 61.5, None, None, (1,), 9, 60.0, (), (), ())]
    folder = tmp_path / "clsrl_table2-seed1"
    folder.mkdir()
    (folder / "report.html").write_text("<p>all of it</p>")
    for _ in range(2):
        publish.publish_to_wandb(
            page.Page(sweep, ours, ""), folder, {"project": "p", "mode": "offline", "tags": ["mine"]}
        )
    files = sorted(folder.rglob("*.wandb"))
    found = summary_of(files[0])
    assert (found["group"], found["job_type"], found["tags"]) == ("clsrl_table2", "table", ["clsrl_table2", "mine"])
    assert len({path.stem for path in files}) == 1, "twice the same run"
    written = [json.loads(path.read_text()) for path in folder.rglob("*.table.json")]
    tables = [(each["columns"], each["data"]) for each in written]
    assert (["method", "dtd"], [["sft", "61.50 (60)"]]) in tables
    assert any(path.read_text() == "<p>all of it</p>" for path in folder.rglob("*.html") if path.parent != folder)
    nowhere = tmp_path / "other"
    publish.publish_to_wandb(page.Page(sweep, ours, ""), nowhere, {"project": "p", "mode": "disabled", "tags": []})
    assert not nowhere.exists()


def test_without_a_key_a_dashboard_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert command.main(["dashboard", "me"]) == 2
    assert "log in with wandb login" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_continues_the_same_one(tmp_path):
    config = TrackingConfig(name="wandb", project="p")
    ids = []
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        folder.mkdir(exist_ok=True)
        tracker = tracking.WandbTracker(config, folder, "train", [], {}, ["test"], Digits().open)
        ids.append(tracker.id)
        assert tracker.run.id == tracker.id
        tracker.close(failed=False)
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.slow
def test_the_result_is_summed_up_with_its_predictions_and_confusions(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = tracking.WandbTracker(
        TrackingConfig(name="wandb", project="p", predictions_rows=2), folder, "train", [], {}, ["test"], Digits().open
    )
    answers = [("six", "six"), ("six", "Zero"), ("zero", "a heart"), ("other", "other")]  # a class may be called so
    predictions = [
        Prediction(str(i), label, 0, answer, label == answer, label == answer, Reply(answer, 1, False, True))
        for i, (label, answer) in enumerate(answers)
    ]
    summary = summary_with(accuracy=1 / 3)
    result = result_with({"test": summary_with(accuracy=0.25)}, {"test": summary})
    tracker.result(result, Evaluation({"test": Answers(predictions, 1.0)}, {"test": summary}))
    tracker.close(failed=False)
    (file,) = folder.rglob("*.wandb")
    found = summary_of(file)
    assert found["summary"]["before/test"] == 0.25 and found["summary"]["gain/test"] == pytest.approx(1 / 3 - 0.25)
    tables = [json.loads(path.read_text()) for path in folder.rglob("*.table.json")]
    (shown,) = [table["data"] for table in tables if "reply" in table["columns"]]
    assert [(row[1], row[2]) for row in shown] == [("six", "Zero"), ("zero", "a heart")], "the wrong ones first"
    (counts,) = [table["data"] for table in tables if "nPredictions" in table["columns"]]
    expected = {("six", "six"): 1, ("six", "zero"): 1, ("zero", "(no class name)"): 1, ("other", "other"): 1}
    assert {(row[0], row[1]): row[2] for row in counts if row[2]} == expected


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, "offline"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("online", {}, "online"),
    ],
)
def test_offline_unless_a_key_is_present(monkeypatch, tmp_path, mode, environment, expected):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracking.resolve_mode(mode) == expected


def test_key_in_netrc_counts(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k")
    assert tracking.resolve_mode("auto") == "online"


@contextmanager
def server(status, body):
    """W&B's, on this machine; what it was asked with is in `asked`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.headers["Authorization"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            return

    asked = []
    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


@pytest.fixture
def with_key(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("status", "body", "trouble"),
    [
        (200, '{"data": {"viewer": {"id": "me"}}}', None),
        (200, '{"data": {"viewer": null}}', "does not know the API key"),
        (401, "", "does not take the API key"),  # a malformed one
        (503, "", "503"),
        (200, "<html>log in to this hotel", "does not answer as W&B does"),
        (200, "[]", "does not answer as W&B does"),
    ],
)
@pytest.mark.slow
def test_online_only_where_the_server_takes_the_key(monkeypatch, with_key, caplog, status, body, trouble):
    with server(status, body) as (address, asked), caplog.at_level(logging.WARNING):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        mode = tracking.settled_mode("auto")
    assert len(asked) == 1
    if trouble is None:
        assert mode == "online" and not caplog.records
    else:
        (record,) = caplog.records
        assert mode == "offline" and trouble in record.message and "tracked offline, `wandb sync`" in record.message


def test_without_a_network_it_is_offline_within_seconds(monkeypatch, with_key, caplog):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
        assert tracking.settled_mode("auto") == "offline" and "cannot be reached" in caplog.text
    caplog.clear()
    monkeypatch.setattr(tracking, "LONGEST_ANSWER", 0.2)
    monkeypatch.setattr(tracking, "_asked", lambda *_: time.sleep(5))  # as looking up a name may
    began = time.monotonic()
    assert tracking.settled_mode("online") == "offline" and "does not answer" in caplog.text
    assert time.monotonic() - began < 2


def test_nobody_is_asked_who_need_not_be(monkeypatch, with_key, tmp_path, caplog):
    monkeypatch.setattr(tracking, "_asked", lambda *_: pytest.fail("asked"))
    assert [tracking.settled_mode(mode) for mode in ("offline", "disabled")] == ["offline", "disabled"]
    monkeypatch.setenv("RANK", "1")
    assert tracking.settled_mode("online") == "online", "rank 0 tracks"
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tracking.settled_mode("online") == "offline" and "there is no API key" in caplog.text


@pytest.mark.slow
def test_the_mode_is_settled_before_the_model_is_loaded(monkeypatch, compose, tmp_path, process_group):
    from common import pipeline

    class Loaded(Exception):
        pass

    def build(config, *_):
        assert config.tracking.mode == "offline"
        raise Loaded

    monkeypatch.setattr(tracking, "settled_mode", lambda mode: "offline")
    monkeypatch.setattr(pipeline, "learner_class", lambda _: build)
    config = validate(compose("tracking.mode=online", "shots=170"))
    (tmp_path / "run").mkdir()
    with pytest.raises(Loaded):
        pipeline.run(config, tmp_path / "run")
    assert config.tracking.mode == "online", "the request stays as it was given"


@pytest.mark.slow
def test_a_server_that_takes_the_key_and_no_run_costs_a_warning(monkeypatch, tmp_path, caplog):
    import wandb

    begin, modes = wandb.init, []

    def refuse(**arguments):
        modes.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("permission\ndenied")
        return begin(**arguments)

    monkeypatch.setattr(wandb, "init", refuse)
    config = TrackingConfig(name="wandb", project="p", mode="online")
    tracker = tracking.WandbTracker(config, tmp_path, "train", [], {}, ["test"], Digits().open)
    tracker.log({"reward": 0.5}, 1)
    tracker.close(failed=False)
    assert modes == ["online", "offline"] and "permission denied; the run is tracked offline" in caplog.text
    (file,) = tmp_path.rglob("*.wandb")
    assert summary_of(file)["exit"] == 0


@pytest.mark.slow
def test_a_group_holds_what_differs_in_its_seed_alone(compose_named):
    """docs/reports.md: two runs are in one group where their configurations differ in nothing else that decides a result."""
    group = {
        change: compose_named(*change.split()).tracking.group
        for change in (
            "seed=1",
            "seed=2",
            "gpus=2",
            "method=clsrl",
            "model=qwen2_vl_2b",
            "protocol=official",
            "trainer.learning_rate=1e-5",
            "rewards.equality.weight=2",
            "data=folder data.folder=/photos/a",
            "data=folder data.folder=/photos/b",
            "label=mine",
        )
    }
    assert group["seed=1"] == group["seed=2"] == group["gpus=2"]
    assert len(set(group.values())) == len(group) - 2, group


def test_every_attempt_that_was_offline_is_uploaded(tmp_path, capsys):
    folder = tmp_path / "my run"
    for day in ("20260101_100000-a", "20260102_100000-a"):
        (folder / "wandb" / f"offline-run-{day}").mkdir(parents=True)
    shown = result_with({"test": summary_with(accuracy=0.25)}, {})
    shown.train["seconds"] = {"total": 1.0}
    tables.show(shown, folder)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "wandb sync" in line]
    where = folder / "wandb" / "offline-run-"
    assert line.endswith(f"wandb sync '{where}20260101_100000-a' '{where}20260102_100000-a'")
