"""The main job as a user runs it, on real images with the pre-trained tiny model (built once, cached)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow.parquet
import pytest

from tests.conftest import REPOSITORY
from tests.wandb_log import summary_of

pytestmark = pytest.mark.slow
QUIET = ["tracking=none", "label_scoring=false", "trainer.evaluate_every=0"]


def run(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "run.py", *arguments, f"hydra.run.dir={folder}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    return done


def result(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`python run.py` with no arguments, shared by the tests below."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    environment = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    old = {name: os.environ.get(name) for name in environment}
    os.environ |= environment
    done = run(folder)
    for name, value in old.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    return folder, done.stdout


def test_demo_learns(demo):
    folder, _ = demo
    r = result(folder)
    assert (r["method"], r["data"], r["setting"], r["protocol"], r["model"], r["shots"], r["seed"]) == (
        "nothinking",
        "digits",
        "few_shot",
        "clean",
        "tiny_qwen2_vl",
        16,
        1,
    )
    before, after = r["before"]["test"], r["after"]["test"]
    assert before["n"] == after["n"] == 1637
    assert 0.40 <= before["accuracy"] <= 0.70
    assert after["accuracy"] >= 0.83
    assert after["ci95"][0] > before["ci95"][1]
    assert r["train"]["updates"] == 100 and r["train"]["paired"]["test"]["p_value"] < 1e-20
    assert {"rollout", "reward", "update"} <= r["train"]["seconds"].keys()
    assert len(r["weights"]["sha256"]) == 64 and r["versions"]["torch"]


def test_demo_ends_with_a_table(demo):
    folder, output = demo
    for text in (
        "test, zero-shot",
        "test, trained",
        "95 % interval",
        "McNemar",
        "most probable name",
        "seconds of the run: ",
        f"run folder: {folder}",
    ):
        assert text in output


def test_run_folder_is_complete_and_consistent(demo):
    folder, _ = demo
    r = result(folder)
    predictions = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pandas()
    trained = predictions[predictions.phase == "after"]
    assert len(trained) == 1637 and trained.correct.mean() == pytest.approx(r["after"]["test"]["accuracy"])
    best = trained.apply(lambda row: row.choices[row.probabilities.argmax()] == row.label, axis=1)
    assert best.mean() == pytest.approx(r["after"]["test"]["probability"]["top1"], abs=2e-3)  # stored in fp32: ties
    assert best.mean() >= 0.83
    asked = predictions.prompt.iloc[0]
    assert all(name in asked for name in ("zero", "nine")) and not predictions.prompt.isna().any()
    completions = pyarrow.parquet.read_table(folder / "completions.parquet").to_pandas()
    assert len(completions) == 100 * 16 * 8
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    assert [line["step"] for line in updates] == list(range(1, 101))
    assert completions[completions.step == 7].reward.mean() == pytest.approx(updates[6]["reward"])
    assert [line["step"] for line in lines if "eval/test/accuracy" in line] == [0, 20, 40, 60, 80, 100]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["hash"] == r["manifest"]
    train_images = {row[0] for row in manifest["splits"]["train"]["rows"]}
    assert not train_images & set(trained.image)
    for picture in ("curves.png", "confusion-test.png", "report.html"):
        assert (folder / picture).stat().st_size > 10_000
    kept = pyarrow.parquet.read_table(folder / "thumbnails.parquet")["image"].to_pylist()
    assert len(kept) == 1000 + 160 and set(predictions[~predictions.correct].image) <= set(kept)
    (log,) = folder.rglob("*.wandb")
    found = summary_of(log)
    assert (
        found["exit"] == 0
        and found["group"].startswith("nothinking-digits-few_shot-clean-tiny_qwen2_vl-s16-")
        and "nothinking" in found["tags"]
    )
    assert sum("train/reward" in row for row in found["history"]) == 100


def test_trained_weights_load_and_give_the_same_answers(demo, digits_task, no_think):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from common.models.meter import messages

    folder, _ = demo
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    predictions = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pandas()
    trained = predictions[predictions.phase == "after"].set_index("image").completion
    prompts = no_think.evaluation_prompts(digits_task, "test")[:40]
    for prompt in prompts:
        text = processor.apply_chat_template(messages(prompt), tokenize=False, add_generation_prompt=True)
        inputs = processor(
            text=[text], images=[digits_task.images.open(prompt.image).resize((32, 32), 1)], return_tensors="pt"
        )
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=40)
        assert (
            processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == trained[prompt.image]
        )


def test_second_run_shows_the_result_and_touches_nothing(demo):
    folder, _ = demo
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    done = run(folder)
    assert "already finished" in done.stdout and "test, trained" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.faults
def test_thinking_learns_accuracy_and_format(runner, tmp_path):
    assert runner(tmp_path, ["method=clsrl", "shots=100", *QUIET]) == 0  # leaves 797 images to test
    r = result(tmp_path)
    assert 0.40 <= r["before"]["test"]["accuracy"] <= 0.70
    assert r["after"]["test"]["accuracy"] >= 0.79 and r["after"]["test"]["well_formed"] >= 0.95
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    assert sum(line["rewards/format/mean"] for line in updates[-10:]) / 10 >= 0.95
    # The paper's figure 1 shows completions getting shorter, and so it mostly goes here (docs/log.md); how far
    # differs with the CPU that pre-trained the model, so only this is certain: they end before the limit.
    assert sum(line["completions/clipped_ratio"] for line in updates[-10:]) / 10 <= 0.02


@pytest.mark.faults
def test_supervised_baseline_learns(runner, tmp_path):
    assert runner(tmp_path, ["method=sft", *QUIET]) == 0
    assert result(tmp_path)["after"]["test"]["accuracy"] >= 0.83


@pytest.mark.faults
def test_meaningless_rewards_teach_nothing_where_true_ones_teach(runner, tmp_path):
    """Small and few steps: at the demo's own, noise destroys the model, and a wreck would pass any upper bound."""
    gentle = ["trainer.learning_rate=1e-4", "trainer.updates=40", *QUIET]
    gained, formed, unformed = {}, {}, {}
    for name, preset in (("shuffled", "shuffled_rewards"), ("true", "none")):
        assert runner(tmp_path / name, [f"experiment={preset}", *gentle]) == 0
        before, after = (result(tmp_path / name)[phase]["test"] for phase in ("before", "after"))
        gained[name] = after["accuracy"] - before["accuracy"]
        formed[name] = after["well_formed"] - before["well_formed"]
        unformed[name] = 1 - before["well_formed"]
    assert -0.05 <= gained["shuffled"] <= 0.05 and abs(formed["shuffled"]) <= 0.10, "as it was (docs/log.md)"
    # how many are well formed from the start differs with the CPU that pre-trained the model: half of the rest, at least
    assert gained["true"] >= 0.07 and formed["true"] >= min(0.05, unformed["true"] / 2)


@pytest.mark.parametrize("method", ["clsrl", "sft"])
def test_official_protocol_runs_end_to_end(runner, tmp_path, method):
    assert (
        runner(
            tmp_path,
            [
                f"method={method}",
                "protocol=official",
                "setting.test_per_class=5",
                "trainer.updates=2",
                "tracking=none",
                "label_scoring=false",
            ],
        )
        == 0
    )
    r = result(tmp_path)
    assert r["protocol"] == "official" and r["train"]["updates"] == 2
    assert {"accuracy", "accuracy_official"} <= r["after"]["test"].keys()


def test_adapter_run_saves_an_adapter_that_loads(runner, tmp_path):
    from transformers import AutoModelForImageTextToText

    assert (
        runner(
            tmp_path,
            ["model.lora.r=4", "trainer.updates=2", "trainer.beta=0.04", "setting.test_per_class=5", *QUIET],
        )
        == 0
    )
    assert (tmp_path / "model" / "adapter_config.json").is_file()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert any("lora" in name for name, _ in model.named_parameters())
