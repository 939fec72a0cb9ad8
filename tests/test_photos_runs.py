"""experiment=photos from a folder to a classifier, as its user meets it."""

from __future__ import annotations

import csv
import json
import shutil
import socket
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from common import Classifier
from common.few_shot import doubts
from common.predict import cards
from common.report import __main__ as report
from common.report.html import doubts_page
from common.run.result import Result
from common.serve.page import Page
from common.serve.service import PredictionService
from common.types import UserError
from tests.test_browser import BROWSER

pytestmark = pytest.mark.slow

SIZES = {"blue_tit": 25, "robin": 12, "wren": 40, "kea": 1}
COLOURS = {"blue_tit": (60, 90, 200), "robin": (200, 80, 60), "wren": (120, 100, 60), "kea": (40, 160, 40)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Coloured noise, a colour for each class; one robin is called a wren, and a wren is in both parts."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, count in SIZES.items():
        (root / name).mkdir()
        for number in range(count):
            pixels = np.clip(rng.normal(COLOURS[name], 40, (24, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    swapped = np.clip(rng.normal(COLOURS["robin"], 40, (24, 32, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(swapped).save(root / "wren" / "swapped.png")
    return root


COMMAND = ["experiment=photos", "visual=pixels", "few_shot.repeats=1", "few_shot.folds=3"]


@pytest.fixture(scope="module")
def finished(runner, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "birds"
    assert runner(folder, [*COMMAND, f"data.folder={photos}"]) == 0
    return folder


def test_uneven_classes_are_used_whole_and_tested_once(finished):
    result = Result.load(finished)
    splits = json.loads((finished / "manifest.json").read_text())["splits"]
    assert {name: split["n"] for name, split in splits.items()} == {"train": 64, "test": 15}
    assert result.final["test"].images_per_class == {"blue tit": 5, "robin": 2, "wren": 8}
    assert result.final["test"].accuracy_macro is not None
    chosen = result.final["test"].facts["chosen"]
    rows = {row["learner"]: row["accuracy"] for row in chosen["cross_validated"]["learners"]}
    assert set(rows) == {"nearest_mean", "linear_probe", "tip_adapter", "tip_adapter_f"}
    assert rows[chosen["learner"]] > 0.9
    assert chosen["cross_validated"]["images"] == 63, "the only kea is always trained on"
    notes = json.loads((finished / "manifest.json").read_text())["notes"]
    assert "1 class has one image, which is trained on and not tested: kea" in notes


def test_what_is_wrong_is_listed_and_shown(finished):
    found = doubts.read(finished / "doubts.csv")
    assert found[0].path == "wren/swapped.png" and (found[0].label, found[0].suggestion) == ("wren", "robin")
    page = doubts_page.make(finished).read_text()
    assert "wren/swapped.png" in page and "data:image/webp" in page


def test_it_answers_with_calibrated_confidences_and_promises_no_risk_by_few_photos(finished, photos):
    classifier = Classifier.load(finished)
    (answer,) = classifier([photos / "robin" / "00.png"])
    classifier.close()
    assert answer.label == "robin" and 0.5 < answer.confidence < 1
    calibration = Result.load(finished).calibration
    assert calibration["source"] == "folds" and calibration["n"] == 63 and set(calibration["ece"]) == {"test"}
    assert set(Result.load(finished).novelty["found"]) == {"blue tit", "robin", "wren", "kea"}
    with pytest.raises(UserError, match="risk=0.02 cannot be promised by 63 held-out answers"):
        Classifier.load(finished, risk=0.02)


def test_a_photo_of_another_kind_is_called_unknown(finished, photos, tmp_path):
    """Green photos, of which there is one in the dataset; the others keep their names."""
    rng = np.random.default_rng(5)
    green = np.clip(rng.normal((250, 250, 20), 5, (24, 32, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(green).save(tmp_path / "green.png")
    classifier = Classifier.load(finished, unknown=0.05)
    answers = classifier([photos / "wren" / "03.png", photos / "robin" / "02.png", tmp_path / "green.png"])
    classifier.close()
    assert [(answer.label, answer.unknown) for answer in answers] == [("wren", False), ("robin", False), (None, True)]
    assert answers[2].p_value == pytest.approx(1 / 64) and answers[2].top and not answers[2].abstained
    assert cards._kind(answers[2]) == "unknown"


@pytest.mark.faults
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_what_is_corrected_on_the_page_is_trained_on(runner, finished, photos, tmp_path, capsys):
    """Serve, correct in a browser, train again with the word that the page names, compare."""
    from playwright.sync_api import expect, sync_playwright

    rng = np.random.default_rng(6)
    for number in range(2):
        pixels = np.clip(rng.normal(COLOURS["kea"], 40, (24, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"new {number}.png")
    classifier = Classifier.load(finished)
    (tmp_path / "uploads").mkdir()
    page_of_run = Page(
        PredictionService(classifier, tmp_path / "feedback"), cards.about(classifier, None), tmp_path / "uploads"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = page_of_run.launch("127.0.0.1", port)
    try:
        with sync_playwright() as playwright:
            page = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"]).new_page()
            page.goto(server.local_url)
            expect(page.locator(".about")).to_contain_text("4: blue tit, kea, robin, wren")
            accuracy = Result.load(finished).final["test"].accuracy
            expect(page.locator(".about")).to_contain_text(f"{100 * accuracy:.1f} % right on 15 test images")
            page.set_input_files("input[type=file]", [tmp_path / f"new {number}.png" for number in range(2)])
            expect(page.locator(".answer")).to_have_count(2, timeout=60_000)
            for number in range(2):
                page.get_by_label("Picture").fill(f"new {number}.png")
                page.get_by_label("Picture").press("Enter")
                page.wait_for_timeout(1000)  # the field of the right name gets the answer to this picture
                assert page.get_by_label("Right name").input_value() in ("blue tit", "robin", "wren", "kea", "")
                page.get_by_label("Right name").fill("kea")
                page.get_by_label("Right name").press("Enter")
                page.get_by_role("button", name="Save correction").click()
                said = page.locator("code", has_text="data.reader.corrections=")
                expect(said).to_be_visible(timeout=20_000)
                word = said.inner_text()
                expect(page.get_by_text(f"new {number}.png: saved as kea")).to_be_visible(timeout=20_000)
            page.context.browser.close()
    finally:
        server.close()
        classifier.close()
    assert len(list((tmp_path / "feedback" / "pictures").iterdir())) == 2
    again = tmp_path / "again"
    assert runner(again, [*COMMAND, f"data.folder={photos}", word]) == 0
    before, after = (
        Counter(
            row[1]
            for split in json.loads((run / "manifest.json").read_text())["splits"].values()
            for row in split["rows"]
        )
        for run in (finished, again)
    )
    assert {name: after[name] - before[name] for name in after} == {0: 0, 1: 2, 2: 0, 3: 0}, "two keas more"
    tested = [json.loads((run / "manifest.json").read_text())["splits"]["test"]["rows"] for run in (finished, again)]
    assert tested[0] == tested[1], "what was added is trained on alone"
    assert report.main(["compare", str(finished), str(again)]) == 0
    assert "best_of" in capsys.readouterr().out


def test_corrections_are_given_back(runner, finished, photos, tmp_path):
    rows = list(csv.DictReader((finished / "doubts.csv").open()))
    rows[0]["label"] = "robin"
    with (tmp_path / "doubts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        # a photo of the training, added under another class: a copy with another label, but labelled by hand
        writer.writerow({"path": "new.png", "label": "robin"})
    shutil.copy(photos / "wren" / "00.png", tmp_path / "new.png")
    again = tmp_path / "again"
    words = [*COMMAND, f"data.folder={photos}", f"data.reader.corrections={tmp_path / 'doubts.csv'}"]
    assert runner(again, words) == 0
    doubted = doubts.read(again / "doubts.csv")
    assert "wren/swapped.png" not in {each.path for each in doubted}
    assert not any("new.png" in (each.path + each.other) for each in doubted)
    before, after = (json.loads((run / "manifest.json").read_text()) for run in (finished, again))
    assert before["hash"] != after["hash"]
