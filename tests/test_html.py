"""Reports as pages: what they say, and that nothing a run has written can be more than text in them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as parquet
import pytest
import yaml
from PIL import Image
from statsmodels.stats.proportion import proportion_confint

from common.config import composition
from common.evaluation import metrics
from common.evaluation.evaluate import Evaluation
from common.evaluation.metrics import Summary
from common.report import __main__ as command
from common.report import figures, prints
from common.report.html import render, run_page, transcripts
from common.run import predictions
from common.run.result import Result
from common.run.run_folder import RunFolder
from common.types import Answers, Prediction, Probabilities, Reply

NAMES = ("six", "nine", "two")
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "</textarea></pre><img src=x onerror='window.hacked = 3'>",
    "<!--<script>window.hacked = 4</script>",
    '"><svg onload="window.hacked = 5">',
    "\u202eright to left\u2066 and back",
    "a\x00b\x1b[31m",
    "{{ 7 * 7 }} {% raw %} ${1} $x_1$",
)


def prediction(image, label, answer, names, text=None, tokens=4):
    right = label == answer
    reply = Reply(f"<answer>{answer}</answer>" if text is None else text, tokens, False, True, right)
    return Prediction(image, label, names.index(label), answer, right, right, reply)


def answered(images, labels, said, names, confidences=None, texts=None, **columns):
    """Answers of a split; `confidences`: of what is said, the rest is shared among the other names."""
    texts = texts or [None] * len(images)
    rows = [prediction(*each, names, text) for *each, text in zip(images, labels, said, texts, strict=True)]
    table = None
    if confidences is not None:
        values = np.array(
            [
                [c if name == answer else (1 - c) / (len(names) - 1) for name in names]
                for c, answer in zip(confidences, said, strict=True)
            ],
            np.float32,
        )
        table = Probabilities(tuple(names), np.tile(np.arange(len(names), dtype=np.int32), (len(images), 1)), values)
    return Answers(rows, 1.0, table, columns={"prompt": ["Which one?"] * len(images), **columns})


@pytest.fixture
def write(compose, tmp_path):
    """Write a finished run's folder from its answers before (None: it knew nothing) and after training."""

    def make(name, before, after=None, *overrides, names=NAMES, samples=(), keep=(), **said):
        values = composition.plain(compose(*overrides))
        folder = RunFolder(tmp_path / name)
        folder.claim(values)
        (folder.path / "manifest.json").write_text(
            json.dumps({"splits": {"test": {"n": len((before or after).predictions)}}})
        )
        phases = {phase: each for phase, each in (("before", before), ("after", after)) if each is not None}
        for phase, answers in phases.items():
            folder.write_predictions(phase, "test", answers)
        folder.merge_predictions()
        if samples:
            folder.write_completions(list(samples), 25)
            folder.merge_completions()
        if keep:
            predictions.write_thumbnails(folder.path, Plain(), keep)
        for step in (1, 2) if after is not None else ():
            folder.log("metrics.jsonl", {"step": step, "loss": 1.0, "reward": 0.5, "rewards/accuracy/mean": 0.5})
        folder.close()
        summaries = {phase: {"test": metrics.summarize(answers, list(names))} for phase, answers in phases.items()}
        facts = {key: values[key]["name"] for key in ("method", "data", "setting", "protocol", "model")}
        facts |= {key: values[key] for key in ("shots", "seed", "sampler")}
        result = Result(
            **{**facts, **said},
            origins={"digits": "own split"},
            left_out=0,
            short_classes={},
            signature=composition.signature(values),
            git_commit=None,
            versions={"torch": "2"},
            weights={"path": "w", "sha256": "0" * 64},
            manifest="m",
            decoding="greedy",
            overall={phase: {} for phase in phases},
            train={"updates": 2, "seconds": {"total": 1.0}},
            **summaries,
        )
        folder.write_result(result)
        folder._lock.close()
        return folder.path

    return make


class Plain:
    """Pictures of one colour."""

    def open(self, image):
        return Image.new("RGB", (200, 100), "red")


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.found, self.scripts, self.inside = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id", "") if tag == "script" else None

    def handle_data(self, data):
        if self.inside is not None:
            self.scripts.append((self.inside, data))
            self.inside = None


def small(write, **options):
    """Four images: right twice, fixed, broken, and an answer that is no class."""
    images, labels = ["a", "b", "c", "d"], ["six", "six", "nine", "two"]
    before = answered(images, labels, ["six", "nine", "nine", "two"], NAMES, [0.9, 0.5, 0.8, 0.6])
    after = answered(images, labels, ["six", "six", "six", "cow"], NAMES, [0.8, 0.7, 0.6, 0.4])
    return write("run", before, after, **options)


def of_page(folder):
    """The data of a page that holds all of it."""
    scripts = dict(Elements((folder / "report.html").read_text()).scripts)
    pieces = [json.loads(text) for name, text in scripts.items() if name.startswith("rows-")]
    rows = [row for piece in pieces for row in piece["rows"]]
    return json.loads(scripts["index"]), rows


@pytest.mark.slow
def test_rows_say_what_the_run_answered(write):
    folder = small(write, keep=["b"])
    assert command.main(["html", str(folder)]) == 0
    index, rows = of_page(folder)
    prompts = json.loads(dict(Elements((folder / "report.html").read_text()).scripts)["rows-0"])["prompts"]
    assert index["names"] == list(NAMES) and index["splits"] == ["test"]
    assert index["image"] == ["a", "b", "c", "d"] and index["label"] == [0, 0, 1, 2]
    assert index["answer"] == [0, 0, 0, -1], "a cow is no class"
    assert (index["before"], index["after"]) == ([1, 0, 1, 1], [1, 1, 0, 0])
    assert index["confidence"] == [80, 70, 60, 30]
    assert [bool(row["picture"]) for row in rows] == [False, True, False, False]
    assert rows[1]["before"]["answer"] == "nine" and rows[1]["after"]["text"] == "<answer>six</answer>"
    assert rows[1]["after"]["top"][0] == ["six", 0.7] and prompts == ["Which one?"]
    assert rows[1]["before"]["facts"] == {"correct_official": False, "formatted": True, "tokens": 4, "truncated": False}


def test_confusions_are_counted_by_hand(write):
    folder = small(write)
    run_page.make(folder)
    page = Elements((folder / "report.html").read_text())
    cells = {(int(a["data-label"]), int(a["data-answer"])): a["class"] for tag, a in page.found if "data-label" in a}
    assert cells == {(0, 0): "right", (1, 0): "wrong", (2, -1): "wrong"}
    pairs = transcripts.tally(folder).pairs["test"]
    found = prints.confusion_print(pairs, transcripts.class_names(folder))
    assert found == ([[2, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], list(NAMES))


def test_every_class_has_its_accuracy_and_of_how_many_images(write):
    folder = small(write)
    ((split, table),) = run_page.class_tables(Result.load(folder))
    assert split == "test" and table.columns == ("class", "images", "zero-shot %", "trained %", "95 % interval")
    assert [row[:4] for row in table.rows] == [
        ("nine", "1", "100.00", "0.00"),
        ("two", "1", "100.00", "0.00"),
        ("six", "2", "50.00", "100.00"),
    ]
    low, high = proportion_confint(2, 2, method="wilson")
    assert table.rows[2][4] == f"{100 * low:.2f} – {100 * high:.2f}"
    text = run_page.make(folder).read_text()
    assert '<section id="classes">' in text and "3 classes, the least accurate first" in text
    assert '<td data-column="class mean %"><bdi>33.33</bdi></td>' in text, "1, 0 and 0"


def test_many_classes_have_their_most_frequent_confusions():
    labels, answers = [n % 45 for n in range(90)], [n % 45 for n in range(90)]
    answers[:3] = [1, 2, 0]
    answers[45] = 1  # once more 0 for 1
    right = [a == b for a, b in zip(labels, answers, strict=True)]
    right[50] = False  # the right name, but counted wrong: it was no candidate
    counted = transcripts.Tally()
    rows = [
        transcripts.Row("test", str(n), f"class {label}", {}, f"class {answer}", after=ok)
        for n, (label, answer, ok) in enumerate(zip(labels, answers, right, strict=True))
    ]
    assert list(counted(rows)) == rows
    (table,) = run_page.confusion_tables(counted, {f"class {n}": f"class {n}" for n in range(45)})
    assert (table["grid"], table["images"], table["wrong"], table["named"]) == (None, 90, 5, 1)
    assert [(cell["names"], cell["count"]) for cell in table["pairs"]] == [
        (("class 0", "class 1"), 2),
        (("class 1", "class 2"), 1),
        (("class 2", "class 0"), 1),
    ]


def test_calibration_is_of_the_last_phase(write):
    folder = small(write)
    confidences, right = transcripts.tally(folder).surest["test"]
    assert confidences == pytest.approx([0.8, 0.7, 0.6, 0.3]) and right == [True, True, False, False]
    bins = metrics.reliability(confidences, right, 2)
    assert bins == [(pytest.approx(0.3), 0.0, 1), (pytest.approx(0.7), pytest.approx(2 / 3), 3)]
    assert metrics.calibration_error(confidences, right, 2) == pytest.approx(0.25 * 0.3 + 0.75 * (0.7 - 2 / 3))


def test_a_training_image_has_its_completions_together(write):
    def sample(step, image, text, **values):
        row = {"step": step, "image": image, "prompt": "Which?", "label": "six", "completion": text, "tokens": 3}
        row |= {"truncated": text == "cut", "reward": 0.5, "advantage": 0.25, "lag": 0}
        return row | {"rewards/accuracy": 1.0, "rewards/judge": None, "judge_reply/judge": None} | values

    samples = [
        sample(1, "t1", "six"),
        sample(1, "t1", "cut"),
        sample(2, "t1", "six", **{"judge_reply/judge": "Score: 8"}),
    ]
    folder = small(write, samples=samples)
    run_page.make(folder)
    index, rows = of_page(folder)
    assert index["splits"] == ["test", "training"] and index["after"][4:] == [-1, -1] and index["flags"][4:] == [4, 0]
    assert [len(row["samples"]) for row in rows[4:]] == [2, 1] and [row["step"] for row in rows[4:]] == [1, 2]
    assert rows[4]["samples"][0]["rewards"] == {"accuracy": 1.0, "judge": None} and rows[4]["samples"][0]["said"] == {}
    assert rows[5]["samples"][0]["said"] == {"judge": "Score: 8"} and rows[5]["samples"][0]["advantage"] == 0.25


def test_of_many_completions_some_are_kept_over_the_whole_training(write):
    row = {"image": "t", "prompt": "?", "label": "six", "completion": "six", "tokens": 1, "truncated": False}
    samples = [row | {"step": step, "reward": 0.0, "advantage": 0.0, "lag": 0} for step in range(100)]
    folder = small(write, samples=samples)
    assert [each.detail["step"] for each in transcripts.training(folder, {}, most=4)] == [0, 25, 50, 75]


@pytest.mark.slow
def test_whatever_a_run_has_written_stays_text(write):
    """No element but the page's own, no text that ends a script element, and a policy that would stop it anyway."""
    texts = [*HOSTILE, "x" * 1_000_000]
    names = [f"{text[:60]} {n}" for n, text in enumerate(HOSTILE)]
    labels = [names[n % len(names)] for n in range(len(texts))]
    images = [f"{text[:50]}/{n}.png" for n, text in enumerate(texts)]
    before = answered(images, labels, labels, names, [0.9] * len(texts), texts, prompt=texts)
    sample = {"step": 1, "image": "t", "prompt": texts[1], "label": names[1], "completion": texts[1], "tokens": 1}
    sample |= {"truncated": False, "reward": 0.0, "advantage": 0.0, "lag": 0, "judge_reply/judge": texts[2]}
    said = {key: HOSTILE[number] for number, key in enumerate(("method", "data", "model", "setting", "protocol"))}
    folder = write("run", before, before, names=names, samples=[sample], **said)
    run_page.make(folder)
    text = (folder / "report.html").read_text()
    page = Elements(text)
    scripts = [attributes for tag, attributes in page.found if tag == "script"]
    assert [each.get("type") for each in scripts].count(None) == 1, "one script, ours"
    assert {tag for tag, _ in page.found} & {"img", "iframe", "object", "textarea"} == set()
    assert not [a for _, attributes in page.found for a in attributes if a.startswith("on")]
    assert "window.hacked = 1</script>" not in text and "\x00" not in text
    assert [data for name, data in page.scripts if name and re.search("[<>&]", data)] == []
    index, rows = of_page(folder)
    assert rows[0]["after"]["text"] == HOSTILE[0] and index["image"][6] == images[6]
    assert rows[len(HOSTILE)]["after"]["text"].endswith("[… 980,000 more characters in the run folder]")
    (policy,) = (a["content"] for _, a in page.found if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-[\w+/=]{44}';", policy)


@pytest.mark.slow
def test_many_rows_lie_beside_the_page(write, monkeypatch):
    monkeypatch.setattr(render, "INSIDE", 60_000)
    images = [f"{n}.png" for n in range(250)]
    labels = [NAMES[n % 3] for n in range(250)]
    folder = write("run", answered(images, labels, labels, NAMES, [0.9] * 250, ["x" * 500] * 250))
    (folder / "report").mkdir()
    (folder / "report" / "rows-9.js").write_text("of an earlier page")
    run_page.make(folder)
    assert sorted(path.name for path in (folder / "report").iterdir()) == [
        "index.js",
        "rows-0.js",
        "rows-1.js",
        "rows-2.js",
    ]
    text = (folder / "report" / "rows-2.js").read_text()
    assert text.startswith("report.rows(2,{") and len(json.loads(text[len("report.rows(2,") : -2])["rows"]) == 50
    index = json.loads((folder / "report" / "index.js").read_text()[len("report.index(") : -2])
    assert index["image"] == images
    page = (folder / "report.html").read_text()
    assert len(page) < 200_000 and "script-src 'sha256-" in page and "' 'self' file:;" in page
    assert text.count("Which one?") == 1, "a question stands once in each piece"
    assert not (folder / "report.unfinished").exists()


@pytest.mark.slow
def test_what_differs_from_the_options_is_listed(write):
    images = ["a", "b"]
    answers = answered(images, ["six", "nine"], ["six", "nine"], NAMES)
    folder = write("run", answers, None, "trainer.learning_rate=0.5")
    run_page.make(folder)
    page = (folder / "report.html").read_text()
    assert "1 value differs" in page and "trainer.learning_rate" in page and "<bdi>0.5</bdi>" in page
    other = yaml.safe_load((folder / "config.yaml").read_text()) | {"data": {"name": "nobodys"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(other))
    run_page.make(folder)
    assert "what differs from them is not known" in (folder / "report.html").read_text()


def test_a_folder_without_a_result_has_no_page(write, tmp_path, capsys):
    folder = small(write)
    (folder / "metrics.json").unlink()
    assert command.main(["html", str(folder)]) == 2
    assert "holds no finished run" in capsys.readouterr().err and not (folder / "report.html").exists()
    (tmp_path / "foreign").mkdir()
    assert command.main(["html", str(tmp_path / "foreign")]) == 2
    assert "is no sweep's folder" in capsys.readouterr().err


def test_a_damaged_folder_is_one_line(write, tmp_path, capsys):
    folder = small(write)
    table = parquet.read_table(folder / "predictions.parquet")
    parquet.write_table(table.drop_columns(["choices"]), folder / "predictions.parquet")
    assert command.main(["html", str(folder)]) == 2
    assert "predictions.parquet has no column choices, so no run wrote it" in capsys.readouterr().err
    (folder / "predictions.parquet").write_bytes(b"PAR1 half of it")
    assert command.main(["figures", str(folder)]) == 2 and "cannot be read" in capsys.readouterr().err
    (folder / "predictions.parquet").unlink()
    assert command.main(["html", str(folder)]) == 2 and "cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_side_by_side_link_to_their_pages(write, tmp_path):
    images, labels = ["a", "b"], ["six", "nine"]
    one = write("one & only #2?", answered(images, labels, ["six", "nine"], NAMES), None, "seed=1")
    two = write("two", answered(images, labels, ["six", "six"], NAMES), None, "seed=2", "trainer.learning_rate=0.5")
    run_page.make(one)
    half = write("half", answered(images, labels, labels, NAMES), None, "seed=3")
    (half / "metrics.json").unlink()
    (tmp_path / "foreign").mkdir()
    assert command.main(["html", str(one), str(two), str(half), str(tmp_path / "foreign")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert (
        "2 of 4 runs finished" in page
        and 'href="one%20%26%20only%20%232%3F/report.html"' in page
        and "two/report" not in page
    )
    assert "trainer.learning_rate" in page and "unfinished, after 0 updates" in page and "foreign" in page
    assert "100.00" in page and "50.00" in page


def test_confidences_are_not_rounded_before_they_are_ordered(write):
    images, labels = ["a", "b", "c"], ["six", "nine", "two"]
    said = answered(images, labels, ["six", "two", "two"], NAMES, [0.99999, 0.99996, 0.99998])
    folder = write("run", said)
    confidences, right = transcripts.tally(folder).surest["test"]
    assert metrics.selective_risks(confidences, right) == pytest.approx([0, 0, 1 / 3])
    (axis, _) = figures.calibration({"test": (confidences, right)}).axes
    assert axis.get_legend_handles_labels()[1] == ["test: off by 33.3 % (ECE), risk 11.1 % (AURC)"]


@pytest.mark.slow
def test_pictures_for_print(write):
    folder = small(write)
    assert command.main(["figures", str(folder)]) == 0
    made = {path.name for path in (folder / "figures").iterdir()}
    names = ("accuracies", "curves", "calibration", "confusion-test")
    assert made == {f"{name}.{kind}" for name in names for kind in ("png", "svg", "pdf")}
    with Image.open(folder / "figures" / "calibration.png") as picture:
        assert round(picture.info["dpi"][0]) == 300


def test_small_copies_show_what_went_wrong_first():
    """Of six images two are wrong at some time."""
    images, labels = [f"{n}" for n in range(6)], ["six"] * 6
    before = answered(images, labels, ["six", "six", "nine", "six", "six", "six"], NAMES)
    after = answered(images, labels, ["six", "six", "six", "six", "nine", "six"], NAMES)
    summary = {"test": Summary(6, 0.5, [0, 1], {}, 1.0)}
    evaluations = [Evaluation({"test": each}, summary) for each in (before, after)]
    chosen = predictions.choose_thumbnails(*evaluations, ["t0", "t1", "t2", "t3"], 2)
    assert chosen == ["t0", "t2", "2", "4"]
    assert len(predictions.choose_thumbnails(*evaluations, [], 3)) == 3


@pytest.mark.slow
def test_pictures_of_names_with_dots_do_not_overwrite_each_other(tmp_path):
    for version in (1, 2):
        figures.save_picture(figures.plt.figure(), tmp_path / f"confusion-noise.v{version}")
    assert {path.name for path in tmp_path.glob("*.png")} == {"confusion-noise.v1.png", "confusion-noise.v2.png"}


def test_a_legend_of_long_names_stays_inside_its_figure():
    figure, axes = figures.panels(3, 2.4)
    for number in range(3):
        axes[0].plot([0, 1], label=f"configuration {number} " + "and so on " * 40)
    figures.legend(figure, axes)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, width = legend.get_window_extent(), figure.bbox.width
    assert box.x0 >= 0 and box.x1 <= width
    assert len({text.get_text() for text in legend.get_texts()}) == 3


def test_a_small_copy_is_small_and_a_tiny_one_exact(tmp_path):
    tiny = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).astype(np.uint8))

    class Pictures:
        def open(self, image):
            return tiny if image == "tiny" else Image.new("RGB", (640, 320), "blue")

    predictions.write_thumbnails(tmp_path, Pictures(), ["tiny", "large"])
    kept = predictions.read_thumbnails(tmp_path)
    (tmp_path / "tiny.webp").write_bytes(kept["tiny"])
    (tmp_path / "large.webp").write_bytes(kept["large"])
    with Image.open(tmp_path / "tiny.webp") as again:
        assert np.array_equal(np.asarray(again.convert("RGB")), np.asarray(tiny))
    with Image.open(tmp_path / "large.webp") as again:
        assert again.size == (128, 64)


def test_a_drawing_takes_the_pages_colour():
    assert 'width="15pt" height="3pt"' in render.embedded('<svg width="10pt" height="2pt" viewBox="0 0 1 1"/>', 1.5)
    svg = render.embedded(
        '<?xml version="1.0"?><svg width="1"><metadata>x</metadata><path style="stroke: #000000"/></svg>'
    )
    assert svg == '<svg role="img" width="1"><path style="stroke: currentColor"/></svg>'


def test_a_run_that_knew_nothing_before_shows_what_it_answers_now(write):
    after = answered(["a", "b"], ["six", "nine"], ["six", "six"], NAMES, [0.9, 0.7])
    run = write("run", None, after)
    rows = list(transcripts.tests(run, {}))
    assert [(row.before, row.after, row.sureness) for row in rows] == [
        (None, True, pytest.approx(0.9)),
        (None, False, pytest.approx(0.7)),
    ]
    assert [set(row.detail) & {"before", "after"} for row in rows] == [{"after"}] * 2
    assert rows[1].last["correct"] is False and transcripts.tally(run).wrong["test"] == 1
