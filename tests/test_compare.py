"""`python -m common.report compare`: groups, statistics against scipy, and folders that hold no result."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep

from common.config import composition
from common.report import __main__ as command
from common.report import compare, folders, groups, paired
from common.run.result import FORMAT
from tests.conftest import REPOSITORY


@pytest.fixture
def write(compose, tmp_path):
    """Write a run folder by its overrides; `right`: of each test image, after training; `before`: before it."""

    def make(name, *overrides, right, before=None, remarks=()):
        values = composition.plain(compose(*overrides))
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"signature": composition.signature(values), **values}))
        phases = {"before": right if before is None else before, **({} if before is None else {"after": right})}

        def summary(answers):
            share = float(np.mean(answers))
            low, high = 0.25, 0.75
            return {"n": len(answers), "accuracy": share, "ci95": [low, high], "per_class": {}, "seconds": 1.0}

        result = {
            **{key: values[key]["name"] for key in ("method", "data", "setting", "protocol", "model")},
            **{key: values[key] for key in ("shots", "seed", "sampler")},
            **{
                "origins": {},
                "left_out": 0,
                "short_classes": {},
                "passed_over": {},
                "git_commit": None,
                "versions": {},
            },
            **{"weights": {}, "manifest": "", "decoding": "", "format": FORMAT, "remarks": list(remarks)},
            "signature": composition.signature(values),
            "after": {},
            **{phase: {"test": summary(answers)} for phase, answers in phases.items()},
            "train": {"updates": 5, "seconds": {"model": 100.0, "update": 3.0, "saving": 2.0}},
        }
        (folder / "metrics.json").write_text(json.dumps(result))
        rows = [(phase, f"{i}.png", bool(r)) for phase, answers in phases.items() for i, r in enumerate(answers)]
        columns = list(zip(*rows, strict=True))
        table = {"phase": columns[0], "split": ["test"] * len(rows), "image": columns[1], "correct": columns[2]}
        parquet.write_table(
            pa.table({key: list(value) for key, value in table.items()}), folder / "predictions.parquet"
        )
        return folder

    return make


def answers(seed, share, n=40):
    return np.random.default_rng(seed).random(n) < share


def cells(text):
    rows = list(csv.DictReader(io.StringIO(text)))
    return rows, {row["run"]: row for row in rows}


@pytest.mark.slow
def test_seeds_stand_together_and_their_statistics_are_scipys(write, capsys):
    made = [answers(seed, 0.7) for seed in (1, 2, 3)]
    paths = [write(f"run{i}", f"seed={i + 1}", right=right, before=~right) for i, right in enumerate(made)]
    assert command.main(["compare", "--format", "csv", *map(str, paths)]) == 0
    rows, _ = cells(capsys.readouterr().out)
    shares = [right.mean() for right in made]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(shares), scale=stats.sem(shares))
    assert len(rows) == 1 and rows[0]["run"] == "nothinking · digits · tiny_qwen2_vl · 16 shots"
    assert rows[0] == {
        **rows[0],
        "seeds": "1, 2, 3",
        "images": "40",
        "accuracy": f"{100 * np.mean(shares):.2f}",
        "± std": f"{100 * np.std(shares, ddof=1):.2f}",
        "95 % interval": f"{100 * low:.2f} – {100 * high:.2f}",
        "before": f"{100 * (1 - np.mean(shares)):.2f}",
        "seconds": "5",
    }


@pytest.mark.slow
def test_what_tells_groups_apart_is_in_their_names(write):
    paths = [
        write("a", right=answers(1, 0.5)),
        write("b", "trainer.learning_rate=1e-4", right=answers(1, 0.5)),
        write("c", "method=sft", "setting=base_to_new", right=answers(1, 0.5)),
        write("shuffled_rewards-nothinking-digits-few_shot", "shots=4", right=answers(1, 0.5)),
    ]
    names = [group.label for group in groups.group(folders.find(paths))]
    assert names == [
        "nothinking · digits · tiny_qwen2_vl · 16 shots trainer.learning_rate=0.001",
        "nothinking · digits · tiny_qwen2_vl · 16 shots trainer.learning_rate=0.0001",
        "sft · digits · base_to_new · tiny_qwen2_vl · 16 shots",
        "nothinking (shuffled_rewards) · digits · tiny_qwen2_vl · 4 shots",
    ]


@pytest.mark.slow
def test_a_difference_is_of_the_same_images(write, capsys):
    first, second = [answers(s, 0.6) for s in (1, 2)], [answers(s + 10, 0.8) for s in (1, 2)]
    paths = [write(f"a{i}", f"seed={i + 1}", right=right) for i, right in enumerate(first)]
    paths += [write(f"b{i}", f"seed={i + 1}", "method=sft", right=right) for i, right in enumerate(second)]
    assert command.main(["compare", "--format", "csv", "--against", "nothinking", *map(str, paths)]) == 0
    _, by_name = cells(capsys.readouterr().out)
    row = by_name["sft · digits · tiny_qwen2_vl · 16 shots"]
    better = sum(int((b & ~a).sum()) for a, b in zip(first, second, strict=True))
    worse = sum(int((a & ~b).sum()) for a, b in zip(first, second, strict=True))
    assert (
        row["difference"] == f"{100 * np.mean([b.mean() - a.mean() for a, b in zip(first, second, strict=True)]):+.2f}"
    )
    assert float(row["p"]) == pytest.approx(stats.binomtest(better, better + worse).pvalue, rel=0.05)
    low, high = (float(bound) for bound in row["95 % interval of it"].split(" – "))
    assert low < float(row["difference"]) < high


def test_the_bootstrap_is_scipys_for_one_seed():
    """Resampling images: scipy's percentile interval of the mean, up to the noise of the draws."""
    changes = np.random.default_rng(0).choice(np.array([-1, 0, 1], np.int8), 400, p=[0.1, 0.6, 0.3])
    found = paired.bootstrap([changes], draws=20_000)
    expected = stats.bootstrap((changes,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=4e-3)


def test_the_bootstrap_covers_the_truth():
    """Of 400 pairs of classifiers on 300 images, whose true difference is 0.2."""
    generator = np.random.default_rng(1)
    inside = 0
    for number in range(400):
        drawn = generator.choice(np.array([-1, 0, 1], np.int8), 300, p=[0.1, 0.6, 0.3])
        low, high = paired.bootstrap([drawn], draws=600, seed=number)
        inside += low <= 0.2 <= high
    assert inside / 400 >= 0.93


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("seeds", "spread", "images"), [(3, 0.0, 200), (3, 0.05, 200), (2, 0.05, 2000), (3, 0.05, 2000), (5, 0.02, 8000)]
)
def test_the_bootstrap_covers_the_truth_over_seeds(seeds, spread, images):
    """Of 300 pairs of methods, whose difference is 0.08 on average and another one with each seed."""
    generator = np.random.default_rng(2)
    inside = 0
    for number in range(300):
        changes = []
        for shift in generator.normal(0, spread, seeds) / 2:
            better, worse = max(0.2 + shift, 0), max(0.12 - shift, 0)
            p = [worse, 1 - better - worse, better]
            changes.append(generator.choice(np.array([-1, 0, 1], np.int8), images, p=p))
        low, high = paired.bootstrap(changes, draws=600, seed=number)
        inside += low <= 0.08 <= high
    assert inside / 300 >= 0.93


def test_on_other_images_the_difference_has_newcombes_interval(write, capsys):
    """28 of 40 against 8 of 20."""
    few = write("few", right=np.arange(40) < 28)
    many = write("many", "method=sft", right=np.arange(20) < 8)
    assert command.main(["compare", "--format", "csv", "--against", "sft", str(few), str(many)]) == 0
    _, by_name = cells(capsys.readouterr().out)
    row = by_name["nothinking · digits · tiny_qwen2_vl · 16 shots"]
    low, high = confint_proportions_2indep(28, 40, 8, 20, method="newcomb", compare="diff")
    assert (row["difference"], row["p"]) == ("+30.00", "other images")
    assert row["95 % interval of it"] == f"{100 * low:+.2f} – {100 * high:+.2f}"


def test_other_tasks_are_not_compared(write, capsys):
    """Their accuracies differ for reasons of their own."""
    paths = [write("a", right=answers(1, 0.5)), write("b", "data=fashion", "method=sft", right=answers(1, 0.9, 50))]
    assert command.main(["compare", "--format", "csv", "--against", "nothinking", *map(str, paths)]) == 0
    assert {row["difference"] for row in cells(capsys.readouterr().out)[0]} == {""}


def test_phases_of_earlier_versions_are_the_same_images(write, capsys):
    one, two = write("a", right=answers(1, 0.5)), write("b", "method=sft", right=answers(2, 0.9))
    table = parquet.read_table(two / "predictions.parquet")
    former = pa.array(["zero_shot"] * len(table))
    parquet.write_table(table.set_column(0, "phase", former), two / "predictions.parquet")
    assert command.main(["compare", "--format", "csv", "--against", "nothinking", str(one), str(two)]) == 0
    assert "other images" not in capsys.readouterr().out


def test_folders_without_a_result_are_named_and_the_exit_code_says_so(write, tmp_path, capsys):
    done = write("done", right=answers(1, 0.5))
    half = write("half", "seed=2", right=answers(1, 0.5))
    (half / "metrics.json").unlink()
    (half / "metrics.jsonl").write_text('{"step": 0}\n{"step": 7, "reward": 1.0}\n{"step": 8, "rew')
    running = write("running", "seed=3", right=answers(1, 0.5))
    (running / "metrics.json").unlink()
    damaged = write("damaged", "seed=4", right=answers(1, 0.5))
    (damaged / "metrics.json").write_text("{")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (tmp_path / "multirun.yaml").write_text("a: 1\n")
    lone = write("lone", "method=sft", right=answers(1, 0.5), remarks=["test-selected"])
    paths = [done, half, running, damaged, foreign, tmp_path / "multirun.yaml", lone]
    with (running / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert command.main(["compare", "--format", "markdown", *map(str, paths)]) == 1
    shown = capsys.readouterr().out
    assert "1, (2), (3), (4)" in shown
    assert f"{half}: unfinished, after 7 updates" in shown and f"{running}: running" in shown
    assert f"{damaged}: damaged" in shown and f"{foreign}: foreign" in shown and "multirun" not in shown
    assert "sft · digits · tiny_qwen2_vl · 16 shots: no run of seed 2, 3, 4" in shown
    assert "50" in shown and " †" in shown and "†: test-selected" in shown


@pytest.mark.parametrize("against", ["unknown", "digits"])
def test_a_baseline_is_one_row(write, capsys, against):
    paths = [write("a", right=answers(1, 0.5)), write("b", "method=sft", right=answers(1, 0.5))]
    assert command.main(["compare", "--against", against, *map(str, paths)]) == 2
    assert "must be a part of one row's name alone" in capsys.readouterr().err


def test_latex_and_markdown_carry_hostile_names():
    table = compare.Table(("run", "split", "accuracy"), [("a_b & 50 % |x|", "test", "1.00 ± 2")], ["a note"])
    latex, markdown = compare.render(table, "latex"), compare.render(table, "markdown")
    assert r"a\_b \& 50 \% |x| & test & 1.00 $\pm$ 2 \\" in latex and r"\begin{tabular}{llr}" in latex
    assert r"| a_b & 50 % \|x\| | test | 1.00 ± 2 |" in markdown and markdown.endswith("- a note\n")


@pytest.mark.slow
def test_a_multirun_ends_with_its_runs_side_by_side(tmp_path):
    arguments = ["method=linear_probe", "clip=none", "visual=pixels", "tracking=none", "shots=2,0", "seed=1,2"]
    command = [sys.executable, "run.py", "-m", *arguments, f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and "s0-seed1-" in done.stdout, done.stderr
    shares = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/metrics.json"))]
    mean = np.mean([(result["after"] or result["before"])["test"]["accuracy"] for result in shares])
    last = next(line for line in reversed(done.stdout.splitlines()) if "linear_probe · digits" in line)
    assert "1, 2" in last and f"{100 * mean:.2f}" in last


def test_it_needs_neither_torch_nor_data(write):
    path = write("a", right=answers(1, 0.5))
    code = f"import sys; from common.report.__main__ import main; main(['compare', {str(path)!r}]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "nothinking" in done.stdout, done.stderr
