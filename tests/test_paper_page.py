"""A paper's page from run folders: numbers, differences, averages, H, verdicts. Expected values are worked out by hand."""

from __future__ import annotations

import csv
import math
from types import SimpleNamespace

import pytest

from common.evaluation.metrics import wilson_interval
from common.report import __main__ as command
from common.report import folders
from common.report.paper import cells, page, pictures, results, tables
from common.report.paper.cells import Cell
from common.types import UserError
from tests.test_compare import write  # noqa: F401

ROWS = {"kind": "table", "rows": ["method"], "columns": ["data"], "average": "data", "published": "clsrl_table2"}


@pytest.fixture
def sweep(tmp_path, write):  # noqa: F811
    """A sweep's folder over runs given as (method, data, seed, right, ...)."""

    def make(runs, spec=ROWS, given=None, chosen=None, overrides=(), **options):
        shown = []
        for method, data, seed, right in runs:
            name = f"{method}-{data}-{seed}"
            if right is not None:
                own = (f"method={method}", f"data={data}", f"seed={seed}", "shots=4", *overrides)
                write(name, *own, right=right, **options)
            shown.append(results.SweepRun(name, seed, {"method": method, "data": data}))
        results.Sweep("clsrl_table2", dict(spec), given or {}, shown, chosen or {}).save(tmp_path / "page")
        return tmp_path / "page"

    return make


def share(right, n=20):
    return [True] * right + [False] * (n - right)


def entry(found, **keys):
    (one,) = [e for e in found.entries if e.keys == {key: str(value) for key, value in keys.items()}]
    return one


@pytest.mark.slow
def test_mean_spread_and_verdict_over_seeds(sweep):
    """75, 85, 80 %: mean 80, s = 5, t(0.975, 2) = 4.303: 80 ± 12.42, and the paper's EuroSAT number is 75.16."""
    rights = ((1, 150), (2, 170), (3, 160))  # of 200 images, which leave less open
    folder = sweep([("sft", "eurosat", seed, share(right, 200)) for seed, right in rights])
    one = entry(page.build(folder), method="sft", data="eurosat")
    assert one.ours == pytest.approx(80) and one.std == pytest.approx(5)
    assert one.interval == pytest.approx((80 - 12.421, 80 + 12.421), abs=1e-3)
    assert (one.published, one.seeds) == (75.16, (1, 2, 3)) and one.difference == pytest.approx(4.84)
    assert one.verdict == "not comparable: 200 of 8100 test images"


def cell_of(values, half=None, **known):
    """Half: of the images' interval."""
    return Cell(
        dict(values), 8100, {} if half is None else {s: (v - half, v + half) for s, v in values.items()}, **known
    )


def verdict(cell, published):
    return page._entry((), cell, published, []).verdict


def test_no_interval_leaves_what_an_accuracy_can_be():
    """Two seeds: 80 ± 12.71 x 14.14 / 1.41, so -47 to 207 %; a difference may be below 0."""
    measured = cell_of({1: 90.0, 2: 70.0}, 1.0)
    assert page._entry((), measured, None, []).interval == (0.0, 100.0)
    measured.images = None  # computed from others
    assert page._entry((), measured, None, []).interval == pytest.approx((80 - 127.062, 80 + 127.062), abs=1e-3)


def test_seeds_that_agree_leave_the_images_a_sample():
    """CLIP without training has no seeds: 60.32 % of 50,000 images, whose interval is ± 0.43, and the paper's 60.33."""
    zero_shot = cell_of({1: 60.32, 2: 60.32, 3: 60.32}, 0.43)
    assert page._entry((), zero_shot, 60.33, []).interval == pytest.approx((59.89, 60.75))
    assert [verdict(zero_shot, published) for published in (60.33, 59.8, 60.8)] == ["inside", "above", "below"]
    assert verdict(cell_of({1: 60.32}, 0.43), 60.33) == "inside"
    spread = page._entry((), cell_of({1: 60.0, 2: 62.0, 3: 64.0}, 0.43), 60.0, []).interval
    assert spread == pytest.approx((62 - 4.9683, 62 + 4.9683), abs=1e-3), "Student's, where seeds differ more"


def test_what_is_computed_from_several_numbers_has_their_images_interval():
    def keys(**named):
        return tuple(sorted(named.items()))

    table = {
        keys(data=data, method=method, split="x"): cell_of({1: value, 2: value}, half)
        for data, value, half in (("a", 60.0, 3.0), ("b", 80.0, 4.0))
        for method in ("zeroshot", "sft")
    }
    mean = cells.averages(table, "data")[keys(data="average", method="sft", split="x")]
    assert mean.values == {1: 70, 2: 70} and mean.intervals[2] == pytest.approx((67.5, 72.5)), "sqrt(9 + 16) / 2"
    less = cells.subtract(table, {"method": "zeroshot"})[keys(data="a", method="sft", split="x")]
    assert less.intervals[1] == pytest.approx((-3 * 2**0.5, 3 * 2**0.5))
    halves = {keys(split="base"): cell_of({1: 60.0}, 3.0), keys(split="new"): cell_of({1: 40.0}, 4.0)}
    both = cells.harmonic(halves)[keys(split="H")]  # slopes 2 (40/100)^2 and 2 (60/100)^2
    reach = math.hypot(0.32 * 3, 0.72 * 4)
    assert both.values == {1: pytest.approx(48)} and both.intervals[1] == pytest.approx((48 - reach, 48 + reach))


def test_an_interval_that_holds_nearly_everything_is_no_agreement():
    """50 and 70: 60 ± 12.706 · 14.142 / sqrt 2, hence anything from 0 to 100."""
    two = page._entry((), cell_of({1: 50.0, 2: 70.0}, 1.0), 75.16, [])
    assert two.interval == (0.0, 100.0) and two.verdict == "too wide to say"
    assert verdict(cell_of({1: 75.0, 2: 75.2}, 0.9), 75.16) == "inside", "two seeds that agree"
    assert verdict(cell_of({1: 75.0, 2: 75.2}, 0.9), 90.0) == "below"
    minutes = cell_of({1: 90.0, 2: 91.0, 3: 92.0}, percent=False)
    assert (verdict(minutes, 92.0), verdict(minutes, 94.0)) == ("inside", "below")
    assert verdict(cell_of({1: 60.0, 2: 90.0, 3: 120.0}, percent=False), 94.0) == "too wide to say"


@pytest.mark.parametrize("published", [60.33, 90.0])
def test_a_planned_seed_without_a_result_leaves_the_verdict_open(published):
    part = cell_of({1: 60.32}, 0.43, missing=[2, 3])
    assert verdict(part, published) == "incomplete: no result of seed 2, 3"


def test_a_verdict_that_needs_an_interval_says_why_there_is_none():
    lowest = Cell({1: 66.0, 2: 67.0, 3: 65.0}, combine=min)
    assert verdict(lowest, 65.8) == "no interval: an extreme of the seeds is no mean"
    assert verdict(cell_of({1: 94.0}, percent=False), 94.0) == "no interval: one seed"


def reasons_of(path, split="test"):
    run = folders.read_run(path)
    return cells.reasons(run, run.result, split, run.result.final[split])


CAFO = ("method=cafo", "data=dtd", "clip=rn50", "visual=dino_rn50")
SENTENCES, PICTURES = "clip.prompts=cupl.json", "few_shot.generated=dalle"


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("given", "reasons"),
    [
        ((), ["CaFo without generated pictures and sentences"]),
        ((SENTENCES,), ["CaFo without generated pictures"]),
        ((PICTURES,), ["CaFo without sentences"]),
        ((SENTENCES, PICTURES, "few_shot.per_class=0"), ["CaFo without generated pictures"]),
        ((SENTENCES, PICTURES), []),
        ((SENTENCES, PICTURES, "selection=paper"), []),
    ],
)
def test_cafos_number_is_of_cafo_with_all_that_its_authors_give_it(write, given, reasons):  # noqa: F811
    whole = [True] * 1692
    assert reasons_of(write("run", *CAFO, *given, right=whole)) == reasons


def test_other_learners_numbers_are_without_sentences(write):  # noqa: F811
    path = write("run", "method=tip_adapter_f", "data=dtd", "clip=rn50", SENTENCES, right=[True] * 1692)
    assert reasons_of(path) == ["sentences of clip.prompts, which the published number has not"]


def marks_of(path):
    run = folders.read_run(path)
    return cells.marks(run, run.result, run.result.final["test"])


@pytest.mark.slow
def test_candidates_of_less_than_cafo_are_marked(write):  # noqa: F811
    draft = write("cafo", *CAFO, SENTENCES, right=[True])
    moved = "method.draft_file=/elsewhere/cafo"
    alert = ("method=alert", "model=tiny_gemma3", "data=dtd", "method.draft=file")
    path = write("alert", *alert, moved, right=[True])
    assert marks_of(path) == ["over candidates of CaFo without generated pictures"]
    assert marks_of(draft) == ["chosen by validation images; the published number by the test images"]
    both = write("both", *CAFO, SENTENCES, PICTURES, "selection=paper", right=[True])
    assert marks_of(both) == []
    assert marks_of(write("over", *alert, f"method.draft_file={both}", right=[True])) == []


@pytest.mark.parametrize(("rollout", "marks"), [("hf", []), ("vllm", ["vLLM"])])
def test_another_sampler_is_marked(write, rollout, marks):  # noqa: F811
    path = write("run", "method=clsrl", "data=dtd", f"rollout={rollout}", right=[True])
    assert [tables.short(mark) for mark in marks_of(path)] == marks


@pytest.mark.parametrize(("halves", "reasons"), [((900, 792), []), ((900, 700), ["1600 of 1692 test images"])])
def test_both_halves_of_the_classes_have_all_test_images(write, halves, reasons):  # noqa: F811
    """DTD has 1,692."""
    summary = {"accuracy": 0.5, "ci95": [0.4, 0.6], "per_class": {}, "seconds": 1.0}
    before = {name: {"n": n, **summary} for name, n in zip(("base", "new"), halves, strict=True)}
    path = write("run", "method=clsrl", "data=dtd", "setting=base_to_new", right=[True], before=[True], after=before)
    assert [reasons_of(path, split) for split in ("base", "new")] == [reasons, reasons]


def test_a_seed_of_two_runs_is_judged_by_neither(write, tmp_path):  # noqa: F811
    shown = []
    for name, rate, right in (("a", "1e-3", 5), ("b", "1e-4", 15)):
        write(name, "method=sft", "data=dtd", f"trainer.learning_rate={rate}", right=share(right))
        shown.append(results.SweepRun(name, 1, {"method": "sft", "data": "dtd"}))
    results.Sweep("clsrl_table2", dict(ROWS), {}, shown).save(tmp_path / "page")
    one = entry(page.build(tmp_path / "page"), method="sft", data="dtd")
    assert one.ours == 25 and "seed 1 is there twice: a and b" in one.reasons


@pytest.mark.slow
def test_a_page_is_drawn_anew_with_its_numbers(sweep):
    folder = sweep([("sft", "eurosat", 1, share(15))])
    assert command.main(["html", str(folder)]) == 0
    first = (folder / "figure.svg").read_text()
    (folder / "figure.svg").write_text("old")
    assert command.main(["html", str(folder)]) == 0
    assert (folder / "figure.svg").read_text()[:200] == first[:200] and "<svg" in (folder / "report.html").read_text()


def test_a_curve_of_accuracies_is_of_one_split():
    """The validation images are watched; the test images are measured at both ends."""
    log = [
        {"step": 0, "eval/test/accuracy": 0.6, "eval/val/accuracy": 0.7},
        {"step": 10, "loss": 1.0, "reward": 0.5},
        {"step": 10, "eval/val/accuracy": 0.85},
        {"step": 20, "eval/test/accuracy": 0.66, "eval/val/accuracy": 0.8},
    ]
    assert pictures.series(log, "test_accuracy") == pytest.approx({0: 70, 10: 85, 20: 80})
    assert pictures.series(log, "reward") == {10: 0.5}
    assert pictures.series([line for line in log if "eval/test/accuracy" in line], "test_accuracy").keys() == {0, 20}
    del log[2]
    assert pictures.series(log, "test_accuracy") == pytest.approx({0: 70, 20: 80}), (
        "validation images if both are there"
    )


def test_a_verdict_is_given_on_the_papers_images_alone():
    ours = page.TableCell({}, 77.0, 1.0, (74.5, 79.5), (1, 2, 3), 8100, 75.16, (), (), ())
    assert ours.verdict == "inside"
    assert page.TableCell({}, 80.0, 0.1, (79.7, 80.3), (1, 2, 3), 8100, 75.16, (), (), ()).verdict == "above"
    assert page.TableCell({}, 70.0, 0.1, (69.7, 70.3), (1, 2, 3), 8100, 75.16, (), (), ()).verdict == "below"


def test_a_missing_seed_is_named_and_the_rest_is_quoted(sweep):
    folder = sweep([("sft", "eurosat", 1, share(15)), ("sft", "eurosat", 2, None)])
    found = page.build(folder)
    one = entry(found, method="sft", data="eurosat")
    assert one.seeds == (1,) and one.missing == (2,) and one.std is None
    low, high = wilson_interval(15, 20)
    assert one.interval == pytest.approx((100 * low, 100 * high)), "of the images"
    assert entry(found, method="clsrl", data="dtd").verdict == "quoted"
    assert any("sft-eurosat-2: not run" in line for line in tables.notes(found))


def test_a_missing_seed_is_named_where_splits_are_columns_too(sweep):
    spec = {"rows": ["method"], "columns": ["data", "measure"], "measures": ["accuracy"]}
    folder = sweep([("sft", "eurosat", 1, share(15)), ("sft", "eurosat", 2, None), ("clsrl", "dtd", 1, None)], spec)
    (one,) = page.build(folder).entries
    assert (one.keys["measure"], one.seeds, one.missing) == ("accuracy", (1,), (2,))
    assert [run.path.name for run in page.build(folder).unfinished] == ["sft-eurosat-2", "clsrl-dtd-1"]


def test_averages_come_last_on_every_axis_and_names_that_end_like_them_do_not():
    shown = [
        page.TableCell({"d": d, "s": s}, 1.0, None, None, (1,), 1, None, (), (), ())
        for d in ("average", "ETH", "a")
        for s in ("H", "base")
    ]
    found = page.Page(results.Sweep("x", {"rows": ["d"], "columns": ["s"]}, {}, []), shown, "")
    assert found.axis("rows") == ["ETH", "a", "average"] and found.axis("columns") == ["base", "H"]


@pytest.mark.slow
def test_an_average_is_over_all_datasets_and_only_of_seeds_that_have_them(sweep):
    runs = [("sft", "eurosat", 1, share(10)), ("sft", "dtd", 1, share(16)), ("sft", "eurosat", 2, share(12))]
    runs.append(("sft", "dtd", 2, None))
    found = page.build(sweep(runs, given={"data": "eurosat,dtd"}))
    mean = entry(found, method="sft", data="average")
    assert mean.ours == pytest.approx(65) and mean.seeds == (1,)
    assert mean.published is None, "the paper's is over eleven"
    assert mean.missing == (2,)
    assert not any(e.verdict == "quoted" for e in found.entries), "another choice of data is not the paper's table"


@pytest.mark.parametrize("split", [False, True])
def test_an_average_over_a_part_of_the_datasets_is_none(sweep, split):
    """Also where a dataset has no result at all, and so no line of its own when splits are columns."""
    spec = {"rows": ["method"], "columns": ["data", *["split"] * split], "average": "data"}
    runs = [("sft", "eurosat", 1, share(10)), ("sft", "dtd", 1, None), ("clsrl", "eurosat", 1, share(16))]
    found = page.build(sweep(runs, spec))
    means = [each.ours for each in found.entries if each.keys["data"] == "average"]
    assert len(means) == 2 and set(means) == {None}


def test_what_the_command_line_changed_stands_in_the_way_of_a_verdict(sweep):
    folder = sweep([("sft", "eurosat", 1, share(15))], given={"model": "tiny_qwen2_vl"})
    assert entry(page.build(folder), method="sft", data="eurosat").verdict.startswith(
        "not comparable: model=tiny_qwen2_vl"
    )


def test_a_choice_among_the_papers_runs_is_compared_and_quotes_nothing_else(sweep):
    folder = sweep([("sft", "eurosat", 1, share(15))], chosen={"data": "eurosat"})
    found = page.build(folder)
    assert [e.published for e in found.entries] == [75.16, None], "no other dataset, and no average over eleven"
    one = entry(found, method="sft", data="eurosat")
    assert one.published == 75.16 and one.verdict == "not comparable: 20 of 8100 test images"
    assert "of the paper's runs: data=eurosat" in tables.notes(found)


@pytest.mark.parametrize(
    ("protocol", "images", "reasons"),
    [
        ("clean", 8100, []),
        ("official", 13500, []),  # its scripts test the 5,400 validation images as well
        ("official", 8100, []),
        ("clean", 13500, ["13500 of 8100 test images"]),
    ],
)
def test_images_are_counted_by_the_protocol(protocol, images, reasons):
    eurosat = {"published": {"train": 13500, "val": 5400, "test": 8100}}
    run = SimpleNamespace(values={"data": eurosat, "setting": {"targets": {}}, "method": {}})
    result = SimpleNamespace(left_out=0, protocol=protocol, final={})
    assert cells.reasons(run, result, "test", SimpleNamespace(n=images)) == reasons


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("gpus", "device", "reasons"),
    [
        (8, "NVIDIA A100-SXM4-80GB", []),
        (8, "NVIDIA A100-PCIE-40GB", []),
        (8, "NVIDIA H100 80GB HBM3", ["timed on NVIDIA H100 80GB HBM3 instead of A100"]),
        (8, "", ["timed on an unknown GPU instead of A100"]),
        (1, "NVIDIA A100-SXM4-80GB", ["timed on 1 GPU instead of 8"]),
        (0, "CPU", ["timed on no GPUs instead of 8"]),
    ],
)
def test_times_of_other_machines_are_not_the_papers(write, gpus, device, reasons):  # noqa: F811
    path = write("run", f"gpus={gpus}", right=[True], before=[True], device=device, train={"seconds": {"total": 120.0}})
    run = folders.read_run(path)
    (number,) = cells._train_minutes(run, run.result, "test", run.result.final["test"])
    assert (number.value, number.reasons) == (2.0, reasons)


def test_differences_are_taken_seed_by_seed():
    def keys(**named):
        return tuple(sorted(named.items()))

    zero = Cell({1: 50.0, 2: 52.0}, missing=[3])
    found = cells.subtract(
        {
            keys(method="zeroshot", data="a", split="a"): zero,
            keys(method="clsrl", data="a", split="a"): Cell({1: 60.0, 2: 64.0, 3: 70.0}),
            keys(method="clsrl", data="b", split="a"): Cell({1: 40.0}),
        },
        {"method": "zeroshot", "data": None},
    )
    assert [cell.values for cell in found.values()] == [{1: 10.0, 2: 12.0}, {1: -10.0}]
    assert found[keys(method="clsrl", data="a", split="a")].missing == [3]


def test_h_of_averages_is_the_fields():
    def keys(**named):
        return tuple(sorted(named.items()))

    base = {"a": (80.0, 60.0), "b": (60.0, 40.0)}
    table = {
        keys(data=d, split=s): Cell({1: v})
        for d, both in base.items()
        for s, v in zip(("base", "new"), both, strict=True)
    }
    table |= cells.averages(table, "data")
    found = cells.harmonic(table)
    assert found[keys(data="a", split="H")].values[1] == pytest.approx(2 * 80 * 60 / 140)
    assert found[keys(data="average", split="H")].values[1] == pytest.approx(2 * 70 * 50 / 120), (
        "not the mean of both H"
    )


@pytest.mark.slow
def test_ranges_over_seeds_and_evaluations(sweep):
    spec = {"rows": ["method"], "columns": ["data", "measure"], "measures": ["accuracy", "lowest", "highest"]}
    folder = sweep([("nothinking", "digits", 1, share(10)), ("nothinking", "digits", 2, share(12))], spec)
    for seed, low, high in ((1, 0.3, 0.6), (2, 0.4, 0.7)):
        lines = ['{"step": 1, "epoch": 0.4}', '{"step": 1, "eval/val/accuracy": 0.1}', '{"step": 2, "epoch": 0.9}']
        lines += [
            f'{{"step": 2, "eval/val/accuracy": {low}}}',
            '{"step": 3, "epoch": 1.2}',
            f'{{"step": 3, "eval/val/accuracy": {high}}}',
        ]
        (folder.parent / f"nothinking-digits-{seed}" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = {e.keys["measure"]: e.ours for e in page.build(folder).entries}
    assert found == pytest.approx({"accuracy": 55, "lowest": 30, "highest": 70})


def test_minutes_of_training_are_those_of_the_updates(sweep):
    spec = {"rows": ["method"], "columns": ["data", "measure"], "measures": ["train_minutes", "image_ms"]}
    folder = sweep([("sft", "digits", 1, share(10))], spec, before=share(5))
    run = folder.parent / "sft-digits-1" / "metrics.json"
    text = run.read_text().replace('"saving": 2.0', '"saving": 2.0, "other": 6.0, "total": 240.0')
    run.write_text(text)
    found = {e.keys["measure"]: e.ours for e in page.build(folder).entries}
    assert found["train_minutes"] == pytest.approx((240 - 100 - 2) / 60), "without model and saving"
    assert found["image_ms"] == pytest.approx(1000 * 1.0 / 20)


def test_remarks_become_marks(sweep):
    folder = sweep([("sft", "eurosat", 1, share(15))], remarks=["selected on the test images"])
    found = page.build(folder)
    assert entry(found, method="sft", data="eurosat").marks == ("selected on the test images",)
    assert next(row[-1] for row in tables.listing(found).rows if row[1] == "sft" or row[0] == "sft") == "test-selected"
    ((_, table),) = tables.matrices(found)
    assert any("75.00†" in cell for row in table.rows for cell in row)


@pytest.mark.slow
def test_the_command_writes_tables_and_pictures(sweep, capsys):
    folder = sweep([("sft", "eurosat", 1, share(15)), ("sft", "eurosat", 2, None)])
    assert command.main(["paper", str(folder)]) == 1, "a run is missing"
    said = capsys.readouterr().out
    assert "75.00 (75.16)" in said and "sft-eurosat-2: not run" in said
    rows = list(csv.DictReader((folder / "table.csv").open()))
    (row,) = [row for row in rows if row["ours"] and row["data"] == "eurosat"]
    assert float(row["ours"]) == 75 and math.isclose(float(row["difference"]), -0.16)
    for name in ("table.md", "table.tex", "figure.png", "figure.svg", "figure.pdf"):
        assert (folder / name).stat().st_size > 300, name
    assert r"\toprule" in (folder / "table.tex").read_text()


def test_a_folder_that_is_no_sweeps(tmp_path, capsys):
    assert command.main(["paper", str(tmp_path)]) == 2
    assert f"{tmp_path} is no sweep's folder: there is no points.json" in capsys.readouterr().err
    (tmp_path / "points.json").write_text("{")
    with pytest.raises(UserError, match=r"points\.json is damaged"):
        results.load_sweep(tmp_path)


def test_a_sweeps_own_folder_is_no_run(sweep):
    folder = sweep([("sft", "eurosat", 1, share(15))])
    assert [run.path.name for run in folders.find_runs(sorted(folder.parent.iterdir()))] == ["sft-eurosat-1"]
