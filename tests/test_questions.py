"""`manifest=true`: what a run would ask, shown and written down."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

import run
from clsrl import prompting as wording
from common.config.composition import plain, validate
from common.data import manifest, task
from common.report import prompts
from common.run.run_folder import RunFolder
from common.types import Prompt, UserError
from tests.conftest import prompts_of
from tests.test_literal_names import NAMES


def shown(manifest, asked=None, path="manifest.json"):
    console = Console(file=io.StringIO(), width=300, force_terminal=True, color_system=None)
    prompts.show(manifest, asked, path, console)
    return console.file.getvalue()


def row(text, name):
    """The cells of a split's line in the summary."""
    (line,) = [line for line in text.splitlines() if line.startswith("│") and line.split("│")[1].strip() == name]
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_a_long_list_is_cut_and_the_rest_of_the_question_stays():
    names = tuple(f"name {number}" for number in range(100))
    text = wording.question("What is it?", names, wording.TRAINING["no_think"])
    cut = prompts.shortened(text, names)
    assert cut.startswith(text[: text.index("name 20")]) and cut.endswith(wording.TRAINING["no_think"])
    assert "name 20" not in cut and "… (100 names)" in cut
    few = names[:20]
    text = wording.question("What is it?", few, "")
    assert prompts.shortened(text, few) == text


def test_a_list_is_found_behind_words_that_are_names_too():
    names = ("a", "b", *(f"n{number}" for number in range(30)))
    text = f"a question about a, b and more: {', '.join(names)}; a or b?"
    assert prompts.shortened(text, names, 3) == "a question about a, b and more: a, b, n0, … (32 names); a or b?"


def test_questions_of_every_split_stand_above_the_summary(compose):
    config = validate(compose("shots=4", "protocol=official", "method=sft"))
    data, asked = task.build(config), prompts_of(config)
    text = shown(data.manifest, asked)
    # protocol=official trains SFT with a system message; the evaluation has none
    assert text.count("system: ") == 3 and text.count("train · ") == 3
    for split, asking in {"train": asked.train, **asked.evaluation}.items():
        chosen = asking[len(asking) // 3]  # the second of three that are spread evenly
        assert f"{split} · {chosen.image} · {chosen.label}" in text and chosen.text.strip() in text
    assert row(text, "train")[:2] == ["40", "10"]
    assert row(text, "test")[0] == f"{len(asked.task.evaluation['test'].items):,}"


def test_names_are_literal(compose):
    manifest, asked = task.build(validate(compose("shots=1"))).manifest, prompts_of(validate(compose("shots=1")))
    for name in NAMES:
        prompt = Prompt(f"photos/{name}", f"Is it {name}?", name, (name,), system=f"say {name}")
        facts = {**manifest, "data": name, "origins": {name: name}, "short_classes": {name: 1}, "notes": [name]}
        text = shown(facts, replace(asked, train=[prompt], evaluation={}), f"/{name}/manifest.json")
        # image, label, question, system; title; origin of every split; short class, note, path
        assert text.count(name) == 4 + 1 + len(facts["splits"]) + 3, name


def test_what_was_found_is_summed_up(compose):
    data = task.build(validate(compose("shots=1")))
    first, second = data.task.train.items[0].image, data.task.evaluation["test"].items[0].image
    found = {"passed_over": {"litter": 3}, "duplicates": {"train_and_test": [[first, second]]}}
    text = shown({**data.manifest, **found})
    assert row(text, "train")[-1] == "1" and row(text, "test")[-1] == "1"
    assert "3 litter" in text and f"first {first} and {second}" in text


def test_a_split_on_another_dataset_names_its_origin(compose):
    data = task.build(validate(compose("shots=1")))
    facts = {**data.manifest, "origins": {"digits": "own", "other": "published"}}
    facts["splits"] = {**facts["splits"], "other": facts["splits"]["test"]}
    text = shown(facts)
    assert [row(text, name)[2] for name in ("train", "test", "other")] == ["own", "own", "published"]


@pytest.mark.slow
def test_the_job_writes_the_manifest_and_the_run_may_follow(compose, tmp_path, capsys):
    folder, cfg = tmp_path / "run", compose("shots=1", "manifest=true")
    run.job(cfg, folder)
    written = json.loads((folder / "manifest.json").read_text())
    assert written["hash"] == manifest.digest(manifest.defining(written))
    assert str(folder / "manifest.json") in capsys.readouterr().out.replace("\n", "")
    run.job(cfg, folder)  # may be said again
    follows = RunFolder(folder)
    assert follows.finished_result(plain(cfg)) is None, "the folder is still free"
    follows.claim(plain(cfg))
    assert not (folder / "manifest.json").exists(), "the run writes its own: the data may have changed meanwhile"


@pytest.mark.slow
def test_the_manifest_of_a_run_is_not_overwritten(compose, tmp_path):
    cfg, other = compose("shots=1", "manifest=true"), compose("shots=2", "manifest=true")
    RunFolder(tmp_path).claim(plain(cfg))
    with pytest.raises(UserError, match="has only begun"):
        run.job(cfg, tmp_path)
    path = tmp_path / "manifest.json"
    manifest.write(task.build(validate(cfg)).manifest, path)
    before = path.read_bytes()
    run.job(cfg, tmp_path)
    with pytest.raises(UserError, match="froze another task"):
        run.job(other, tmp_path)
    assert path.read_bytes() == before


def test_a_file_of_another_kind_is_left_alone(compose, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text('{"name": "my web page"}')
    with pytest.raises(UserError, match="is not empty and holds no run .it has manifest.json"):
        run.job(compose("manifest=true"), tmp_path)
    assert "web page" in path.read_text()


def test_ranks_are_refused(compose, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="manifest=true needs no ranks"):
        run.job(compose("manifest=true"), tmp_path)
