"""sweeps/: every point of every table and figure is a run, points share what they need, finished ones are left out."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import ConfigCompositionException

from common.config import composition
from common.config.command_line import of_each_run
from common.report.paper import page, pictures
from common.report.paper import results as results_module
from common.report.paper.results import load_sweep as points_of
from common.sweep import plan, plugin
from common.sweep.plan import Point, Spec, expand
from common.sweep.sweeper import Job, PaperSweeper
from common.types import UserError
from tests.conftest import REPOSITORY

ALL = sorted(path.stem for path in (REPOSITORY / "sweeps").glob("*.yaml"))
SWEEPS = [name for name in ALL if not name.startswith("mini_")]
TABLES = [f"alert_table{n}" for n in range(1, 7)] + [f"clsrl_table{n}" for n in range(1, 5)]
FIGURES = [f"alert_fig{n}" for n in (3, 4, 5)] + [f"clsrl_fig{n}" for n in range(1, 6)]
OWN = [name for name in SWEEPS if name not in ("alert_fig3", "alert_fig4")]  # these two have the rows of table 1
LATER = ["clsrl_thinking", "few_shot_averages", "refine_rft"]  # of later papers
MIXED = ("alert_table5", "clsrl_fig4", "clsrl_table1")  # needs, labels, panels
PAPERS = REPOSITORY.parent / "shared" / "papers"
papers = pytest.mark.skipif(not PAPERS.is_dir(), reason="the papers' numbers are not beside the checkout")


def jobs(name, *arguments):
    """The points of a sweep, composed as `run.py` does."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    composition.register()
    GlobalHydra.instance().clear()
    path = create_config_search_path(str(REPOSITORY / "conf"))
    path.prepend("command-line", f"file://{REPOSITORY / 'sweeps'}", anchor="schema")
    hydra = Hydra.create_main_hydra2("run", path)
    try:
        plugin.register(PaperSweeper)
        cfg = hydra.compose_config(name, list(arguments), RunMode.MULTIRUN, with_log_configuration=False)
        made = Plugins.instance().instantiate_sweeper(
            hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=None),
            task_function=lambda cfg: None,
            config=cfg,
        )
        plugin.unregister(PaperSweeper)
        chapters = made.chapters()
        found, shown = made.jobs(chapters, made.given(cfg.hydra.overrides.task))
        return found, shown[0] if len(chapters) == 1 else shown, made
    finally:
        GlobalHydra.instance().clear()


def test_every_table_and_figure_of_both_papers_has_a_sweep():
    assert sorted(TABLES + FIGURES + LATER) == SWEEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in MIXED else pytest.param(name, marks=pytest.mark.faults) for name in OWN]
)
def test_every_kind_of_point_composes_and_runs_after_what_it_needs(name):
    """On one dataset; `test_all_points_compose` takes them all."""
    data = "imagenet" if name in ("alert_table2",) else "dtd"
    found, shown, sweeper = jobs(name, f"data={data}", "seed=1")
    folders = [job.folder for job in found]
    assert len(set(folders)) == len(folders), "no run twice"
    for job in found:
        assert all(folders.index(needed) < folders.index(job.folder) for needed in job.needs)
        assert "{" not in "".join(job.overrides.values())
    assert shown and all(each.seed == 1 for each in shown)
    assert {each.folder for each in shown} <= {folder.name for folder in folders}
    page = sweeper.chapters()[0].page
    own = {*page["rows"], *page["columns"], *page.get("panels", ()), *page.get("minus", ())} - {"split", "measure"}
    assert all(each.keys.keys() == own for each in shown), "every point has its place"


@pytest.mark.faults
@pytest.mark.parametrize("name", SWEEPS)
def test_all_points_compose(name):
    found, *_ = jobs(name)
    assert len({job.folder for job in found}) == len(found) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name == "clsrl_table1" else pytest.param(name, marks=pytest.mark.faults) for name in OWN]
)
def test_in_miniature_by_two_overrides(name):
    model = "tiny_gemma3" if name.startswith("alert") else "tiny_qwen2_vl"
    found, *_ = jobs(name, f"model={model}", "data=digits", "seed=1")
    assert {job.values["data"]["name"] for job in found} == {"digits"}
    assert {job.values["model"]["name"] for job in found} <= {model, "features"}
    assert {job.values["clip"]["name"] for job in found if job.values["model"]["name"] == "features"} <= {"tiny"}


@pytest.mark.faults
def test_trainings_are_shared():
    found, *_ = jobs("alert_table5", "model=tiny_gemma3", "data=digits", "seed=1")
    methods = [job.values["method"]["name"] for job in found]
    assert methods == ["cafo", "alert", "alert_zeroshot", "alert_zeroshot", "alert_zeroshot"]
    trained = found[1]
    for job in found[2:]:
        assert job.values["model"]["path"] == f"{trained.folder}/model"
        assert job.values["method"]["bank"] == f"{trained.folder}/model/embeddings"
    one, *_ = jobs("alert_table1", "model=tiny_gemma3", "data=digits", "seed=1", "shots=16")
    assert {job.folder for job in found[:2]} <= {job.folder for job in one}, "tables share runs, by their names"


def test_the_command_line_replaces_and_a_list_is_swept():
    spec = Spec({"seed": [1, 2], "data": "imagenet"}, {}, [{"method": ["sft", "clsrl"], "shots": 4}])
    points = expand(spec, {"data": ["dtd"], "seed": ["3"]})
    assert [point.overrides for point in points] == [
        {"data": "dtd", "method": method, "seed": "3", "shots": "4"} for method in ("sft", "clsrl")
    ]


def test_a_needed_point_has_the_same_data_shots_and_seed():
    named = {"draft": {"method": "cafo", "shots": 1}, "alert": {"method": "alert", "f": "{draft}"}}
    spec = Spec({"seed": [1, 2]}, named, [{"use": "alert", "shots": [4, 8]}])
    points = expand(spec, {"data": ["dtd", "eurosat"], "gpus": ["0"]})
    assert len(points) == 8
    for point in points:
        draft = point.needs["draft"].overrides
        assert draft["method"] == "cafo" and draft["gpus"] == "0"
        assert {key: draft[key] for key in ("data", "shots", "seed")} == {
            key: point.overrides[key] for key in ("data", "shots", "seed")
        }
    assert {point.depth for point in points} == {1}


def test_a_needed_point_has_what_its_own_point_has_of_the_command_line():
    named = {"a": {"method": "alert"}, "b": {"method": "sft", "f": "{a}"}}
    points = expand(Spec({}, named, [{"use": "b", "g": "{b}"}]), {"model": ["small", "large"], "x": ["1", "2"]})
    for point in points:
        for needed in (point.needs["b"], point.needs["b"].needs["a"], point.needs["a"]):
            assert (needed.overrides["model"], needed.overrides["x"]) == (
                point.overrides["model"],
                point.overrides["x"],
            )
    assert len({(p.overrides["model"], p.overrides["x"]) for p in points}) == 4


@pytest.mark.faults
def test_a_point_has_the_values_of_its_own_learner_alone():
    """The command line gives them to all points; the encoders' are of few-shot learners."""
    given = ["few_shot.generated=dalle", "few_shot.per_class=2", "clip.dtype=float16", "shots=1", "seed=1"]
    sweep = ["-cd", str(REPOSITORY / "sweeps"), "-cn", "alert_table1", "data=digits", "model=tiny_gemma3"]
    found, _, _ = jobs("alert_table1", *of_each_run([*sweep, *given])[4:])
    values = {job.values["method"]["name"]: job for job in found}
    assert {"cafo", "coop", "alert"} <= set(values)
    few_shot = {name: job.values["few_shot"] for name, job in values.items()}
    assert (few_shot["cafo"]["generated"], few_shot["cafo"]["per_class"]) == ("dalle", 2)
    assert "generated" not in few_shot["coop"] and few_shot["alert"] is None is values["alert"].values["clip"]
    assert {job.values["clip"]["dtype"] for name, job in values.items() if few_shot[name]} == {"float16"}
    assert not {"clip", "clip.dtype", "few_shot.per_class"} & set(values["alert"].overrides)
    with pytest.raises(ConfigCompositionException, match=r"few_shot\.alhpa"):
        jobs("alert_table1", *of_each_run([*sweep, "few_shot.alhpa=1", "shots=1", "seed=1"])[4:])


def test_a_method_on_the_command_line_chooses_points_and_those_that_they_need():
    named = {"draft": {"method": "cafo"}}
    spec = Spec({}, named, [{"method": ["sft", "clsrl"]}, {"method": "alert", "f": "{draft}"}])
    (point,) = expand(spec, {"method": ["alert"]})
    assert point.overrides == {"method": "alert", "f": "{draft}"} and point.needs["draft"].overrides["method"] == "cafo"
    with pytest.raises(UserError, match="method=cafo: the sweep has no such points; it has sft, clsrl, alert"):
        expand(spec, {"method": ["sft", "cafo"]})


@pytest.mark.slow
def test_a_point_without_shots_does_not_keep_those_of_the_point_before():
    _, _, made = jobs("clsrl_table2", "data=digits", "model=tiny_qwen2_vl", "seed=1", "method=zeroshot")
    points = [{"method": "zeroshot", "shots": 8, "seed": 3}, {"method": "zeroshot"}]
    made.keys |= {"params": {"data": "digits"}, "points": points}
    found, (shown,) = made.jobs(made.chapters(), {})
    assert [(job.values["shots"], job.values["seed"]) for job in found] == [(8, 3), (16, 1)]
    assert ["-s8-seed3" in shown[0].folder, "-s16-seed1" in shown[1].folder] == [True, True]


class Launcher:
    """Notes what it is given; what is called `broken` fails."""

    def __init__(self):
        self.waves = []

    def launch(self, batch, initial_job_idx):
        assert all(overrides[1:] == ["tracking.tags=[clsrl_fig1]"] for overrides in batch)
        self.waves.append((initial_job_idx, [overrides[0] for overrides in batch]))
        return [JobReturn(status=JobStatus.FAILED if "broken" in o[0] else JobStatus.COMPLETED) for o in batch]


def made_job(name, *needs, depth=0):
    point = Point({}, needs={str(n): Point({}) for n in range(depth)})
    return Job(point, Path(name), {"label": name}, {}, tuple(map(Path, needs)))


def test_choosing_among_a_sweeps_own_values_keeps_it_the_papers():
    rows = [{"method": "sft", "shots": 1}, {"method": "clsrl", "shots": [1, 4]}]
    keys = {"params": {"data": ["dtd", "eurosat"]}, "named": {}, "points": rows, "page": {}, "tiny": {}}
    chapter = plan.alone("any", keys)
    given = {"data": ["dtd"], "method": ["clsrl"], "shots": ["4"], "model": ["tiny"]}
    # 4 shots are not all points' own: SFT would run with others than the table's
    assert chapter.parted(given) == ({"shots": "4", "model": "tiny"}, {"data": "dtd", "method": "clsrl"})
    assert chapter.parted({"data": ["dtd", "pets"], "shots": ["1"]}) == ({"data": "dtd,pets"}, {"shots": "1"})


@pytest.mark.slow
def test_waves_run_one_behind_the_other_and_a_failure_stops_only_what_needs_it(capsys):
    _, _, made = jobs("clsrl_fig1", "data=digits", "model=tiny_qwen2_vl", "seed=1")
    made.launcher = Launcher()
    points = [made_job("old"), made_job("broken"), made_job("fine")]
    points += [made_job("one", "broken", depth=1), made_job("two", "fine", depth=1), made_job("three", "old", depth=1)]
    returns = made.run(points, {Path("old")})
    assert made.launcher.waves == [(0, ["label=broken", "label=fine"]), (2, ["label=two", "label=three"])]
    assert [each.status for each in returns].count(JobStatus.FAILED) == 1
    assert capsys.readouterr().err == "one: left out, since broken has no result\n"


@pytest.mark.slow
def test_what_leaves_a_page_the_papers(tmp_path):
    _, shown, made = jobs("clsrl_table2", "data=digits", "model=tiny_qwen2_vl", "seed=1", "method=sft")
    made.config.hydra.sweep.dir = str(tmp_path)
    same = [
        "seed=1,2",
        "protocol=official",
        "rollout=vllm",
        "deepspeed=zero3",
        "gpus=2",
        "data.root=/x",
        "tracking=none",
    ]
    folder, _ = made.describe(made.chapters(), [shown], made.given(same))
    assert points_of(folder).given == {}
    assert folder.name == "clsrl_table2-seed1+2-protocolofficial-rolloutvllm-deepspeedzero3"
    closer = [
        "selection=paper",
        "clip.prompts=cupl.json",
        "+few_shot.generated=dalle",
        "few_shot.per_class=8",
    ]
    folder, _ = made.describe(made.chapters(), [shown], made.given(closer))
    assert points_of(folder).given == {}, "CaFo's authors have these"
    other = ["rollout.temperature=0.5", "data=dtd", "trainer.updates=3", "protocol.sampler=clsrl"]
    changed, _ = made.describe(made.chapters(), [shown], made.given(other))
    assert list(points_of(changed).given) == ["rollout.temperature", "trainer.updates", "protocol.sampler"]
    assert points_of(changed).chosen == {"data": "dtd"}, "one of the paper's own"


def test_a_page_that_cannot_be_laid_out_is_refused_before_its_runs():
    good = {"rows": ["method"], "columns": ["data"], "published": "clsrl_table2"}
    page.check(good)
    for wrong, expected in (
        ({"rows": []}, "page.rows is missing"),
        ({"columns": "data"}, "page.columns=data must be a list"),
        ({"kind": "tabel"}, "hydra.sweeper.page.kind"),
        ({"measures": ["minutes"]}, "hydra.sweeper.page.measures"),
        ({"curves": ["loss"]}, "hydra.sweeper.page.curves"),
        ({"kind": "training"}, "needs curves"),
        ({"published": "table9"}, "published=table9: there is no"),
    ):
        with pytest.raises(UserError, match=expected):
            page.check(good | wrong)
    assert {*pictures.PAINTERS, "examples"} == set(page.KINDS)


@pytest.mark.parametrize(
    ("named", "expected"),
    [({}, "no point named 'x'"), ({"x": {"f": "{y}"}, "y": {"f": "{x}"}}, "needs itself: x -> y")],
)
def test_a_name_that_is_unknown_or_needs_itself(named, expected):
    with pytest.raises(UserError, match=expected):
        expand(Spec({}, named, [{"f": "{x}"}]), {})


@pytest.mark.slow
def test_one_mistake_stops_the_sweep_before_its_first_run():
    with pytest.raises(UserError, match="method=nothinking.*prompts_per_update=16 must be divisible by gpus=3"):
        jobs("clsrl_fig3", "data=digits", "model=tiny_qwen2_vl", "method=nothinking", "gpus=3")


def test_every_file_of_published_numbers_is_shown_and_found():
    shown = set()
    for name in SWEEPS:
        page = yaml.safe_load((REPOSITORY / "sweeps" / f"{name}.yaml").read_text()).get("hydra", {})
        shown.add(page.get("sweeper", {}).get("page", {}).get("published"))
    assert {path.stem for path in results_module.FOLDER.glob("*.csv")} == shown - {None}
    for path in results_module.FOLDER.glob("*.csv"):
        assert results_module.load_published(path.stem).source.startswith(
            ("ALERT, ", "CLS-RL (arXiv 2503.16188), ", "Averages of eleven datasets", "ReFine-RFT (arXiv")
        )


def written(name):
    """A sweep's text, and its points."""
    text = (REPOSITORY / "sweeps" / f"{name}.yaml").read_text()
    keys = yaml.safe_load(text)["hydra"]["sweeper"]
    return text, expand(Spec({"seed": [1], **keys["params"]}, keys.get("named", {}), keys["points"]), {})


@papers
def test_figure_1_has_the_datasets_of_its_captions():
    lines = (PAPERS / "CLS-RL.txt").read_text().splitlines()
    captions = [lines[lines.index("(a) StanfordCars") + number] for number in range(3)]
    assert captions == ["(a) StanfordCars", "(b) SUN397", "(c) DescribableTextures"]
    _, points = written("clsrl_fig1")
    assert [point.overrides["data"] for point in points] == ["stanford_cars", "sun397", "dtd"]


def test_figure_3_shows_accuracies_of_the_test_images():
    """Without validation images these are what an evaluation during training watches."""
    _, points = written("clsrl_fig3")
    assert {point.overrides["validation"] for point in points} == {"none"}
    lines = [{"step": step, "eval/test/accuracy": 0.5} for step in (10, 20)]
    assert pictures.series(lines, "test_accuracy") == {10: 50.0, 20: 50.0}


def test_one_published_number_is_compared_with_one_model():
    """Tables 1 and 2 print the same accuracy of Gemma, so ours has the same draft in both: CaFo's with one shot."""
    numbers = {
        dict(keys)["method"]: value for keys, value in results_module.load_published("alert_table1").numbers.items()
    }
    again = results_module.load_published("alert_table2").numbers
    assert {value for keys, value in again.items() if set(dict(keys).values()) == {"gemma_1shot", "imagenet"}} == {
        numbers["gemma_1shot"]
    }
    found = []
    for name in ("alert_table1", "alert_table2"):
        (point,) = [each for each in written(name)[1] if each.overrides.get("method") == "gemma_1shot"]
        draft = point.needs["cafo"].overrides
        found.append((point.overrides["shots"], *(draft[key] for key in ("method", "shots", "clip", "visual"))))
    assert found == [("1", "cafo", "1", "rn50", "dino_rn50")] * 2


def test_what_the_paper_does_not_say_is_marked():
    asked = [name for name in OWN if any(p.overrides.get("method") == "zeroshot" for p in written(name)[1])]
    assert asked == ["clsrl_fig2", "clsrl_table1", "clsrl_table2", "clsrl_table4"]
    assert all("(no_think)" in written(name)[0] and "our choice" in written(name)[0] for name in asked)
    for document in ("papers.md", "protocols.md"):
        assert "method.instruction=" in (REPOSITORY / "docs" / document).read_text()


@papers
def test_published_numbers_are_the_papers():
    facts = yaml.safe_load((PAPERS / "published.yaml").read_text())
    alert, clsrl = facts["alert"], facts["clsrl"]
    ours = {"clip_zero_shot": "zero_shot_clip", "gemma_1shot": "gemma3_1shot", "zeroshot": "qwen2vl"}
    table = clsrl["table1_base_to_new"]
    read = {path.stem: results_module.load_published(path.stem).numbers for path in results_module.FOLDER.glob("*.csv")}
    at = {"base": 0, "new": 1, "H": 2}
    assert len(read["clsrl_table1"]) == 12 * 4 * 3
    for keys, value in read["clsrl_table1"].items():
        data, method, split = (dict(keys)[key] for key in ("data", "method", "split"))
        assert table[data][ours.get(method, method)][at[split]] == value
    for name, table, key in (
        ("clsrl_table2", clsrl["table2_few_shot_4"], "data"),
        ("clsrl_table4", clsrl["table4_open_set"], "data"),
        ("alert_table2", alert["table2_distribution_shift"], "split"),
        (
            "alert_table1",
            {"columns": alert["table1_imagenet_shots"]["shots"], **alert["table1_imagenet_shots"]},
            "shots",
        ),
    ):
        numbers = [value for row in table["rows"].values() for value in row if value is not None]
        assert len(read[name]) == len(numbers)
        for keys, value in read[name].items():
            method = dict(keys)["method"]
            row = next(
                table["rows"][each] for each in (ours.get(method), method, f"{method}_clip") if each in table["rows"]
            )
            assert row[[str(column) for column in table["columns"]].index(dict(keys)[key])] == value
    for name, table in (
        ("alert_table3", alert["table3_category_embeddings"]),
        ("alert_table5", alert["table5_top_k_candidates"]),
        ("alert_table6", alert["table6_embedding_init"]),
    ):
        assert {keys[0][1]: value for keys, value in read[name].items()} == {str(k): v for k, v in table.items()}
    assert list(read["alert_table4"].values()) == [65.8, 76.4, 78.74]
    assert {(dict(k)["data"], dict(k)["method"]): v for k, v in read["alert_fig4"].items()} == {
        (data, method): value for data, row in alert["figure4_other_datasets"].items() for method, value in row.items()
    }
    for keys, value in read["clsrl_table3"].items():
        row = clsrl["table3_efficiency_imagenet_4shot"][dict(keys)["method"]]
        measure = dict(keys)["measure"].replace("minutes", "min")
        assert row[measure] == value
    assert len(read["clsrl_table3"]) == 9
    for method in ("clsrl", "nothinking"):
        rows = list(csv.reader((PAPERS / f"free_lunch_{method}.csv").open()))
        theirs = [float(value) for row in rows[1:] for value in row[1:]]
        assert [v for keys, v in read["clsrl_fig2"].items() if dict(keys)["method"] == method] == theirs


def test_averages_and_harmonic_means_of_the_published_numbers_recompute():
    """Within the rounding of the printed values."""

    def rows(name, key, average="average"):
        found = {}
        for keys, value in results_module.load_published(name).numbers.items():
            named = dict(keys)
            column = named.pop(key)
            found.setdefault(tuple(sorted(named.items())), {})[column] = value
        return {keys: (row.pop(average), list(row.values())) for keys, row in found.items() if average in row}

    wrong = {}
    for name, key in (
        ("clsrl_table1", "data"),
        ("clsrl_table2", "data"),
        ("clsrl_table4", "data"),
        ("clsrl_fig2", "split"),
    ):
        for keys, (printed, values) in rows(name, key).items():
            if dict(keys).get("split") == "H":
                continue
            mean = sum(values) / len(values)
            if abs(mean - printed) > 0.006:
                wrong[name, keys] = (printed, round(mean, 3))
    for keys, (printed, (base, new)) in rows("clsrl_table1", "split", "H").items():
        assert abs(2 * base * new / (base + new) - printed) <= 0.011, keys
    assert wrong == {}


MINE = """
defaults: [config, {override hydra/sweeper: paper}, _self_]
hydra:
  mode: MULTIRUN
  sweeper:
    params: {data: digits, seed: [1], clip: none, visual: pixels}
    points: [{method: [linear_probe, nearest_mean], shots: [1, 2]}]
    page: {kind: shots, rows: [method], columns: [shots], published: alert_table1}
"""


BOOK = """
defaults: [config, {override hydra/sweeper: paper}, {override hydra/launcher: joblib}, _self_]
hydra:
  mode: MULTIRUN
  launcher: {n_jobs: 2}
  sweeper:
    title: A book of <two> chapters
    given: {setting.test_per_class: 5}
    chapters:
      - {sweep: mine, title: First, text: What & why., given: {shots: 1}}
      - {sweep: other}
"""
OTHER = """
hydra:
  sweeper:
    params: {data: digits, seed: [1], clip: none, visual: pixels}
    points: [{method: linear_probe, shots: [1, 2]}]
    page: {kind: table, rows: [shots], columns: [method]}
"""


def run(folder, *arguments, name="mine"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    sweeps = folder / "sweeps"
    sweeps.mkdir(exist_ok=True)
    for file, text in (("mine", MINE), ("other", OTHER), ("book", BOOK)):
        (sweeps / f"{file}.yaml").write_text(text)
    out = f"hydra.sweep.dir={folder / 'out'}"
    return subprocess.run(
        [sys.executable, "run.py", "-cd", str(sweeps), "-cn", name, out, "tracking=none", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.faults  # what it shows, the sweep of sweeps below shows as well, but for dry runs and mistakes
def test_a_sweep_of_ones_own_runs_goes_on_and_ends_in_its_page(tmp_path):
    out = tmp_path / "out"
    broken = run(tmp_path, "method=linear_probe,nearest")
    assert broken.returncode == 1 and not out.exists()
    assert "method=nearest: the sweep has no such points; it has linear_probe, nearest_mean" in broken.stderr
    dry = run(tmp_path, "dry=true")
    assert dry.returncode == 0 and "4 of 4 runs to do" in dry.stdout and not out.exists()
    first = run(tmp_path)
    assert first.returncode == 0, first.stderr
    rows = [row for row in csv.DictReader((out / "mine" / "table.csv").open()) if row["ours"]]
    assert len(rows) == 4
    for row in rows:
        (folder,) = out.glob(f"{row['method']}-digits-*-s{row['shots']}-seed1*")
        result = json.loads((folder / "metrics.json").read_text())
        summary = (result["after"] or result["before"])["test"]
        assert float(row["ours"]) == pytest.approx(100 * summary["accuracy"], abs=1e-4)
        page = (out / "mine" / "report.html").read_text()
        assert f"<bdi>{100 * summary['accuracy']:.2f}" in page and f'href="../{folder.name}/report.html"' in page
        assert f"<bdi>{100 * summary['accuracy']:.2f}</bdi>" in (folder / "report.html").read_text()
    again = run(tmp_path)
    assert again.returncode == 0 and "4 points, 4 finished" in again.stdout


@pytest.mark.slow
def test_a_sweep_of_sweeps_runs_each_point_once_and_shows_every_number(tmp_path):
    """Side by side in two processes; the numbers of the report are the runs'."""
    out = tmp_path / "out"
    first = run(tmp_path, name="book")
    assert first.returncode == 0, first.stderr
    results = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/metrics.json")}
    assert len(results) == 3, "1 shot of the linear probe stands in both chapters"
    assert all(result["after"]["test"]["n"] == 50 for result in results.values())
    report, expected = (out / "book" / "report.html").read_text(), 0
    for chapter, count in (("mine", 2), ("other", 2)):
        rows = [row for row in csv.DictReader((out / f"book-{chapter}" / "table.csv").open()) if row["ours"]]
        assert len(rows) == count
        for row in rows:
            (name,) = (
                name for name in results if name.startswith(f"{row['method']}-") and f"-s{row['shots']}-" in name
            )
            accuracy = 100 * (results[name]["after"] or results[name]["before"])["test"]["accuracy"]
            assert float(row["ours"]) == pytest.approx(accuracy, abs=1e-4) and f"<bdi>{accuracy:.2f}" in report
            expected += 1
    assert (
        expected == 4 and "<h1><bdi>A book of &lt;two&gt; chapters</bdi></h1>" in report and "What &amp; why." in report
    )
    assert 'href="../book-mine/report.html"' in report and "3 of 3 runs finished" in report
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.json")}
    assert "3 points, 3 finished" in run(tmp_path, name="book").stdout
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.json")}


@pytest.mark.parametrize(
    ("chapter", "message"),
    [
        ({"sweep": "nowhere"}, r"chapters\[1\].sweep=nowhere: there is no such file"),
        (
            {"sweep": "mine", "givn": {}},
            r"chapters\[1\]: givn is no key of a chapter; it has given, sweep, text, title",
        ),
        ({"title": "x"}, r"chapters\[1\].sweep=: there is no such file"),
        ({"sweep": "empty"}, r"chapters\[1\].sweep=empty: .* has no hydra.sweeper.points"),
        ({"sweep": "more"}, r"chapters\[1\].sweep=more: seed of .* would be lost"),
        ({"sweep": "mine"}, r"chapters\[2\].sweep=mine: it is a chapter already"),
    ],
)
def test_a_wrong_chapter_is_named(tmp_path, chapter, message):
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "empty.yaml").write_text("hydra: {}\n")
    (tmp_path / "more.yaml").write_text(f"{MINE}\nseed: 1\n")
    keys = {"params": {}, "tiny": {}, "given": {}, "chapters": [*([chapter] * (chapter == {"sweep": "mine"})), chapter]}
    with pytest.raises(UserError, match=message):
        plan.read(keys, [tmp_path])


def test_values_of_a_chapter_go_before_the_books_and_after_the_command_lines(tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE)
    chapter = {"sweep": "mine", "given": {"shots": [4, 8], "model": "tiny_x"}}
    keys = {"params": {"seed": [7]}, "tiny": {"clip": "tiny"}, "given": {"shots": 1, "on": True}, "chapters": [chapter]}
    (found,) = plan.read(keys, [tmp_path])
    assert found.values({}) == {"clip": ["tiny"], "shots": ["4", "8"], "on": ["true"], "model": ["tiny_x"]}
    assert found.values({"shots": ["2"], "model": ["large"]}) == {"shots": ["2"], "on": ["true"], "model": ["large"]}
    assert (
        found.spec.params == {"seed": [1], "data": "digits", "clip": "none", "visual": "pixels"}
        and found.page["kind"] == "shots"
    )
    assert found.methods == {"linear_probe", "nearest_mean"}
    assert plan.with_methods([found], ["cafo"]) == [found], "whose error says what it has"
    other = replace(found, name="other", spec=replace(found.spec, points=[{"method": "cafo"}]))
    assert plan.with_methods([found, other], ["cafo"]) == [other] and len(plan.with_methods([found, other], None)) == 2


@pytest.mark.faults
@pytest.mark.parametrize(("name", "points", "chapters"), [("mini_paper", 450, 12), ("mini_paper_quick", 41, 7)])
def test_every_point_of_the_papers_in_miniature_composes(name, points, chapters):
    found, shown, made = jobs(name)
    assert len({job.folder for job in found}) == len(found) == points and len(shown) == len(made.chapters()) == chapters
    assert {job.values["model"]["name"] for job in found} == {"tiny_qwen2_vl", "tiny_gemma3", "features"}
    assert {job.values["data"]["name"] for job in found} == {"digits", "fashion"}
