"""Folders of photos as cameras, servers and archives leave them: litter, links, and parts under many names."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from common.config.composition import validate
from common.data import folder, imagenet, task, wordnet
from common.data.layout import parts_by_name
from common.data.listing import Location, files, litter_reason, subfolders
from common.data.names import objections
from common.types import UserError
from common.vlm import check


def photos(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def read(root):
    return folder.read(Location("folder", root, root))


def keys(items):
    return [item.image.removeprefix("folder/") for item in items]


CLASSES = ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg")
SERVERS = [
    "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
    "@eaDir/2.jpg",
    "#recycle/1.jpg",
    "#snapshot/1.jpg",
    "@Recycle/1.jpg",
    "__MACOSX/._1.jpg",
    "$RECYCLE.BIN/1.jpg",
    "System Volume Information/1.jpg",
    "lost+found/1.jpg",
    ".thumbnails/1.jpg",
    ".ipynb_checkpoints/1-checkpoint.jpg",
    "._1.jpg",
    "Thumbs.db",
    "THUMBS.DB",
    "desktop.ini",
    ".DS_Store",
]


@pytest.mark.parametrize("where", ["", "cat/", "cat/holiday/"], ids=["top", "class", "below a class"])
@pytest.mark.parametrize("litter", SERVERS)
def test_litter_is_passed_over_and_counted(tmp_path, litter, where):
    photos(tmp_path, *CLASSES, "cat/holiday/3.jpg")
    before = read(tmp_path)
    photos(tmp_path, where + litter)
    found = read(tmp_path)
    assert keys(found.train) == ["cat/1.jpg", "cat/2.jpg", "cat/holiday/3.jpg", "dog/1.jpg", "dog/2.jpg"]
    assert found.passed_over == {"litter": 1}, "a folder counts once"
    assert found.fingerprint == before.fingerprint


def test_every_reason_is_counted(tmp_path):
    photos(tmp_path, *CLASSES, "cat/notes.txt", "cat/IMG_1.NEF", "dog/.hidden.jpg", "readme.md", "dog/@eaDir/a.jpg")
    (tmp_path / "dog/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "dog/round.jpg").symlink_to(tmp_path / "dog/round.jpg")
    os.mkfifo(tmp_path / "dog/pipe.jpg")
    found = read(tmp_path)
    assert keys(found.train) == list(CLASSES)
    assert found.passed_over == {"broken link": 2, "hidden": 1, "litter": 1, "no file": 1, "unknown suffix": 3}


@pytest.mark.parametrize("name", ["Recycled", "recycler", "thumbs", "Icon", "desktop", "cat.db", "lost", "at @ home"])
def test_classes_with_similar_names_are_classes(tmp_path, name):
    assert litter_reason(name) is None
    assert name in read(photos(tmp_path, *CLASSES, f"{name}/1.jpg")).names


def test_dataset_readers_share_the_list(tmp_path):
    location = Location("imagenet", tmp_path, tmp_path)
    photos(tmp_path, "n1/a.JPEG", "n1/Thumbs.db", "n1/._a.JPEG", "@eaDir/x", "n1/@eaDir/a.JPEG")
    (tmp_path / "n1/b.JPEG").symlink_to("nowhere")
    assert subfolders(location, tmp_path) == ["n1"] and files(location, tmp_path / "n1") == ["a.JPEG"]
    assert [item.image for item in imagenet.items(location, tmp_path, "imagenet", ["n1"], {"n1": "tench"})] == [
        "imagenet/n1/a.JPEG"
    ]
    reasons = {path.removeprefix(f"{tmp_path}/"): why for path, why in location.passed_over.items()}
    assert reasons == {
        "@eaDir": "litter",
        "n1/@eaDir": "litter",
        "n1/Thumbs.db": "litter",
        "n1/._a.JPEG": "litter",
        "n1/b.JPEG": "broken link",
    }


def test_a_class_of_litter_says_what_is_there(tmp_path):
    photos(tmp_path, *CLASSES, "new/notes.txt", "new/@eaDir/1.jpg")
    with pytest.raises(UserError, match="class folder .*/new has no photo .*; passed over: 1 litter, 1 unknown suffix"):
        read(tmp_path)


@pytest.mark.timeout(30)  # a circle would not end
def test_links_are_followed_once(tmp_path):
    """To files, to class folders and to folders below them, but never round in a circle."""
    pool, root = tmp_path / "pool", tmp_path / "photos"
    photos(pool, "a.jpg", "dogs/1.jpg", "more/2.jpg", "more/deep/3.jpg")
    photos(root, "cat/own.jpg")
    (root / "cat/linked.jpg").symlink_to(pool / "a.jpg")
    (root / "cat/more").symlink_to(pool / "more")
    (root / "dog").symlink_to(pool / "dogs")
    expected = ["cat/linked.jpg", "cat/more/2.jpg", "cat/more/deep/3.jpg", "cat/own.jpg", "dog/1.jpg"]
    assert keys(read(root).train) == expected and read(root).passed_over == {}
    circles = {
        "cat/up": root,  # around the class folder
        "cat/other": root / "dog" / "..",  # the pool, around folders that were read
        "cat/self": root / "cat",
        "dog/home": pool / "dogs",
        "cat/more/back": pool / "more",
        "cat/more/deep/above": tmp_path,
    }
    for name, target in circles.items():
        (root / name).symlink_to(target)
    found = read(root)
    assert keys(found.train) == expected
    assert found.passed_over == {"overlapping link": len(circles)}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, "train") for name in ("train", "Train", "TRAINING", "training_set", "train-set", "trainset")),
        *((name, "train") for name in ("train_data", "Training Data", "train_images", "seg_train", "images_train")),
        *((name, "test") for name in ("test", "Testing", "test_set", "Test-Set", "testdata", "seg_test")),
        *((name, "val") for name in ("val", "Valid", "validation", "dev", "validation_set", "dev-set")),
        *((name, None) for name in ("trains", "test tube", "Training shoes", "Bullet train", "devil", "tests_", "seg")),
    ],
)
def test_names_of_parts(name, part):
    assert parts_by_name([name]) == ({} if part is None else {name: part})


def parts(source):
    return {part: keys(getattr(source, part)) for part in ("train", "val", "test") if getattr(source, part)}


SPLITS = {
    "doubled": (["training_set/training_set", "test_set/test_set"], ["train", "test"]),
    "doubled in another case": (["Train/train", "Test/Test"], ["train", "test"]),
    "doubled twice": (["training_set/training_set/train", "test_set"], ["train", "test"]),
    "capitals": (["Train", "Test", "Validation"], ["train", "test", "val"]),
    "valid": (["train", "test", "valid"], ["train", "test", "val"]),
    "dev": (["train", "test", "dev"], ["train", "test", "val"]),
    "eval for test": (["train", "eval"], ["train", "test"]),
    "eval for val": (["train", "test", "eval"], ["train", "test", "val"]),
    "prefix": (["seg_train/seg_train", "seg_test/seg_test"], ["train", "test"]),
}


@pytest.mark.parametrize(("folders", "meant"), SPLITS.values(), ids=SPLITS)
def test_parts_are_recognised_and_said(tmp_path, folders, meant):
    for number, inside in enumerate(folders):
        photos(tmp_path, f"{inside}/cat/{number}.jpg", f"{inside}/dog/{number}.jpg", f"{inside}/@eaDir/1.jpg")
    found = read(tmp_path)
    assert found.names == ("cat", "dog") and found.origin == "own split"
    expected = {
        part: [f"{inside}/cat/{number}.jpg", f"{inside}/dog/{number}.jpg"]
        for number, (inside, part) in enumerate(zip(folders, meant, strict=True))
    }
    assert parts(found) == expected
    (note,) = found.notes
    assert all(f"{inside}/ is read as {part}" in note for inside, part in zip(folders, meant, strict=True))


def test_parts_of_the_usual_names_need_no_words(tmp_path):
    photos(tmp_path, *(f"{part}/{name}" for part in ("train", "val", "test") for name in CLASSES))
    assert read(tmp_path).notes == ()


def test_a_class_called_like_a_part_is_a_class(tmp_path):
    found = read(photos(tmp_path, "Train/1.jpg", "Bus/1.jpg", "Test tube/1.jpg"))
    assert found.names == ("Bus", "Test tube", "Train") and found.test == ()


ELSEWHERE = {
    "wrapped classes": (["archive/cat", "archive/dog"], r"holds one folder only, archive;.*data.folder=\S*/archive;"),
    "wrapped twice": (["a/b/cat", "a/b/dog"], r"holds one folder only, a;.*cat, dog: give data.folder=\S*/a/b;"),
    "wrapped parts": (
        ["dataset/train/cat", "dataset/test/cat"],
        r"the parts seem to be test, train.*data.folder=\S*/dataset;",
    ),
    "parts beside labels": (["images/train/cat", "images/test/cat", "labels/x"], r"data.folder=\S*/images;"),
    "parts below classes": (["cat/train", "cat/test", "dog/train", "dog/test"], r"parts below the classes.*path,label"),
    "training alone": (["train/cat", "train/dog"], r"none to test on; give data.folder=\S*/train, of which"),
    "test alone": (["Test/cat", "Test/dog"], r"none to train on; give data.folder=\S*/Test, of which"),
    "train and val": (
        ["train/cat", "val/cat"],
        r"none to test on; call one of them test, or give data.folder=\S*/train",
    ),
    "two test parts": (["train/cat", "test/cat", "testing/cat"], r"test and testing, which both mean test"),
    "a stranger": (["train/cat", "test/cat", "seg_pred"], r"train and test, but also seg_pred; move it"),
}


@pytest.mark.parametrize(("folders", "message"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_the_path_that_was_meant_is_named(tmp_path, folders, message):
    photos(tmp_path, *(f"{inside}/1.jpg" for inside in folders))
    with pytest.raises(UserError, match=message) as refusal:
        read(tmp_path)
    assert "\n" not in str(refusal.value)


def test_one_class_alone_is_no_wrapping(tmp_path):
    with pytest.raises(UserError, match="has 1 class;"):
        read(photos(tmp_path, "cat/1.jpg", "cat/2.jpg"))


@pytest.mark.parametrize("name", ["_", "_ _"])
def test_a_class_without_a_letter_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"class '{name}' has no letter"):
        read(photos(tmp_path, *CLASSES, f"{name}/1.jpg"))


def test_wordnet_ids_are_asked_as_words(tmp_path):
    """ImageNet's subsets have folders of ids; no model would answer n01440764. The order of the classes stays."""
    found = read(photos(tmp_path, "n02012849/1.jpg", "n01440764/1.jpg", "n03126707/1.jpg", "zebu/1.jpg"))
    crane = "crane (large long-necked wading bird of marshes and plains in many parts of the world)"
    assert found.names == ("tench", crane, "crane (lifts and moves heavy objects)", "zebu")
    assert [(item.image, item.name) for item in found.train][:2] == [
        ("folder/n01440764/1.jpg", "tench"),
        ("folder/n02012849/1.jpg", crane),
    ]
    assert found.notes == ("WordNet ids are read as words (3): n01440764 is 'tench'",)


def test_wordnet_ids_in_parts_and_tables(tmp_path):
    photos(tmp_path, *(f"{part}/{name}/1.jpg" for part in ("train", "test") for name in ("n01440764", "n02124075")))
    assert read(tmp_path).names == ("tench", "Egyptian cat")
    (tmp_path / "a.csv").write_text("path,label\na.png,n01440764\nb.png,n02124075\n")
    assert folder.read(Location("folder", tmp_path, tmp_path / "a.csv")).names == ("tench", "Egyptian cat")


def test_a_wordnet_id_beside_its_word(tmp_path):
    with pytest.raises(UserError, match="classes 'Tench' and 'n01440764', which means tench, are one answer"):
        read(photos(tmp_path, "n01440764/1.jpg", "Tench/1.jpg"))


@pytest.mark.slow
def test_all_of_imagenet_and_all_of_wordnet_have_names_of_their_own():
    for ids in (wordnet.wnids(), sorted(wordnet._all("lemma"))):
        named = wordnet.named(ids)
        assert list(named) == list(ids) and list(objections(named.values())) == []
        assert not any("," in name for name in named.values()), "a list would separate them there"


CODES = ["n99999999", "0", "007", "c3", "class_1", "Label 12", "id-7", "1a2b", "A320"]


@pytest.mark.parametrize("code", CODES)
def test_codes_for_names_are_said(tmp_path, code):
    (note,) = read(photos(tmp_path, f"{code}/1.jpg", "cat/1.jpg")).notes
    assert note.startswith(f"warning: 1 of 2 class names look like codes, first '{code}': no model that reads names")


def test_one_unknown_wordnet_id_among_many_is_said(tmp_path):
    (note,) = read(photos(tmp_path, "n99999999/1.jpg", *(f"{name}/1.jpg" for name in ("cat", "dog", "fox")))).notes
    assert note.startswith("warning: 1 of 4 class names look like codes, first 'n99999999'")


@pytest.mark.parametrize(
    "name", ["F-16A", "707-320", "2012 Audi TTS", "ox", "7 Up can", "\u732b", "\u0422-34", "B&W", "\U0001f415"]
)
def test_names_of_few_letters_are_no_codes(tmp_path, name):
    assert read(photos(tmp_path, f"{name}/1.jpg", "cat/1.jpg")).notes == ()


EXPORTED = [
    "no_label",
    "No Label",
    "unlabeled",
    "Unlabelled",
    "_background_",
    "BACKGROUND_Google",
    "__ignore__",
    "not-labeled",
]


@pytest.mark.parametrize("name", EXPORTED)
def test_folders_of_what_has_no_label_are_named(tmp_path, name):
    found = read(photos(tmp_path, *CLASSES, f"{name}/1.jpg"))
    assert found.notes == (f"warning: '{name}' seems to hold what has no label; move it away if it is no class",)
    assert len(found.names) == 3


@pytest.mark.parametrize("name", ["label", "backgrounds of cats", "other", "empty", "labels", "nonesuch"])
def test_similar_names_are_classes(tmp_path, name):
    assert read(photos(tmp_path, *CLASSES, f"{name}/1.jpg")).notes == ()


@pytest.mark.parametrize("learner", ["method=clsrl", "method=linear_probe"])
def test_such_a_line_reaches_the_manifest_whatever_the_method(tmp_path, compose, learner):
    photos(tmp_path, *(f"{name}/{number}.jpg" for name in ("c0", "c1") for number in range(3)))
    config = validate(compose("data=folder", f"data.folder={tmp_path}", "shots=1", learner))
    (note,) = task.build(config).manifest["notes"]
    assert note.startswith("data=folder: warning: 2 of 2 class names look like codes")


@pytest.mark.parametrize("page", ["README.md", "docs/photos.md"])
def test_the_first_command_for_own_photos_works_on_a_laptop(compose, page):
    """Learners on the network that is installed with this: no hub, no GPU, and no model that cannot know them."""
    text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
    command = re.search(r"^python run\.py (experiment=photos (?:.*\\\n)*.*)", text, re.MULTILINE)[1]
    config = validate(compose(*shlex.split(command.replace("\\\n", " "), comments=True)))
    assert (config.method["name"], config.clip.name, config.visual.name) == ("best_of", "none", "lite0")
    assert config.gpus == 0 and "experiment=photos" in check.INSTEAD
