"""Pictures that a task has twice: which are found, what is read for it, and what a run makes of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import cdist

from common.config.composition import plain, signature, validate
from common.data import duplicates, loading, manifest, task
from common.data.digits import Digits
from common.types import Item, Split, Task, UserError


def test_groups_may_have_more_than_two_and_keep_the_order():
    assert duplicates.equal({key: value for key, value in zip("fedcba", "312121", strict=True)}) == [
        ("e", "c", "a"),
        ("d", "b"),
    ]


def test_digits_are_compared_by_their_pixels():
    keys = [str(number) for number in range(1797)]
    assert Digits().size("0") == 64 and len(Digits().content("0")) == 64 == 2 * len(Digits().content("0", 32))
    assert len({Digits().stamp(key) for key in keys}) == len({Digits().content(key) for key in keys}) == 1797


def fields(*rows):
    """A picture of the size that is compared, of these grey levels."""
    return Image.fromarray(np.array(rows, np.uint8))


def test_the_bits_of_a_difference_hash():
    up = list(range(0, 90, 10))  # nine fields, each brighter than the one before: eight ones
    zigzag = [0, 100, 0, 100, 0, 100, 0, 100, 0]
    found = duplicates.difference_hash(fields(up, up[::-1], zigzag, *[[50] * 9] * 5))
    assert found == bytes([0b11111111, 0b00000000, 0b10101010, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(("levels", "hashed"), [(8, True), (7, False), (0, False)])
def test_a_picture_of_one_colour_has_no_hash(levels, hashed):
    grey = np.full((8, 9), 100)
    grey[:, 4:] += levels
    assert (duplicates.difference_hash(fields(*grey)) is not None) == hashed


def test_pairs_that_look_alike_equal_scipy(monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK", 7)
    rng = np.random.default_rng(0)
    bits = rng.random((40, 64)) < 0.5
    for row in range(20):  # the others are near to these: in as many bits as the number of the row, or fewer
        bits[20 + row] = bits[row] ^ np.isin(np.arange(64), rng.integers(0, 64, row))
    hashes = {str(row): np.packbits(one).tobytes() for row, one in enumerate(bits)} | {"flat": None}
    distances = cdist(bits, bits, "hamming") * 64
    for distance in (0, 4, 10):
        expected = {(str(a), str(b)) for a, b in np.argwhere(distances <= distance + 1e-9) if a < b}
        assert set(duplicates.alike(hashes, distance)) == expected and expected
    assert duplicates.alike({"flat": None}) == []


def photo(seed, size=(96, 64)):
    """Something with shapes, unlike noise: eight blurred fields by eight."""
    fields = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize(size, Image.Resampling.BICUBIC)


def test_other_sizes_and_qualities_look_alike_and_other_photos_do_not(tmp_path):
    photo(1).save(tmp_path / "poor.jpg", quality=30)
    with Image.open(tmp_path / "poor.jpg") as poor:
        variants = {
            "small": photo(1).resize((48, 32)),
            "square": photo(1).resize((70, 70)),
            "poor": poor.convert("RGB"),
        }
    hashes = {name: duplicates.difference_hash(one) for name, one in {"photo": photo(1), **variants}.items()}
    others = {f"other {seed}": duplicates.difference_hash(photo(seed)) for seed in range(2, 60)}
    assert len(duplicates.alike(hashes)) == 6, "all pairs of four"
    assert duplicates.alike(others | {"photo": hashes["photo"]}) == []


def test_things_on_a_plain_ground_are_no_copies():
    """A dress and trousers: the brightness rises and falls at the same places, but the pictures differ."""
    ground = np.zeros((64, 64), np.uint8)
    dress, trousers = ground.copy(), ground.copy()
    dress[8:60, 18:46] = 200
    trousers[8:60, 18:46], trousers[26:60, 30:34] = 120, 0
    pictures = {"dress": Image.fromarray(dress), "trousers": Image.fromarray(trousers)}
    pictures["again"] = pictures["dress"].resize((48, 48))
    hashes = {name: duplicates.difference_hash(one) for name, one in pictures.items()}
    pairs = duplicates.alike(hashes, 12)
    assert len(pairs) == 3, "their hashes are near"
    assert duplicates.confirmed(pairs, pictures.__getitem__) == [("dress", "again")]


def split(*items, names=("cat", "dog")):
    return Split(tuple(Item(image, names.index(name), name) for image, name in items), names, "?", "?")


CASES = {
    "training and test": ("a/1 a/5", {"train_and_test"}),
    "training and val": ("a/1 a/4", {"train_and_test"}),
    "training alone": ("a/1 a/2", set()),
    "test alone": ("a/5 a/6", set()),
    "two labels in training": ("a/1 a/3", {"two_labels"}),
    "two labels in test": ("a/5 a/7", {"two_labels"}),
    "both": ("a/1 a/7", {"train_and_test", "two_labels"}),
    "three": ("a/2 a/3 a/6", {"train_and_test", "two_labels"}),
    "another dataset's name": ("a/5 b/1", set()),
    "another dataset has two": ("a/5 b/1 b/2", {"two_labels"}),
    "training and another dataset": ("a/1 b/1", {"train_and_test"}),
}


@pytest.mark.parametrize(("group", "kinds"), CASES.values(), ids=CASES)
def test_which_groups_a_result_should_know_of(group, kinds):
    """1 to 3 are trained, 4 is watched, 5 to 7 and another dataset's are tested."""
    evaluation = {
        "val": split(("a/4", "cat")),
        "test": split(("a/5", "cat"), ("a/6", "cat"), ("a/7", "dog")),
        "b": split(("b/1", "lion"), ("b/2", "cat"), names=("cat", "lion")),
    }
    train = split(("a/1", "cat"), ("a/2", "cat"), ("a/3", "dog"))
    found = duplicates.troubling(Task(train, evaluation, Digits(), "", {}), [tuple(group.split())])
    assert found == {kind: [group.split()] for kind in kinds}


@pytest.fixture
def root(tmp_path):
    """Four photos of each of two classes in training and in test, one of them in both, one under two labels."""
    root = tmp_path / "photos"
    for part, start in (("train", 0), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for number in range(start, start + 4):
                photo(100 * label + number).save(root / part / name / f"{number}.png")
    shutil.copy(root / "train/cat/0.png", root / "test/cat/copy.png")
    shutil.copy(root / "test/dog/4.png", root / "test/cat/other.png")
    photo(1).resize((48, 32)).save(root / "test/cat/small.jpg")
    return root


TRAIN_AND_TEST = ["folder/train/cat/0.png", "folder/test/cat/copy.png"]
TWO_LABELS = ["folder/test/cat/other.png", "folder/test/dog/4.png"]
LOOK_ALIKE = ["folder/train/cat/1.png", "folder/test/cat/small.jpg"]


@pytest.fixture
def configured(compose, root, tmp_path):
    def get(*overrides):
        base = ["data=folder", f"data.folder={root}", "shots=4", f"cache_dir={tmp_path / 'cache'}"]
        return validate(compose(*base, *overrides))

    return get


@pytest.mark.slow
def test_a_run_warns_and_its_manifest_names_all(configured, capsys, tmp_path):
    found = loading.readable(configured("data.near_duplicates=false"))
    bad = found.manifest["left_out"]
    assert found.manifest["duplicates"] == {"train_and_test": [TRAIN_AND_TEST], "two_labels": [TWO_LABELS]} and not bad
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning" in line and all(image in line for image in (*TRAIN_AND_TEST, *TWO_LABELS))
    path = tmp_path / "manifest.json"
    manifest.write(found.manifest, path)
    assert json.loads(path.read_text())["duplicates"] == found.manifest["duplicates"]
    manifest.verify(path, task.build(configured()).manifest)  # what was found is no part of the task


@pytest.mark.slow
def test_pictures_that_look_alike_are_found_among_few_own_photos_and_by_choice_among_many(configured, monkeypatch):
    exact = {"train_and_test": [TRAIN_AND_TEST], "two_labels": [TWO_LABELS]}
    found = loading.readable(configured()).manifest["duplicates"]
    assert found == exact | {"near_train_and_test": [LOOK_ALIKE]}
    monkeypatch.setattr(duplicates, "FEW", 18)  # of 19
    assert loading.readable(configured()).manifest["duplicates"] == exact
    assert loading.readable(configured("data.near_duplicates=true")).manifest["duplicates"] == found


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["IMG_1-edited.jpg", "IMG_1 (1).jpg", "IMG_1(1).jpg", "COPY_IMG_1.webp"])
def test_copies_of_photo_services_are_found(configured, root, name):
    """Edited a little brighter, or saved once more in another size: a test photo that was trained on."""
    edited = photo(2).point(lambda level: min(255, level * 1.2 + 5)) if "edited" in name else photo(2).resize((60, 40))
    edited.save(root / "test/cat" / name, quality=60)
    found = loading.readable(configured()).manifest["duplicates"]["near_train_and_test"]
    assert ["folder/train/cat/2.png", f"folder/test/cat/{name}"] in found


def test_published_data_is_compared_by_content_alone(compose):
    assert compose("data=dtd").data.near_duplicates is False and compose("data=folder").data.near_duplicates is None


@pytest.mark.slow
def test_a_run_can_refuse(configured):
    with pytest.raises(UserError, match="data.duplicates=refuse: identical.*cat/copy.png.*data.duplicates=warn"):
        loading.readable(configured("data.duplicates=refuse"))


@pytest.mark.slow
def test_a_run_can_ignore(configured, capsys, monkeypatch):
    monkeypatch.setattr(duplicates, "equal", None)  # nothing is even looked for
    assert "duplicates" not in loading.readable(configured("data.duplicates=ignore")).manifest
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_photos_that_are_not_asked_about_do_not_matter(configured, root):
    (root / "test/cat/copy.png").unlink()
    (root / "test/cat/other.png").unlink()
    for number in range(4):  # of the eight photos of the class, a seed picks one
        shutil.copy(root / f"train/cat/{number}.png", root / f"train/cat/again{number}.png")
    assert "duplicates" not in loading.readable(configured("shots=1")).manifest


@pytest.mark.slow
def test_the_choice_is_no_part_of_the_result(compose):
    choices = ["data.duplicates=refuse", "data.near_duplicates=true", "data.own_photos=true"]
    assert signature(plain(compose())) == signature(plain(compose(*choices)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.duplicates=delete"], "data.duplicates=delete: choose one of warn, refuse, ignore"),
        (["data.duplicates=ignore", "data.near_duplicates=true"], "data.near_duplicates=true needs data.duplicates="),
    ],
    ids=["unknown", "contradiction"],
)
def test_wrong_choices(compose, overrides, message):
    with pytest.raises(UserError, match=message):
        validate(compose(*overrides))
