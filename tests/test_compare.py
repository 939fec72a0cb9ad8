"""`python -m common.report compare`: groups, statistics against scipy, and folders that hold no result."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from rich.console import Console
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from common.config import composition
from common.evaluation import metrics
from common.report import __main__ as command
from common.report import callback, compare, folders, statistics
from common.run.result import FORMAT
from tests.conftest import REPOSITORY


@pytest.fixture
def write(compose, tmp_path):
    """Write a run folder by its overrides; `right`: of each test image, after training; `before`: before it; `known`:
    of the result, in place of what it would say.
    """

    def make(name, *overrides, right, before=None, remarks=(), **known):
        values = composition.plain(compose(*overrides))
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"signature": composition.signature(values), **values}))
        phases = {"before": right if before is None else before, **({} if before is None else {"after": right})}

        def summary(answers):
            share, bounds = float(np.mean(answers)), metrics.wilson_interval(int(sum(answers)), len(answers))
            return {"n": len(answers), "accuracy": share, "ci95": [*bounds], "per_class": {}, "seconds": 1.0}

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
            **known,
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
    wilson = [proportion_confint(right.sum(), 40, method="wilson") for right in made]
    low, high = min(low, np.mean([each[0] for each in wilson])), max(high, np.mean([each[1] for each in wilson]))
    assert len(rows) == 1 and rows[0]["run"] == "nothinking (run0, run1, run2) · digits · tiny_qwen2_vl · 16 shots"
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


def test_no_interval_leaves_what_can_be(write, capsys):
    """Two seeds that differ much: Student's interval would reach from -100 to 210 %, and their difference beyond 100."""
    shares = {"sft": (0.35, 0.75), "nothinking": (0.9, 0.6)}
    runs = [
        write(f"{method}{seed}", f"method={method}", f"seed={seed}", right=answers(seed, share))
        for method, both in shares.items()
        for seed, share in enumerate(both, 1)
    ]
    rows = compare.build(folders.group(folders.find_runs(runs))).rows
    assert all(str(row).count("0.00 – 100.00") == 1 for row in rows) and len(rows) == 2


def test_the_mean_of_classes_has_a_column_where_classes_are_uneven(write, capsys):
    even = write("even", "method=sft", right=answers(1, 0.5))
    assert "class mean" not in compare.build(folders.group(folders.find_runs([even]))).columns
    summary = {"n": 40, "accuracy": 0.9, "ci95": [0.8, 0.95], "per_class": {}, "seconds": 1.0}
    paths = [
        write(
            f"uneven{seed}", f"seed={seed}", right=answers(1, 0.5), after={"test": {**summary, "accuracy_macro": macro}}
        )
        for seed, macro in ((1, 0.5), (2, 0.7))
    ]
    assert command.main(["compare", "--format", "csv", str(even), *map(str, paths)]) == 0
    assert {row["class mean"] for row in cells(capsys.readouterr().out)[0]} == {"–", "60.00"}


@pytest.mark.slow
def test_what_tells_groups_apart_is_in_their_names(write):
    paths = [
        write("nothinking-digits-1", right=answers(1, 0.5)),
        write("nothinking-digits-2", "trainer.learning_rate=1e-4", right=answers(1, 0.5)),
        write("c", "method=sft", "setting=base_to_new", right=answers(1, 0.5)),
        write("shuffled_rewards-nothinking-digits-few_shot", "shots=4", right=answers(1, 0.5)),
    ]
    names = [group.label for group in folders.group(folders.find_runs(paths))]
    assert names == [
        "nothinking · digits · tiny_qwen2_vl · 16 shots trainer.learning_rate=0.001",
        "nothinking · digits · tiny_qwen2_vl · 16 shots trainer.learning_rate=0.0001",
        "sft (c) · digits · base_to_new · tiny_qwen2_vl · 16 shots",
        "nothinking (shuffled_rewards) · digits · tiny_qwen2_vl · 4 shots",
    ]


@pytest.mark.slow
def test_a_difference_is_of_the_same_images(write, capsys):
    first, second = [answers(s, 0.6) for s in (1, 2)], [answers(s + 10, 0.8) for s in (1, 2)]
    paths = [write(f"a{i}", f"seed={i + 1}", right=right) for i, right in enumerate(first)]
    paths += [write(f"b{i}", f"seed={i + 1}", "method=sft", right=right) for i, right in enumerate(second)]
    assert command.main(["compare", "--format", "csv", "--against", "nothinking", *map(str, paths)]) == 0
    _, by_name = cells(capsys.readouterr().out)
    row = by_name["sft (b0, b1) · digits · tiny_qwen2_vl · 16 shots"]
    changes = [b.astype(int) - a for a, b in zip(first, second, strict=True)]
    assert (
        row["difference"] == f"{100 * np.mean([b.mean() - a.mean() for a, b in zip(first, second, strict=True)]):+.2f}"
    )
    assert float(row["p"]) == pytest.approx(statistics.over_seeds(np.array(changes))[2], rel=0.05)
    low, high = (float(bound) for bound in row["95 % interval of it"].split(" – "))
    assert low < float(row["difference"]) < high


# --- seeds on the same images

KINDS = np.array([-1.0, 0.0, 1.0])


def drawn(generator, pairs, images, correlation, shares, seeds=3):
    """Changes of `pairs` pairs of classifiers; an image has one outcome for all seeds with probability `correlation`."""
    own, common = (
        np.searchsorted(np.cumsum(shares)[:2], generator.random((pairs, each, images), np.float32), "right")
        for each in (seeds, 1)
    )
    return KINDS[np.where(generator.random((pairs, 1, images), np.float32) < correlation, common, own)]


@pytest.mark.sampled
@pytest.mark.parametrize("correlation", [0, 0.5, 0.8, 1])
@pytest.mark.slow
def test_seeds_of_one_image_are_no_independent_tests(correlation):
    """Of 2,000 pairs of equal classifiers few are called different, and of unequal ones the interval holds the truth."""
    generator = np.random.default_rng(3)
    called = [statistics.over_seeds(each)[2] for each in drawn(generator, 2000, 1000, correlation, (0.15, 0.7, 0.15))]
    assert 0.03 <= np.mean(np.array(called) < 0.05) <= 0.065
    held = [statistics.over_seeds(each)[1] for each in drawn(generator, 1000, 1000, correlation, (0.12, 0.68, 0.2))]
    assert 0.93 <= np.mean([low <= 0.08 <= high for low, high in held]) <= 0.98


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("seeds", "spread", "images"),
    [(1, 0.0, 300), (3, 0.0, 200), (3, 0.05, 200), (2, 0.05, 2000), (3, 0.05, 2000), (5, 0.02, 8000)],
)
@pytest.mark.parametrize("correlation", [0, 0.8])
@pytest.mark.slow
def test_seeds_that_differ_are_a_sample_too(seeds, spread, images, correlation):
    """Of 500 pairs of methods, whose difference is 0.08 on average and another one with each seed."""
    generator = np.random.default_rng(2)
    inside = 0
    for shifts in generator.normal(0, spread, (500, seeds)):
        common, changes = generator.random(images), []
        for shift in shifts:
            better, worse = max(0.2 + shift / 2, 0), max(0.12 - shift / 2, 0)
            number = np.where(generator.random(images) < correlation, common, generator.random(images))
            changes.append(KINDS[np.searchsorted([worse, 1 - better], number, "right")])
        _, (low, high), _ = statistics.over_seeds(np.array(changes))
        inside += low <= 0.08 <= high
    assert inside / 500 >= 0.93


def changes_of(seed, images=400):
    return np.random.default_rng(seed).choice(KINDS, images, p=[0.14, 0.7, 0.16])


def test_one_seed_is_the_paired_test_of_a_run():
    one = changes_of(0)
    expected = metrics.paired_test([change < 0 for change in one], [change > 0 for change in one])
    mean, interval, p = statistics.over_seeds(one[None])
    assert mean == pytest.approx(expected["difference"]) and p == expected["p_value"]
    assert interval == pytest.approx(expected["ci95"])


def test_a_seed_that_repeats_another_adds_nothing():
    one = changes_of(0)
    mean, interval, p = statistics.over_seeds(np.array([one] * 3))
    once = statistics.over_seeds(one[None])
    assert mean == pytest.approx(once[0]) and interval == pytest.approx(once[1])
    assert p == pytest.approx(stats.chi2.sf((one.sum() / np.sqrt((one**2).sum())) ** 2, 1), rel=0.2), "McNemar's"


def test_seeds_on_images_of_their_own_are_students():
    """Up to the two images that every seed has more."""
    rows = [{f"{seed}-{i}": int(change) for i, change in enumerate(changes_of(seed, 20_000))} for seed in range(4)]
    table = statistics.aligned(rows)
    assert table.shape == (4, 80_000) and np.isnan(table).sum() == 3 * 80_000
    mean, interval, p = statistics.over_seeds(table)
    means = [np.mean([*row.values()]) for row in rows]
    expected = stats.ttest_1samp(means, 0)
    assert mean == pytest.approx(np.mean(means)) and p == pytest.approx(expected.pvalue, rel=0.02)
    assert interval == pytest.approx(tuple(expected.confidence_interval()), rel=0.02)


def test_seeds_that_are_equal_on_average_alone_are_independent_images():
    """Each has 30 up and 30 down of 300, on images of its own: two sums of 62 squares over 302 images."""
    table = np.zeros((2, 300))
    table[0, :30], table[0, 30:60], table[1, 100:130], table[1, 130:160] = 1, -1, 1, -1
    mean, interval, p = statistics.over_seeds(table)
    half = 1.959964 * np.sqrt(2 * 62 / 302**2 / 4)
    assert (mean, p) == (0, 1) and interval == pytest.approx((-half, half))


def test_seeds_and_images_are_the_two_ways_of_an_analysis_of_variance():
    """The squared standard error is (MS of seeds + MS of images - MS of the rest) / SN; here images count most."""
    common = changes_of(1, 3000)
    table = np.array(
        [np.where(np.random.default_rng(9 + s).random(3000) < 0.9, common, changes_of(s, 3000)) for s in (2, 3, 4)]
    )
    more = np.hstack([table, np.ones((3, 1)), -np.ones((3, 1))])
    seeds, images = more.mean(1, keepdims=True), more.mean(0, keepdims=True)
    of_seeds = 3002 * ((seeds - more.mean()) ** 2).sum() / 2
    of_images = 3 * ((images - more.mean()) ** 2).sum() / 3001
    rest = ((more - seeds - images + more.mean()) ** 2).sum() / (2 * 3001)
    error = np.sqrt((of_seeds + of_images - rest) / (3 * 3002))
    freedom = (of_seeds + of_images - rest) ** 2 / (of_seeds**2 / 2)
    _, (low, high), p = statistics.over_seeds(table)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, freedom) * error, rel=1e-3)
    assert p == pytest.approx(2 * stats.t.sf(abs(more.mean()) / error, freedom), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("second", "spread"), [((9, 7), False), ((10, 6), True), ((16, 0), True)])
def test_on_other_images_two_seeds_are_as_many_images_as_one_has(write, second, spread):
    """30 and 26 of 40 against 9 and 7 of 20 are 28 of 40 against 8 of 20, as the images say, and never surer than the
    two seeds' differences are: 30 and 30 points, 25 and 35, or -5 and 65, of which no more than 100 points follow.
    """
    rights = {("nothinking", 40): (30, 26), ("sft", 20): second}
    paths = [
        write(f"{method}{seed}", f"method={method}", f"seed={seed}", right=np.arange(images) < both[seed - 1])
        for (method, images), both in rights.items()
        for seed in (1, 2)
    ]
    found = statistics.compare_groups(*folders.group(folders.find_runs(paths)), "test")
    newcombe = confint_proportions_2indep(28, 40, 8, 20, method="newcomb", compare="diff")
    apart = [30 / 40 - second[0] / 20, 26 / 40 - second[1] / 20]
    student = np.clip(stats.t.interval(0.95, 1, loc=0.3, scale=stats.sem(apart)), -1, 1)
    assert found.p is None and found.difference == pytest.approx(0.3)
    assert found.interval == pytest.approx(student if spread else newcombe)


def test_on_other_images_the_difference_has_newcombes_interval(write, capsys):
    """28 of 40 against 8 of 20."""
    few = write("few", right=np.arange(40) < 28)
    many = write("many", "method=sft", right=np.arange(20) < 8)
    assert command.main(["compare", "--format", "csv", "--against", "sft", str(few), str(many)]) == 0
    _, by_name = cells(capsys.readouterr().out)
    row = by_name["nothinking (few) · digits · tiny_qwen2_vl · 16 shots"]
    low, high = confint_proportions_2indep(28, 40, 8, 20, method="newcomb", compare="diff")
    assert (row["difference"], row["p"]) == ("+30.00", "other images")
    assert row["95 % interval of it"] == f"{100 * low:+.2f} – {100 * high:+.2f}"


def test_other_tasks_are_not_compared(write, capsys):
    """Their accuracies differ for reasons of their own."""
    paths = [write("a", right=answers(1, 0.5)), write("b", "data=fashion", "method=sft", right=answers(1, 0.9, 50))]
    assert command.main(["compare", "--format", "csv", "--against", "nothinking", *map(str, paths)]) == 0
    assert {row["difference"] for row in cells(capsys.readouterr().out)[0]} == {""}


@pytest.mark.slow
@pytest.mark.parametrize("other", ["data=fashion", "data.folder=tulips"])
def test_images_of_other_datasets_are_others_though_their_names_are_the_same(write, other):
    common = ("method=linear_probe", "clip=none", "data=folder", "data.folder=garden")
    one, two = write("a", *common, right=answers(1, 0.5)), write("b", *common, other, right=answers(2, 0.9))
    assert statistics.compare_groups(*folders.group(folders.find_runs([one, two])), "test") is None
    moved = write("c", *common, "data.folder=/elsewhere/garden", right=answers(2, 0.9))
    assert statistics.compare_groups(*folders.group(folders.find_runs([one, moved])), "test").p is not None


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
    assert "sft (lone) · digits · tiny_qwen2_vl · 16 shots: no run of seed 2, 3, 4" in shown
    assert "50" in shown and " †" in shown and "†: test-selected" in shown


def test_a_seed_that_was_run_twice_is_no_second_seed(write, capsys):
    """The folders of one configuration, three seeds, and the first seed once more."""
    names = ["nothinking-digits-1", "nothinking-digits-2", "nothinking-digits-3", "nothinking-digits-again"]
    paths = [
        write(name, f"seed={seed}", right=answers(seed, 0.7)) for name, seed in zip(names, (1, 2, 3, 1), strict=True)
    ]
    assert command.main(["compare", "--format", "csv", *map(str, paths)]) == 0
    first, again = cells(capsys.readouterr().out)[0]
    assert (first["seeds"], again["seeds"], again["± std"]) == ("1, 2, 3", "1", "–")
    assert again["95 % interval"].endswith("(of images)")
    assert str(paths[0]) in first["run"] and again["run"].endswith(f"in {paths[3]}")
    (note,) = [line for line in compare.build(folders.group(folders.find_runs(paths))).notes if "times" in line]
    assert note.startswith("seed 1 was run 2 times") and note.endswith(f"{paths[0]}, {paths[3]}")


def test_a_folder_that_is_given_twice_is_one_run(write, tmp_path):
    path = write("a", right=answers(1, 0.5))
    (tmp_path / "link").symlink_to(path)
    assert [run.path for run in folders.find_runs([path, path, tmp_path / "link"])] == [path]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "shown"),
    [
        ("data.folder=tulips", ["folder (garden)", "folder (tulips)"]),
        ("data.folder=old/garden", ["folder (new/garden)", "folder (old/garden)"]),
        ("data.folder=new/garden", ["folder (garden)", "folder (garden)"]),
    ],
)
def test_own_photos_are_called_by_their_folder(write, second, shown):
    """Over shots, too, where nothing else tells two sets apart."""
    common = ("method=linear_probe", "clip=none", "data=folder")
    paths = [
        write("linear_probe-folder-a", *common, "data.folder=new/garden", "shots=4", right=answers(1, 0.5)),
        write("linear_probe-folder-b", *common, second, "shots=8", right=answers(1, 0.5)),
    ]
    found = [each.label.split(" · ") for each in folders.group(folders.find_runs(paths))]
    assert [label[1] for label in found] == shown and [label[-1] for label in found] == ["4 shots", "8 shots"]


def test_what_manifest_true_wrote_is_no_foreign_folder(write, tmp_path, capsys):
    done, asked = write("a", right=answers(1, 0.5)), tmp_path / "asked"
    asked.mkdir()
    (asked / "manifest.json").write_text(json.dumps({"hash": "0", "splits": {}, "fingerprint": {}}))
    assert command.main(["compare", "--format", "markdown", str(done), str(asked)]) == 0
    shown = capsys.readouterr().out
    assert f"{asked}: asked, manifest=true showed its questions" in shown and "foreign" not in shown


@pytest.mark.parametrize("against", ["unknown", "digits"])
def test_a_baseline_is_one_row(write, capsys, against):
    paths = [write("a", right=answers(1, 0.5)), write("b", "method=sft", right=answers(1, 0.5))]
    assert command.main(["compare", "--against", against, *map(str, paths)]) == 2
    assert "must be a part of one row's name alone" in capsys.readouterr().err


def test_a_baseline_may_be_named_by_its_folder(write, capsys):
    """birds is a part of birds_2, too."""
    paths = [
        write("birds", "run_name=birds", right=answers(1, 0.5)),
        write("birds_2", "run_name=birds_2", "shots=4", right=answers(1, 0.5)),
    ]
    assert command.main(["compare", "--format", "csv", "--against", "birds", *map(str, paths)]) == 0
    assert "difference" in capsys.readouterr().out


def test_latex_and_markdown_carry_hostile_names():
    table = compare.Table(("run", "split", "accuracy"), [("a_b & 50 % |x|", "test", "1.00 ± 2")], ["a note"])
    latex, markdown = compare.render(table, "latex"), compare.render(table, "markdown")
    assert r"a\_b \& 50 \% |x| & test & 1.00 $\pm$ 2 \\" in latex and r"\begin{tabular}{llr}" in latex
    assert r"| a_b & 50 % \|x\| | test | 1.00 ± 2 |" in markdown and markdown.endswith("- a note\n")


@pytest.mark.faults
def test_a_multirun_ends_with_its_runs_side_by_side(tmp_path):
    arguments = ["method=linear_probe", "clip=none", "visual=pixels", "tracking=none", "shots=2,0", "seed=1,2"]
    arguments += ["setting.test_per_class=5"]
    command = [sys.executable, "run.py", "-m", *arguments, f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and "s0-seed1-" in done.stdout, done.stderr
    shares = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/metrics.json"))]
    mean = np.mean([(result["after"] or result["before"])["test"]["accuracy"] for result in shares])
    last = next(line for line in reversed(done.stdout.splitlines()) if "linear_probe · digits" in line)
    assert "1, 2" in last and f"{100 * mean:.2f}" in last


def test_jobs_in_other_processes_are_in_the_table_too(write, tmp_path, capsys):
    """joblib and SLURM run them with copies of what Hydra calls."""
    paths = [write(f"nothinking-digits-{seed}", f"seed={seed}", right=answers(seed, 0.5)) for seed in (1, 2)]
    ours = callback.Comparison()
    ours.on_multirun_start(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": {}}}))
    statuses = (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.COMPLETED)
    for number, (path, status) in enumerate(zip([paths[0], tmp_path / "failed", paths[1]], statuses, strict=True)):
        job = {"runtime": {"output_dir": str(path)}, "job": {"num": number}}
        theirs = pickle.loads(pickle.dumps(ours))
        theirs.on_job_end(OmegaConf.create({"hydra": job}), JobReturn(status=status))
    ours.show()
    said = capsys.readouterr().out
    assert "1, 2" in said and "nothinking · digits" in said and "failed: failed" in said
    assert not list(tmp_path.glob(".multirun*")), "notes are read once"
    ours.show()
    assert capsys.readouterr().out == ""


def test_it_needs_neither_torch_nor_data(write):
    path = write("a", right=answers(1, 0.5))
    code = f"import sys; from common.report.__main__ import main; main(['compare', {str(path)!r}]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "nothinking" in done.stdout, done.stderr


@pytest.mark.parametrize(("width", "gone"), [(80, ["seconds", "official", "images", "before", "± std"]), (200, [])])
def test_a_narrow_terminal_leaves_out_what_matters_least(monkeypatch, capsys, width, gone):
    monkeypatch.setattr(compare, "Console", lambda **_: Console(width=width))
    columns = [name for name in compare.COLUMNS if name != compare.MACRO]
    row = ["alert · digits · 16 shots", "test", "1, 2, 3", "1637", "88.5", "0.3", "86.8 – 89.9", "58.5", "88.5", "104"]
    compare.show_table(compare.Table(columns, [row], ["a note"]))
    said = capsys.readouterr().out
    head, *_ = [line for line in said.splitlines() if "accuracy" in line]
    assert "88.5" in said and "86.8 – 89.9" in said and "alert · digits · 16 shots" in said, (
        "nothing is broken over lines"
    )
    assert [name for name in columns if name in head] == [name for name in columns if name not in gone]
    assert ("left out for the width of this terminal" in said) == bool(gone)
