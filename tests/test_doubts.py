"""What may be wrong with own photos: planted faults, the table of corrections, and the page."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from common.data import folder
from common.data.duplicates import thumbnail
from common.data.listing import Location
from common.few_shot import doubts, learner
from common.few_shot.doubts import Doubt, Examined
from common.predict.__main__ import write_csv
from common.predict.classifier import Answer
from common.types import Answers, Prediction, UserError


def photos(seed=0, classes=4, each=30, width=16):
    """Separable features, with probabilities that agree with the true class."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(classes), each)
    features = 4 * rng.normal(size=(classes, width))[truth] + rng.normal(size=(len(truth), width))
    sure = rng.uniform(0.6, 0.95, len(truth))
    probabilities = np.full((len(truth), classes), 0.0) + ((1 - sure) / (classes - 1))[:, None]
    probabilities[np.arange(len(truth)), truth] = sure
    return truth, features, probabilities


def find(given, features, probabilities, parts=None, thumbnails=None):
    paths = [f"{n}.png" for n in range(len(given))]
    if thumbnails is None:
        thumbnails = np.eye(len(given))
    examined = Examined(paths, parts or ["train"] * len(given), given, probabilities, features, thumbnails)
    return doubts.find(examined, ("ant", "bee", "cow", "dog"))


def test_nothing_is_doubted_where_nothing_is_wrong():
    assert [d for d in find(*photos()) if d.reason != "outlier"] == []


def test_very_unlikely_labels_keep_their_order():
    """Logits that are 150 and 250 apart: probabilities of 7e-66 and 3e-109, both 0 in fp32."""
    logits = np.array([[250.0, 0.0, 0.0], [0.0, 150.0, 0.0], [9.0, 0.0, 0.0]], np.float32)
    names = ("ant", "bee", "cow")
    made = [
        Prediction(f"{n}.jpg", "", "cow", name, name == "cow", name == "cow")
        for n, name in enumerate(("ant", "bee", "ant"))
    ]
    rows = learner.rows_of(Answers(made, 0.0, learner.probabilities(logits, names, names)))
    assert doubts.labels(np.array([2, 2, 0]), rows).quality.argsort().tolist() == [0, 1, 2]
    np.testing.assert_allclose(rows[:2, 2], np.exp([-250.0, -150.0]), rtol=1e-4)


def test_swapped_labels_come_first_with_what_they_are_taken_for():
    truth, features, probabilities = photos()
    given, swapped = truth.copy(), [3, 40, 100]
    given[swapped] = [1, 0, 2]
    probabilities[swapped] = 0.01  # of all but the true class
    probabilities[swapped, truth[swapped]] = 0.97
    found = [d for d in find(given, features, probabilities) if d.reason != "outlier"]
    assert [(d.path, d.label, d.suggestion, d.reason) for d in sorted(found, key=lambda d: int(d.path[:-4]))] == [
        ("3.png", "bee", "ant", "label"),
        ("40.png", "ant", "bee", "label"),
        ("100.png", "cow", "dog", "label"),
    ]
    assert [d.score for d in found] == sorted(d.score for d in found)


def test_what_is_taken_for_another_class_comes_after_what_is_probably_wrong():
    """Cleanlab counts only confident contradictions; the others are shown, too."""
    truth, features, probabilities = photos()
    given = truth.copy()
    given[[3, 40]] = [1, 0]
    for place, own in ((3, 0.01), (40, 0.3)):
        probabilities[place] = own / 3
        probabilities[place, given[place]], probabilities[place, truth[place]] = own, 1 - own * 5 / 3
    found = [d for d in find(given, features, probabilities) if d.reason != "outlier"]
    assert [(d.path, d.reason, d.suggestion) for d in found] == [
        ("3.png", "label", "ant"),
        ("40.png", "disagreement", "bee"),
    ]


def test_a_photo_without_held_out_probabilities_is_not_judged():
    truth, features, probabilities = photos()
    given, probabilities = truth.copy(), probabilities.copy()
    given[3], probabilities[3] = 1, np.nan
    assert "3.png" not in {d.path for d in find(given, features, probabilities) if d.reason != "outlier"}


def test_an_outlier_is_unlike_all_others():
    truth, features, probabilities = photos()
    features = np.concatenate([features, 30 * np.eye(16)[3:4]])
    found = find(np.append(truth, 0), features, np.concatenate([probabilities, probabilities[:1]]))
    assert found[0].path == "120.png" and {d.reason for d in found} == {"outlier"} and found[0].score > 2
    assert len(found) <= 6, "few of the others are called so"


def test_the_outlier_factor_is_the_mean_density_of_the_neighbours_over_ones_own():
    """By its definition, on few dimensions, where the principal components keep all distances."""
    rows = np.random.default_rng(0).normal(size=(30, 3))
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    near = distances.argsort(1)[:, 1:11]
    reach = distances[np.arange(30), near[:, -1]]
    density = np.array([1 / np.maximum(reach[near[n]], distances[n, near[n]]).mean() for n in range(30)])
    expected = density[near].mean(1) / density
    np.testing.assert_allclose(doubts.outlyingness(rows), expected, rtol=1e-6)
    assert doubts.outlyingness(rows[:2]).tolist() == [1, 1]


def test_copies_are_named_across_parts_and_labels_only():
    truth, features, probabilities = photos()
    given = np.concatenate([truth, [0, 1, 3]])
    parts = ["train"] * 120 + ["train", "test", "train"]
    thumbnails = np.concatenate([np.eye(120), np.eye(120)[[0, 31, 62]]])
    features = np.concatenate([features, features[[0, 31, 93]]])
    found = find(given, features, np.concatenate([probabilities, probabilities[[0, 31, 93]]]), parts, thumbnails)
    copies = {(d.path, d.other, d.reason) for d in found if d.other}
    assert copies == {("31.png", "121.png", "copy"), ("62.png", "122.png", "copy, other label")}
    assert all(d.score == 1.0 for d in found if d.other)


def test_a_photo_that_was_edited_and_saved_anew_is_a_copy():
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((80, 60), 3) for _ in range(8)]
    file = io.BytesIO()
    ImageEnhance.Brightness(pictures[2].resize((200, 150))).enhance(1.15).save(file, "JPEG", quality=70)
    rows = np.stack([thumbnail(each) for each in [*pictures, Image.open(file)]])
    assert [(a, b) for a, b, _ in doubts.copies(rows)] == [(2, 8)]
    grey = [np.asarray(each.convert("L").resize((32, 32), Image.Resampling.BICUBIC), float) for each in pictures[:2]]
    assert rows[0] @ rows[1] == pytest.approx(np.corrcoef(grey[0].ravel(), grey[1].ravel())[0, 1], abs=1e-9)


def test_few_photos_are_judged_as_far_as_that_goes():
    truth, features, probabilities = photos(each=2)
    assert {d.reason for d in find(truth, features, probabilities)} <= {"outlier"}
    probabilities[0] = [0.01, 0.97, 0.01, 0.01]
    assert [d.path for d in find(truth, features, probabilities) if d.reason in ("label", "disagreement")] == ["0.png"]


def test_answers_of_predict_are_given_back_as_they_are_written(tmp_path, dataset):
    """Its columns image and label count; a row without an answer is passed over."""
    new = tmp_path / "new"
    new.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(new / name)
    with (new / "answers.csv").open("w", newline="") as file:
        write_csv([Answer("a.png", "blue tit", 0.9, (("blue tit", 0.9),)), Answer("b.png", abstained=True)], file)
    found, _ = labelled(dataset, new / "answers.csv")
    assert found.pop("corrections/a.png") == "blue_tit" and "corrections/b.png" not in found and len(found) == 5


def test_classes_are_told_apart_or_not():
    given = np.repeat([0, 1, 2], 10)
    answers = np.array([1] * 4 + [0] * 6 + [0] * 2 + [1] * 8 + [2] * 9 + [0])
    assert doubts.confused(given, np.eye(3)[answers]) == [(0, 1, 6)]


def test_the_table_is_read_as_it_was_written(tmp_path):
    found = [
        Doubt("a, b.png", "ant", "bee", "label", 0.01, "", "train"),
        Doubt("c", "ant", "", "copy", 1.0, "d", "test"),
    ]
    doubts.write(found, tmp_path / "doubts.csv")
    assert doubts.read(tmp_path / "doubts.csv") == found


@pytest.fixture
def dataset(tmp_path):
    root = tmp_path / "photos"
    for name in ("blue_tit/1", "blue_tit/2", "wren/1", "wren/2", "wren/3"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / f"{name}.png")
    return root


def labelled(root, corrections):
    source = folder.read(Location("folder", root, root), corrections=str(corrections))
    return {item.image: item.name for item in source.train}, source


@pytest.mark.parametrize("written", ["blue_tit", "blue tit"])
def test_corrections_change_take_out_and_add(tmp_path, dataset, written):
    table = tmp_path / "given back" / "doubts.csv"
    (table.parent / "pictures").mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(table.parent / "pictures" / "new.png")
    rows = [f"wren/1.png,{written}", "wren/1.png,wren", "wren/2.png,wren", "blue_tit/1.png,", "pictures/new.png,robin"]
    table.write_text("\n".join(["path,label", *rows]))
    found, source = labelled(dataset, table)
    assert found == {
        "folder/blue_tit/2.png": "blue_tit",
        "folder/wren/1.png": "blue_tit",
        "folder/wren/2.png": "wren",
        "folder/wren/3.png": "wren",
        "corrections/pictures/new.png": "robin",
    }
    assert source.names == ("blue_tit", "robin", "wren")
    assert source.images.open("corrections/pictures/new.png").getpixel((0, 0)) == (255, 0, 0)
    assert source.fingerprint != folder.read(Location("folder", dataset, dataset)).fingerprint


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["wren/9.png,wren"], "row 2: wren/9.png is no photo of .*, and no file beside the table"),
        (["wren/1.png,robin", "wren/1.png,tit"], "row 3: wren/1.png has another label in an earlier row"),
        (["blue_tit/1.png,", "blue_tit/2.png,"], "has 1 class; a task needs two or more"),
    ],
)
def test_corrections_that_cannot_be_meant_are_refused(tmp_path, dataset, rows, said):
    table = tmp_path / "doubts.csv"
    table.write_text("\n".join(["path,label", *rows]))
    with pytest.raises(UserError, match=said):
        labelled(dataset, table)
    with pytest.raises(UserError, match="corrections=.*gone.csv does not exist"):
        labelled(dataset, tmp_path / "gone.csv")
