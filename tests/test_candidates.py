"""Candidates of a draft: selection against sorting by hand, the oracle, and files."""

from __future__ import annotations

import json
import random
import zipfile
from collections import Counter

import numpy as np
import pytest

from alert.draft import class_mean_logits, oracle_recall
from alert.references import class_means
from common.few_shot import candidates as module
from common.few_shot.candidates import (
    Candidates,
    Origin,
    join,
    rank,
    read_candidates,
    recall_at,
    select,
    write_candidates,
)
from common.types import UserError

NAMES = ("crane", "missile", "ox", "Missile", "fox", "crane ")  # 0 and 5, 1 and 3 share a name
LABELS = [name.strip().lower() for name in NAMES]
DRAFT = Origin("class_means", "digits", 16, 1)


def by_hand(row, k, labels):
    """Sort by logit, then index; skip what shares a name with something before."""
    chosen = []
    for label in sorted(range(len(row)), key=lambda label: (-row[label], label)):
        if labels[label] not in [labels[c] for c in chosen]:
            chosen.append(label)
    return chosen[:k]


@pytest.fixture
def logits():
    """300 images, 6 classes, few different values: most rows have ties."""
    return np.random.default_rng(0).integers(0, 4, (300, 6)) / 4


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16], ids=lambda t: t.__name__)
@pytest.mark.parametrize(("names", "labels"), [(None, range(6)), (NAMES, LABELS)], ids=["different", "shared"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_select_equals_sorting_by_hand(logits, k, names, labels, dtype):
    expected = [by_hand(row, k, labels) for row in logits.tolist()]
    assert select(logits.astype(dtype), k, names).tolist() == expected


def test_select_in_parts(logits, monkeypatch):
    whole = select(logits, 3, NAMES)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert (select(logits, 3, NAMES) == whole).all()


def test_select_of_many_equal_logits_keeps_the_order_of_classes():
    assert select(np.zeros((2, 1000)), 16).tolist() == [list(range(16))] * 2  # unstable sorts fail from 17 on


def test_select_of_masked_classes_and_of_no_image():
    assert select([[-np.inf, 0.0, -np.inf]], 2).tolist() == [[1, 0]]
    assert select(np.zeros((0, 3)), 2).shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0, 2.0]], 3), UserError, "method.k=3, but only 2 class names are different; use method.k=2"),
        (([[1.0] * 6], 5, NAMES), UserError, "method.k=5, but only 4 class names"),
        (([[1.0, 2.0]], 0), UserError, "method.k=0 must be 1 or more"),
        (([[1.0, np.nan]], 1), ValueError, "without NaN"),
        (([1.0, 2.0], 1), ValueError, r"shape \(2,\); expected \[N, C\]"),
        (([[1.0, 2.0]], 1, NAMES), ValueError, "2 logits per image, but 6 names"),
    ],
    ids=["k above classes", "k above names", "k 0", "nan", "one dimension", "names"],
)
def test_select_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        select(*arguments)


def keys(number):
    return tuple(f"digits/{place}" for place in range(number))


def test_rank_keeps_what_there_is(logits):
    made = rank(keys(300), logits, NAMES, DRAFT)
    for place, (image, row) in enumerate(zip(keys(300), logits.tolist(), strict=True)):
        expected = by_hand(row, 4, LABELS)
        assert made.ranking(image) == tuple(expected)
        assert made.logits[place].tolist() == [row[c] for c in expected]
    assert rank(keys(1), np.zeros((1, 40)), [str(c) for c in range(40)], DRAFT).indices.shape == (1, 16)


def test_shown_by_rank_and_shuffled():
    made = rank(keys(1000), np.tile([3.0, 2.0, 1.0, 0.0], (1000, 1)), "abcd", DRAFT)
    assert {made.shown(image, 3) for image in made.images} == {(0, 1, 2)}
    orders = Counter(made.shown(image, 3, "shuffle") for image in made.images)
    assert len(orders) == 6 and min(orders.values()) > 120  # 167 expected, 4 standard deviations
    backwards = Candidates(made.images[::-1], made.indices, made.logits, DRAFT)
    assert all(made.shown(i, 3, "shuffle") == backwards.shown(i, 3, "shuffle") for i in keys(50))


def test_a_shuffle_belongs_to_the_image_alone():
    random.seed(0)
    made = rank(("digits/17",), [[3.0, 2.0, 1.0, 0.0]], "abcd", DRAFT)
    expected = [0, 1, 2, 3]
    random.Random("candidates-digits/17").shuffle(expected)
    assert made.shown("digits/17", 4, "shuffle") == tuple(expected)


@pytest.mark.parametrize(
    ("k", "order", "message"),
    [
        (5, "rank", "method.k=5, but only 4 are kept of each image"),
        (0, "rank", "method.k=0 must be 1 or more"),
        (2, "random", "method.order=random: choose one of rank, shuffle"),
    ],
    ids=["too many", "none", "order"],
)
def test_shown_refuses(k, order, message):
    made = rank(keys(1), [[3.0, 2.0, 1.0, 0.0]], "abcd", DRAFT)
    with pytest.raises(UserError, match=message):
        made.shown(made.images[0], k, order)


def test_candidates_refuse_what_does_not_fit():
    two = np.zeros((2, 1))
    with pytest.raises(ValueError, match="an image occurs twice"):
        Candidates(("a", "a"), two.astype(int), two, DRAFT)
    with pytest.raises(ValueError, match="1 images, indices of shape"):
        Candidates(("a",), two.astype(int), two, DRAFT)


# --- drafts


def test_class_mean_draft_is_the_cosine():
    rng = np.random.default_rng(1)
    features, means = rng.normal(size=(5, 3)), class_means(rng.normal(size=(8, 3)), [0, 1] * 4, 2)
    found = class_mean_logits(features.astype(np.float32), means)
    for i, j in np.ndindex(5, 2):
        cosine = features[i] @ means[j] / np.linalg.norm(features[i]) / np.linalg.norm(means[j])
        assert found[i, j] == pytest.approx(cosine, abs=1e-6)


def test_parts_are_joined_in_the_order_of_the_images():
    logits = np.random.default_rng(1).normal(size=(5, 4))
    parts = [rank([f"{i}" for i in rows], logits[rows], "wxyz", DRAFT) for rows in ([0, 4], [1, 3], [2])]
    found, whole = join(parts, ["3", "0", "1", "2", "4"]), rank(list("30124"), logits[[3, 0, 1, 2, 4]], "wxyz", DRAFT)
    assert found.images == whole.images and found.origin == DRAFT
    assert np.array_equal(found.indices, whole.indices) and np.array_equal(found.logits, whole.logits)


@pytest.mark.parametrize("feature", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]], ids=str)
def test_class_mean_draft_refuses_features_without_a_direction(feature):
    with pytest.raises(ValueError, match="image number 1 has length"):
        class_mean_logits([[1.0, 0.0], feature], np.eye(2))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_oracle_always_has_the_truth_and_the_hardest_others(logits, k):
    truths = np.random.default_rng(2).integers(0, 6, 300)
    made = oracle_recall(keys(300), logits, truths, k, NAMES, DRAFT)
    for image, row, truth in zip(made.images, logits.tolist(), truths.tolist(), strict=True):
        hardest = [c for c in by_hand(row, 6, LABELS) if LABELS[c] != LABELS[truth]][: k - 1]
        assert made.ranking(image) == tuple(sorted([truth, *hardest], key=lambda c: (-row[c], c)))
    assert recall_at(made, NAMES, truths.tolist())[f"recall@{k}"] == 1
    assert made.origin == Origin("oracle_recall of class_means", "digits", 16, 1, uses_labels=True)
    assert logits.max() < 1, "the logits of the draft stay as they are"


# --- files


@pytest.fixture
def saved(tmp_path):
    """Three images, four classes, on disk; truths are at rank 1, 2 and 4."""
    made = rank(("d/a.png", "d/b.png", "d/ü.png"), [[9, 1, 2, 3], [1, 2, 3, 4], [5, 4.5, 4.25, 4]], "wxyz", DRAFT)
    facts = write_candidates(tmp_path / "s1" / "test.v2", made, "wxyz", [0, 2, 3])
    return tmp_path / "s1" / "test.v2", made, facts


@pytest.mark.parametrize("suffix", ["", ".npz", ".json"], ids=["stem", "npz", "json"])
def test_what_is_read_is_what_was_written(saved, suffix):
    path, *_ = saved
    found = read_candidates(path.with_name(path.name + suffix), ("d/ü.png", "d/a.png"), "wxyz", "digits", "test")
    assert found.images == ("d/ü.png", "d/a.png") and found.origin == DRAFT
    assert found.ranking("d/ü.png") == (0, 1, 2, 3) and found.ranking("d/a.png") == (0, 3, 2, 1)
    assert found.logits.tolist() == [[5, 4.5, 4.25, 4], [9, 3, 2, 1]]
    assert found.indices.dtype == np.int64 and found.logits.dtype == np.float64
    assert sorted(file.name for file in path.parent.iterdir()) == ["test.v2.json", "test.v2.npz"]


def test_content_of_the_files(saved):
    path, made, facts = saved
    with np.load(path.with_name("test.v2.npz")) as arrays:
        assert arrays["image_id"].tolist() == list(made.images)
        assert arrays["topk_idx"].tolist() == [[0, 3, 2, 1], [3, 2, 1, 0], [0, 1, 2, 3]]
        assert arrays["topk_logit"].dtype == np.float32
    assert json.loads(path.with_name("test.v2.json").read_text()) == facts
    assert (facts["method"], facts["dataset"], facts["shots"], facts["seed"]) == ("class_means", "digits", 16, 1)
    shares = {1: 1 / 3, 2: 2 / 3, 3: 2 / 3, 4: 1, 5: 1, 8: 1, 16: 1}
    assert {k: facts[f"recall@{k}"] for k in shares} == shares


def test_the_same_content_has_the_same_hash(saved, tmp_path):
    _, made, facts = saved
    again = write_candidates(tmp_path / "again", made, "wxyz", [0, 2, 3])
    assert again == facts
    other = write_candidates(
        tmp_path / "other", Candidates(made.images, made.indices, made.logits + 1, DRAFT), "wxyz", [0, 2, 3]
    )
    assert other["arrays_sha256"] != facts["arrays_sha256"]


def test_recall_counts_classes_of_the_same_name():
    made = rank(("a",), [[0.0, 5.0, 1.0, 4.0, 3.0, 2.0]], NAMES, DRAFT)  # missile (1), fox, crane (5), ox
    assert made.ranking("a") == (1, 4, 5, 2)
    assert recall_at(made, NAMES, [3])["recall@1"] == 1
    assert [recall_at(made, NAMES, [0])[f"recall@{k}"] for k in (1, 2, 3)] == [0, 0, 1]


def test_recall_beyond_what_is_kept_is_left_out(logits):
    made = Candidates(("a",), np.array([[0, 1]]), np.zeros((1, 2)), DRAFT)
    assert recall_at(made, "abc", [2]) == {"recall@1": 0, "recall@2": 0}


def damage_json(path, **changes):
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (facts | changes).items() if value is not None}))


def without_array(data, name):
    with zipfile.ZipFile(data) as archive:
        kept = {part: archive.read(part) for part in archive.namelist() if part != f"{name}.npy"}
    with zipfile.ZipFile(data, "w") as archive:
        for part, content in kept.items():
            archive.writestr(part, content)


def other_arrays(data, text):
    np.savez(data, image_id=np.array(["d/a.png"]), topk_idx=np.array([[0]]), topk_logit=np.array([[1.0]]))


DAMAGE = {
    "no npz": (lambda data, text: data.unlink(), r"test.v2.npz cannot be read \(No such file"),
    "no json": (lambda data, text: text.unlink(), r"test.v2.json cannot be read \(No such file"),
    "npz cut": (lambda data, text: data.write_bytes(data.read_bytes()[:500]), "test.v2.npz is no .npz file or was not"),
    "npz empty": (lambda data, text: data.write_bytes(b""), "test.v2.npz is no .npz file"),
    "npz is text": (lambda data, text: data.write_text("hello"), "test.v2.npz is no .npz file"),
    "npz is npy": (lambda data, text: np.save(data.open("wb"), np.zeros(3)), "test.v2.npz is no .npz file"),
    "npz without ranking": (lambda data, text: without_array(data, "topk_idx"), "test.v2.npz lacks one of image_id"),
    "npz of another write": (other_arrays, "test.v2.npz and test.v2.json do not belong together"),
    "json cut": (lambda data, text: text.write_text(text.read_text()[:50]), "test.v2.json is not JSON"),
    "json list": (lambda data, text: text.write_text("[]"), "test.v2.json must hold an object, not a list"),
    "json without seed": (lambda data, text: damage_json(text, seed=None), "test.v2.json lacks 'seed'"),
    "other dataset": (lambda data, text: damage_json(text, dataset="dtd"), "is for data=dtd, not digits"),
    "other name": (lambda data, text: damage_json(text, names=["w", "q", "y", "z"]), "calls class 1 'q', the run 'x'"),
    "fewer names": (lambda data, text: damage_json(text, names=["w"]), "has 1 class, the run 4"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_files_that_cannot_be_used_are_named_in_one_line(saved, damage, message):
    path, *_ = saved
    damage(path.with_name("test.v2.npz"), path.with_name("test.v2.json"))
    with pytest.raises(UserError, match=message) as error:
        read_candidates(path, ("d/a.png",), "wxyz", "digits", "test")
    assert str(error.value).startswith("method.draft_file: ") and "\n" not in str(error.value)


def test_missing_images_are_counted_and_the_first_is_named(saved):
    images = ("d/a.png", "d/c.png", "d/e.png")
    with pytest.raises(UserError, match=r"for d/c.png \(2 of 3 images of 'test' are missing\).* SPLIT .* its name$"):
        read_candidates(saved[0], images, "wxyz", "digits", "test")


def test_images_to_watch_need_candidates_too(saved):
    with pytest.raises(UserError, match=r"1 of 1 image of 'val' is missing\).* SPLIT .*validation=none"):
        read_candidates(saved[0], ("d/c.png",), "wxyz", "digits", "val")
    with pytest.raises(UserError, match=r"val\.json is missing; .* watch none with validation=none"):
        read_candidates(saved[0].with_name("val"), ("d/c.png",), "wxyz", "digits", "val")


def test_a_place_that_cannot_be_written(saved, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="candidates cannot be written to .*taken/test.npz"):
        write_candidates(tmp_path / "taken" / "test", saved[1], "wxyz", [0, 2, 3])
