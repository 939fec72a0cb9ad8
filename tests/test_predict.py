"""Trained models at work: the evaluation's own answers, broken pictures, abstention, what cannot be asked."""

from __future__ import annotations

import csv
import json
import math
from io import BytesIO, StringIO
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from common import Classifier
from common.config import composition
from common.config.composition import validate
from common.data import loading, manifest, task
from common.data.digits import Digits
from common.evaluation.calibration import Calibration
from common.learner import learner_class
from common.predict import __main__ as command
from common.predict import cards, photos, trained_model
from common.predict.abstention import threshold_of
from common.predict.classifier import Answer
from common.predict.trained_model import TrainedModel, config_of, data_of
from common.run.result import Result
from common.run.run_folder import RunFolder
from common.types import Answers, BadImage, Prediction, Probabilities, Split, UserError
from tests.test_html import NAMES, answered, write  # noqa: F401

QUICK = [
    "tracking=none",
    "tracking.report=false",
    "trainer.evaluate_every=0",
    "validation=held_out",
    "setting.test_per_class=20",
]
METHODS = {
    "thinks": ["method=clsrl", "trainer.updates=3"],
    "adapters": ["method=nothinking", "model.lora.r=4", "trainer.updates=3"],
    "supervised": ["method=sft", "trainer.updates=3"],
    "not trained": ["method=zeroshot"],
    "answers first": ["method=think_after_answer", "trainer.updates=3"],
    "thinks if it likes": ["method=adaptive_thinking", "trainer.updates=3"],
    "without a list": ["method=visual_rft", "trainer.updates=3"],
    "several rewards, adapters": ["method=refine_rft", "trainer.updates=3"],
    "alert": ["method=alert", "experiment=alert_no_judge", "model=tiny_gemma3", "trainer.updates=3"],
    "alert over cafo": [
        *["method=alert", "experiment=alert_no_judge", "model=tiny_gemma3", "trainer.updates=2"],
        *["few_shot=cafo", "method.draft=few_shot", "few_shot.epochs=2", "few_shot.key_views=2"],
    ],
    "cache": ["method=tip_adapter_f", "few_shot.epochs=2", "few_shot.key_views=2"],
    "words": ["method=coop", "few_shot.epochs=2"],
    "no training": ["method=clip_zero_shot"],
    "closed form": ["method=linear_probe"],
    "attention": ["method=calip_fs", "few_shot.epochs=2"],
    "text attention": ["method=vt_clip", "few_shot.epochs=2"],
    "adapter": ["method=clip_adapter", "few_shot.epochs=2"],
    "two caches": ["method=cafo", "few_shot.epochs=2", "few_shot.key_views=2"],
    "cache as it is": ["method=tip_adapter", "few_shot.key_views=2"],
    "parameter-free": ["method=calip"],
    "chosen by its test images": [
        *["method=tip_adapter", "selection=paper", "validation=few", "few_shot.key_views=2"],
        "few_shot.search_scale=[60,8]",
    ],
}


OPEN = ("without a list", "several rewards, adapters")
USUAL = ("alert", "closed form")  # the others are in make test-faults


def expected(run):
    """The rows of the last evaluation of the test images."""
    rows = pyarrow.parquet.read_table(run / "predictions.parquet").to_pylist()
    last = "after" if any(row["phase"] == "after" for row in rows) else "before"
    return [row for row in rows if (row["phase"], row["split"]) == (last, "test")]


def calibrated(run, row):
    """The probabilities of a row, calibrated as its run says, by name; in plain arithmetic."""
    found = Result.load(run).calibration
    shares, logs = row["probabilities"], row.get("log_probabilities") or [None]
    # a few-shot learner keeps logarithms: a probability of logits hundreds apart is 0 in fp32
    if None not in logs and not any(map(math.isnan, logs)):
        shares = [math.exp(log - max(logs)) for log in logs]
    shares = [share ** (1 / found.get("temperature", 1.0)) for share in shares]
    shares = [share / sum(shares) for share in shares]
    top = shares.index(max(shares))
    rest = sum(share for place, share in enumerate(shares) if place != top)
    if found and rest > 0:
        edge = min(shares[top], 1 - 1e-6)
        odds = edge / (1 - edge)
        sure = 1 / (1 + odds ** -found["slope"] * math.exp(-found["bias"]))
        sure = max(sure, 1 / len(shares))
        others = [0.0 if place == top else share / rest for place, share in enumerate(shares)]
        even, mixed = 1 / (len(shares) - 1), 0.0
        while (1 - sure) * ((1 - mixed) * max(others) + mixed * even) > sure + 1e-9:
            mixed += 1e-6
        shares = [(1 - sure) * ((1 - mixed) * share + mixed * even) for share in others]
        shares[top] = sure
    return dict(zip(row["choices"], shares, strict=True))


def refuse(*arguments, **named):
    raise AssertionError("not needed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.faults] * (name not in USUAL)) for name in METHODS]
)
def test_answers_are_the_evaluations(runner, tmp_path, method, monkeypatch):
    """Names, replies and probabilities, in two calls; the run's folder is left as it was. A few-shot learner is neither
    fitted again nor given the dataset.
    """
    run = tmp_path / "run"
    assert runner(run, [*QUICK, *METHODS[method]]) == 0
    if Result.load(run).model == "features":
        for path in ("common.predict.trained_model.tasks.build", "common.few_shot.learner.FewShotLearner._begin"):
            monkeypatch.setattr(path, refuse)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run.rglob("*"))
    rows, digits = expected(run)[:60], Digits()
    classifier = Classifier.load(run)
    learner = None
    for part in (rows[:25], rows[25:]):
        answers = classifier({row["image"]: digits.open(row["image"]) for row in part})
        shares = [calibrated(run, row) for row in part]
        said = [
            (row["answer"], share[row["answer"]]) if row["answer"] in share else (None, None)
            for row, share in zip(part, shares, strict=True)
        ]
        if method in OPEN:  # the question lists no names: any word is an answer
            said = [(row["answer"] or None, share) for row, (_, share) in zip(part, said, strict=True)]
        assert [answer.label for answer in answers] == [label for label, _ in said]
        assert [answer.reply for answer in answers] == [row["completion"] or "" for row in part]
        assert [answer.confidence for answer in answers] == [
            None if share is None else pytest.approx(share, abs=3e-6) for _, share in said
        ]
        if part[0].get("candidates") is not None:
            assert [list(answer.candidates) for answer in answers] == [row["candidates"] for row in part]
        assert learner in (None, classifier.learner), "what answers stays loaded"
        learner = classifier.learner
    # another picture under a name that it has seen: as if it had not
    renamed = {rows[0]["image"]: digits.open(rows[1]["image"]), rows[1]["image"]: digits.open(rows[0]["image"])}
    answers = classifier(renamed)
    classifier.close()
    fresh = Classifier.load(run)
    assert [(a.reply, a.label) for a in answers] == [(a.reply, a.label) for a in fresh(renamed)]
    fresh.close()
    assert rows[0]["label"] != rows[1]["label"]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


@pytest.mark.slow
def test_a_folder_with_broken_pictures(runner, tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "photos"
    assert runner(run, ["method=zeroshot", *QUICK]) == 0
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    digits = Digits()
    for number in range(6):
        digits.open(str(number)).save(folder / ("more" if number % 2 else ".") / f"{number}.png")
    digits.open("7").save(folder / ".hidden" / "7.png")
    (folder / "cut.jpg").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    out = tmp_path / "answers.csv"
    assert command.main([str(run), str(folder), "--format", "csv", "--output", str(out)]) == 1
    rows = {row["image"]: row for row in csv.DictReader(out.open())}
    assert sorted(rows) == ["0.png", "2.png", "4.png", "cut.jpg", "empty.png", "more/1.png", "more/3.png", "more/5.png"]
    assert all(rows[name]["error"] for name in ("cut.jpg", "empty.png")) and not rows["0.png"]["error"]
    assert "cut.jpg: " in capsys.readouterr().err
    assert command.main([str(run), str(folder / "0.png"), "--format", "jsonl", "--names", "zero,ring"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert {name for name, _ in json.loads(line)["top"]} == {"zero", "ring"}
    # the same as a page, and without a list of names
    page = tmp_path / "a.html"
    assert command.main([str(run), str(folder), "--format", "html", "--output", str(page)]) == 1
    page = (tmp_path / "a.html").read_text()
    assert page.count("data:image/webp;base64,") == 6 and page.count("cannot be read</bdi>") == 2 and "://" not in page
    assert (
        f">{rows['0.png']['label']}</bdi></h3>" in page and f"{100 * float(rows['0.png']['confidence']):.1f} %" in page
    )
    assert command.main([str(run), str(folder / "0.png"), "--format", "jsonl", "--open"]) == 0
    opened = json.loads(capsys.readouterr().out)
    assert opened["reply"] != "" and len(opened["top"]) == 5


@pytest.mark.slow
def test_new_pictures_are_not_kept(runner, tmp_path):
    """A run keeps decoded pictures of its dataset; what is asked later is nobody's dataset."""
    run, folder, cache = tmp_path / "run", tmp_path / "photos", tmp_path / "cache" / "pixels"
    for name in ("zero", "one"):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            Digits().open(str(number)).save(folder / name / f"{number}.png")
    asked = ["method=zeroshot", "data=folder", f"data.folder={folder}", f"cache_dir={tmp_path / 'cache'}", "shots=4"]
    assert runner(run, [*asked, "data.duplicates=ignore", "tracking=none", "tracking.report=false"]) == 0
    kept = sorted(path.name for path in cache.rglob("*.rgb"))
    assert kept, "the run has kept its own"
    classifier = Classifier.load(run)
    assert classifier({"new": Digits().open("50")})[0].reply
    classifier.close()
    assert sorted(path.name for path in cache.rglob("*.rgb")) == kept


@pytest.mark.slow
def test_what_cannot_be_asked_is_one_line(runner, tmp_path, capsys):
    run = tmp_path / "run"
    assert runner(run, ["method=clip_zero_shot", *QUICK]) == 0
    picture = tmp_path / "p.png"
    Digits().open("0").save(picture)
    assert command.main([str(run), str(picture), "--names", "a,b"]) == 2
    assert "names: the categories of method=clip_zero_shot are those" in capsys.readouterr().err
    result = json.loads((run / "metrics.json").read_text())
    result["weights"]["sha256"] = "other"
    (run / "metrics.json").write_text(json.dumps(result))
    assert command.main([str(run), str(picture)]) == 2
    assert "was made with other weights" in capsys.readouterr().err
    (run / "metrics.json").unlink()
    assert command.main([str(run), str(picture)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert command.main([str(run), str(tmp_path / "nothing" / "*.jpg")]) == 2
    assert "no picture is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--unkown", "0.1"], "unrecognized arguments: --unkown 0.1; did you mean --unknown?"),
        (["--zzz"], "unrecognized arguments: --zzz\n"),
    ],
)
def test_a_mistyped_option_is_told_from_the_right_one(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        command.main(["run", "picture.png", *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_pictures_are_found_by_folder_pattern_and_list(tmp_path):
    for name in ("a.png", "B.JPG", "deep/c.webp", "d.txt", ".e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert set(photos.find(str(tmp_path))) == {"a.png", "B.JPG", "deep/c.webp"}
    assert set(photos.find(str(tmp_path / "*.png"))) == {str(tmp_path / "a.png")}
    (tmp_path / "list.csv").write_text("\ufeffpath,label\na.png,x\ndeep/c.webp,\nmissing.png,\n")
    assert photos.find(str(tmp_path / "list.csv"))["deep/c.webp"] == tmp_path / "deep" / "c.webp"
    (tmp_path / "other.csv").write_text("picture\na.png\n")
    with pytest.raises(UserError, match="other.csv has no column 'path'; its header is 'picture', but path is needed$"):
        photos.find(str(tmp_path / "other.csv"))
    with pytest.raises(UserError, match="no picture is there"):
        photos.find(str(tmp_path / "none"))


def test_a_table_shows_no_column_that_is_empty_for_all_pictures():
    def titles(*answers):
        command.write_table(answers, file := StringIO())
        return [each.strip() for each in file.getvalue().splitlines()[1].strip("┃").split("┃")]

    sure = Answer("a.png", "owl", 0.9, (("owl", 0.9), ("ox", 0.1)))
    thought = Answer("b.png", "ox", 0.8, (("ox", 0.8),), "Horns.")
    assert titles(sure, thought) == ["picture", "answer", "sure", "else", "reasoning"]
    assert titles(sure) == ["picture", "answer", "sure", "else"]
    assert titles(thought) == ["picture", "answer", "sure", "reasoning"]
    assert titles() == ["picture", "answer"]


def test_what_a_page_of_answers_says_is_escaped(tmp_path):
    Image.new("RGB", (400, 200), "red").save(tmp_path / "a.png")
    bad = "<script>alert(1)</script>"
    answers = [Answer(bad, label=bad, top=((bad, 0.25),), reasoning=bad, candidates=(bad,)), Answer("b", error=bad)]
    about = cards.About(bad, bad, (bad, bad), bad, bad)
    page = cards.page(answers, {bad: tmp_path / "a.png", "b": b""}, about)
    head, _, rest = page.partition("<form")
    assert page.count("<script") == 1 and "alert(1)</script>" not in page
    assert head.count("&lt;script&gt;") == 7, "run (twice), title, two classes, measured, threshold"
    assert rest.count("&lt;script&gt;") == 9 and "width: 25.0%" in rest


def test_a_page_of_answers_says_how_far_to_trust_them(write, tmp_path):  # noqa: F811
    """45 images of which 35 are right after training, as its metrics.json says."""
    images, labels = [f"x/{n}" for n in range(45)], [NAMES[n % 3] for n in range(45)]
    wrong = dict(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True))
    said = [wrong[name] if n < 10 else name for n, name in enumerate(labels)]
    run = write("birds", answered(images, labels, labels, NAMES), answered(images, labels, said, NAMES))
    about = cards.About.of(run, run, ("a", "b"), None, None)
    assert about.run == "birds" and about.classes == ("a", "b") and about.title.count(" · ") == 4
    assert about.measured.startswith("77.8 % right on 45 test images of its own data (95 % interval ")
    assert about.abstains == "none: it always answers (--risk sets one)"
    assert "answers from 43.2 % on, for a risk of 5 %" in cards.About.of(run, run, (), 0.05, 0.432).abstains
    assert "no answer at all" in cards.About.of(run, run, (), 0.05, float("inf")).abstains
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    answers = [
        Answer("1", label="a", confidence=0.9, top=(("a", 0.9), ("b", 0.1))),
        Answer("2", abstained=True, confidence=0.3),
        Answer("3", error="cut"),
        Answer("4"),
    ]
    page = cards.page(answers, dict.fromkeys("1234", tmp_path / "a.png"), about)
    assert "4: 1 answered, 1 abstained, 1 none of the names, 1 cannot be read" in page
    assert '<option value="a">' in page and '<option value="b">' not in page, "a filter of what was answered"


def test_new_pictures_are_seen_as_those_of_the_dataset():
    """From a file, from memory and as an object of PIL, on the run's background."""
    ink = Image.new("LA", (4, 4), (255, 0))
    ink.putpixel((1, 1), (255, 255))
    levels = Image.fromarray(np.array([[0, 4095]], np.uint16))
    content = BytesIO()
    ink.save(content, "PNG")
    given = {"object": ink, "bytes": content.getvalue(), "levels": levels}
    for background, behind in (("white", 255), ("black", 0)):
        shelf = photos.Photos(background=background)
        shelf.show(given)
        for name in ("object", "bytes"):
            assert (
                shelf.open(name).getpixel((0, 0)) == (behind,) * 3 and shelf.open(name).getpixel((1, 1)) == (255,) * 3
            )
        assert np.asarray(shelf.open("levels"))[0, :, 0].tolist() == [0, 255]
    assert ink.mode == "LA" and ink.getpixel((0, 0)) == (255, 0), "what was given stays as it was"


@pytest.mark.slow
def test_a_few_shot_run_that_left_out_pictures_can_be_asked(runner, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FEWSHOT_CACHE", str(tmp_path / "cache"))
    run, folder = tmp_path / "run", tmp_path / "photos"
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            Image.new("L", (8, 8), 200 * label + number).save(folder / name / f"{number}.png")
    (folder / "light" / "3.png").write_bytes(b"no picture")
    Image.new("L", (8, 8), 9).save(new := tmp_path / "new.png")
    asked = ["method=linear_probe", "clip=none", "visual=pixels", "data=folder", f"data.folder={folder}", "shots=4"]
    usual = ["data.skip_bad=true", f"cache_dir={tmp_path / 'cache'}", "tracking=none", "tracking.report=false"]
    assert runner(run, [*asked, *usual]) == 0
    assert json.loads((run / "manifest.json").read_text())["left_out"] == ["folder/light/3.png"]
    assert command.main([str(run), str(new), "--format", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "dark"
    with ZipFile(tmp_path / "new.zip", "w") as file:
        file.write(new, "new/new.png")
    assert command.main([str(run), str(tmp_path / "new.zip"), "--format", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "dark"
    assert command.main([str(run), str(new), "--format", "coco", "--output", str(tmp_path / "a.json")]) == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert [each["name"] for each in written["categories"]] == ["dark", "light"]
    assert [each["category_id"] for each in written["annotations"]] == [1]


def test_what_is_fitted_anew_needs_the_pictures_that_its_run_saw(compose, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            Image.new("L", (8, 8), 200 * label + number).save(folder / name / f"{number}.bmp")
    (folder / "light" / "3.bmp").write_bytes(b"no picture")
    asked = ["method=linear_probe", "clip=none", "visual=pixels", "data=folder", f"data.folder={folder}", "shots=3"]
    config = validate(compose(*asked, "data.skip_bad=true", f"cache_dir={tmp_path / 'cache'}"))
    frozen = loading.readable(config)
    manifest.write(frozen.manifest, tmp_path / "manifest.json")
    run = TrainedModel(tmp_path, tmp_path, tmp_path / "model")
    monkeypatch.setattr(learner_class(config), "answers_alone", lambda config, folder: False)
    data = trained_model.data_of(run, config)
    assert data.task.train == frozen.task.train
    assert frozen.manifest["left_out"] == ["folder/light/3.bmp"] and "folder/light/3.bmp" not in data.images
    tested, used = (split.items[0].image for split in (frozen.task.evaluation["test"], frozen.task.train))
    Image.new("L", (8, 8), 150).save(folder / tested.removeprefix("folder/"))
    trained_model.data_of(run, config)  # a test image has no part in it
    Image.new("L", (8, 8), 150).save(folder / used.removeprefix("folder/"))
    with pytest.raises(UserError, match=f"that {tmp_path} was trained on, 1 changed since, first: {used}; put"):
        trained_model.data_of(run, config)


def test_a_new_picture_goes_before_the_datasets():
    red, shelf = Image.new("RGBA", (3, 2), "red"), photos.Photos(Digits())
    shelf.show({"0": red, "gone": "/nowhere/x.png"})
    assert shelf.open("0").size == (3, 2) and shelf.open("0").mode == "RGB" and shelf.open("1").size == (8, 8)
    with pytest.raises(BadImage):
        shelf.open("gone")
    with pytest.raises(BadImage, match="no such file"):
        shelf.stamp("gone")
    first = shelf.stamp("0")
    shelf.show({"0": Image.new("RGB", (3, 2), "blue")})
    assert shelf.stamp("0") != first, "other pixels under the same name are decoded anew"


@pytest.mark.parametrize("threshold", [None, 0.3, 0.5])
def test_an_answer_has_its_own_confidence_and_is_one_of_the_names(threshold):
    """By hand: names boot, bag; the second reply names neither, the third the less probable of both."""
    said = [("Boot", [0.4, 0.6]), ("one", [0.9, 0.1]), ("boot", [0.2, 0.8])]
    predictions = [Prediction(str(n), "", -1, answer, False, False) for n, (answer, _) in enumerate(said)]
    places, values = np.array([[1, 0]] * 3, np.int32), np.array([shares for _, shares in said], np.float32)
    asked = Classifier.__new__(Classifier)
    asked.threshold, asked.config, asked.calibrated = threshold, SimpleNamespace(method={}), Calibration()
    asked.unknown = None
    asked.data = SimpleNamespace(task=SimpleNamespace(evaluation={"test": Split((), ("boot", "bag"), "?", "?")}))
    table = Probabilities(("boot", "bag"), places, values)  # the first of each row is the bag's
    found = list(asked._read(Answers(predictions, 0.0, table)))
    assert [a.confidence for a in found] == [pytest.approx(0.6), None, pytest.approx(0.8)]
    assert [a.label for a in found] == ["boot", None, "boot"]
    assert [a.abstained for a in found] == [False, threshold is not None, False]
    asked.threshold = found[0].confidence  # `choose` gives one that an answer has: it is still given
    assert [a.abstained for a in asked._read(Answers(predictions, 0.0, table))] == [False, True, False]
    asked.threshold = float(np.nextafter(found[0].confidence, 1))
    assert [a.abstained for a in asked._read(Answers(predictions, 0.0, table))] == [True, True, False]
    asked.threshold = threshold
    assert found[0].top[0] == ("boot", pytest.approx(0.6)) and found[1].top[0] == ("bag", pytest.approx(0.9))
    asked.unknown = 0.05  # p-values of at most that: no name, and no abstention besides
    unlike = Answers(predictions, 0.0, table, columns={"p_value": [0.05, 0.051, 0.9]})
    assert [(a.label, a.unknown) for a in asked._read(unlike)] == [(None, True), (None, False), ("boot", False)]
    assert not any(a.abstained and a.unknown for a in asked._read(unlike))
    assert not any(a.unknown for a in asked._read(Answers(predictions, 0.0, table)))
    asked.unknown = None
    asked.threshold, asked.calibrated = None, Calibration(2.0)
    roots = 0.4**0.5 / (0.4**0.5 + 0.6**0.5)
    assert next(a.confidence for a in asked._read(Answers(predictions, 0.0, table))) == pytest.approx(1 - roots)
    asked.threshold, asked.calibrated = threshold, Calibration()
    asked.config = SimpleNamespace(method={"list_share": 0.0})  # the question lists no names: any word is an answer
    assert [a.label for a in asked._read(Answers(predictions[1:2], 0.0))] == [None if threshold else "one"]


@pytest.fixture
def held_out(write):  # noqa: F811
    """A run whose held-out answers are right, right, wrong, ... by confidence, or name no class."""

    def make(confidences, right, temperature=1.0, strange=0):
        images = [str(n) for n in range(len(right) + strange)]
        said = ["six" if each else "nine" for each in right] + ["horse"] * strange
        answers = answered(images, ["six"] * len(images), said, NAMES, [*confidences, *[0.99] * strange])
        run = write("run", answers)
        RunFolder(run).write_held_out("val", answers)
        result = Result.load(run)
        result.calibration = {"temperature": temperature, "source": "val", "n": len(images), "ece": {}}
        (run / "metrics.json").write_text(json.dumps(result.to_json()))
        return run

    return make


def test_what_is_no_class_name_has_no_part_in_the_threshold(held_out):
    """200 sure right answers, 50 less sure wrong ones, and 40 surest replies that name no class."""
    run = held_out([0.9] * 200 + [0.6] * 50, [True] * 200 + [False] * 50, strange=40)
    assert threshold_of(run, 0.05) == pytest.approx(0.9, abs=1e-6)
    assert threshold_of(run, 0.4) == pytest.approx(0.6, abs=1e-6)


def test_the_threshold_is_one_of_the_calibrated_confidence(held_out):
    run = held_out([0.9] * 200, [True] * 200, temperature=2.0)
    others = (0.1 / (len(NAMES) - 1)) ** 0.5 * (len(NAMES) - 1)
    assert threshold_of(run, 0.05) == pytest.approx(0.9**0.5 / (0.9**0.5 + others), abs=1e-6)


def test_too_few_answers_promise_no_risk(held_out):
    run = held_out([0.9] * 100, [True] * 100)
    with pytest.raises(UserError, match="risk=0.05 cannot be promised by 100 held-out answers .* at least 104 right"):
        threshold_of(run, 0.05)


def test_a_run_without_validation_images_has_no_threshold(write):  # noqa: F811
    run = write("run", answered(["a"], ["six"], ["six"], NAMES, [0.9]))
    with pytest.raises(UserError, match="no validation images with probabilities.*validation=held_out"):
        threshold_of(run, 0.05)
    for risk in (0.0, 1.0, 1.5):
        with pytest.raises(UserError, match=f"risk={risk} must be a share between 0 and 1"):
            threshold_of(run, risk)


@pytest.fixture
def moved(compose, tmp_path):
    """A run of ALERT over a few-shot draft, which looks at its training images again, and its photos."""
    folder, run = tmp_path / "photos", tmp_path / "run"
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            Image.new("L", (8, 8), 200 * label + number).save(folder / name / f"{number}.png")
    asked = [
        "method=alert",
        "model=tiny_gemma3",
        "few_shot=linear_probe",
        "method.draft=few_shot",
        "rewards=alert_no_judge",
    ]
    cfg = compose(*asked, "data=folder", f"data.folder={folder}", "shots=2", "validation=few", "tracking=none")
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(composition.plain(cfg)))
    manifest.write(task.build(composition.validate(cfg)).manifest, run / "manifest.json")
    return run, folder


def asked_again(run, data=None):
    trained = TrainedModel.of(run, data=data)
    return data_of(trained, config_of(trained))


def test_a_dataset_that_was_moved_is_read_where_it_is_now(moved, tmp_path):
    run, folder = moved
    before = asked_again(run).manifest
    (tmp_path / "elsewhere").mkdir()
    now = folder.rename(tmp_path / "elsewhere" / "mine")
    with pytest.raises(UserError, match=r"looks at the run's training images again.*--data <folder>"):
        asked_again(run)
    with pytest.raises(UserError, match=r"data=.*nowhere does not exist"):
        asked_again(run, tmp_path / "nowhere")
    again = asked_again(run, now)
    assert again.manifest["splits"] == before["splits"]
    assert again.task.images.open(again.task.train.items[0].image).size == (8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["another image", "an image less", "another class"])
def test_other_images_than_the_runs_are_refused(moved, change):
    """They would be fitted without a word: the folder is there, and holds pictures."""
    run, folder = moved
    rows = json.loads((run / "manifest.json").read_text())["splits"]["train"]["rows"]
    used = folder / rows[0][0].removeprefix("folder/")
    if change == "another image":
        used.rename(used.with_name("other.png"))
    elif change == "an image less":
        used.unlink()
    else:
        (folder / "light").rename(folder / "bright")
    with pytest.raises(
        UserError, match=r"these are not the images that .*manifest.json names: (train|val) (has|lacks)"
    ):
        asked_again(run, folder)


@pytest.mark.slow
def test_a_few_shot_run_answers_from_where_its_photos_are_now(runner, moved, tmp_path, capsys):
    run, folder = tmp_path / "probe", moved[1]
    asked = ["method=linear_probe", "clip=none", "visual=pixels", "data=folder", f"data.folder={folder}", "shots=4"]
    assert runner(run, [*asked, f"cache_dir={tmp_path / 'cache'}", "tracking=none", "tracking.report=false"]) == 0
    Image.new("L", (8, 8), 9).save(new := tmp_path / "new.png")
    said = []
    for words in ([], ["--data", str(folder.with_name("now"))]):
        assert command.main([str(run), str(new), "--format", "jsonl", *words]) == 0
        said.append(json.loads(capsys.readouterr().out))
        folder.exists() and folder.rename(folder.with_name("now"))
    assert said[0] == said[1] and said[0]["label"] == "dark"


def refused(what):
    raise UserError("nothing")
