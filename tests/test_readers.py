"""Every dataset read from a small tree in its own format, with split file and without; and what readers refuse."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.data import folder as own_photos
from common.data import source, split_file
from common.data.check import configured
from common.data.listing import Location
from common.data.split_file import parse
from common.plugins import check_call, locate
from common.types import Item, UserError
from tests import data_tree

CONF = Path(__file__).parent.parent / "conf/data"

# Image folder, then per class in the order of the split file: label, name, file pattern, what fills it in train, val
# and test.
SPLIT_FILES = {
    "caltech101": (
        "101_ObjectCategories/",
        [
            (0, "face", "Faces/image_000{}.jpg", "1 2|3|4 5"),
            (1, "leopard", "Leopards/image_000{}.jpg", "1 2|3|4 5"),
            (2, "accordion", "accordion/image_000{}.jpg", "1 2|3|4 5"),
            (3, "airplane", "airplanes/image_000{}.jpg", "1 2|3|4 5"),
            (4, "yin_yang", "yin_yang/image_000{}.jpg", "1 2|3|4 5"),
        ],
    ),
    "oxford_pets": (
        "images/",
        [
            (0, "abyssinian", "Abyssinian_{}.jpg", "1 2|3|4 5"),
            (1, "american_pit_bull_terrier", "american_pit_bull_terrier_{}.jpg", "1 2|3|4 5"),
            (2, "bengal", "Bengal_{}.jpg", "1 2|3|4 5"),
        ],
    ),
    "stanford_cars": (
        "",
        [
            (1, "2012 Audi TTS Coupe", "cars_{}.jpg", "train/00002 train/00005|train/00008|test/00002 test/00005"),
            (
                0,
                "2000 AM General Hummer SUV",
                "cars_{}.jpg",
                "train/00001 train/00004|train/00007|test/00001 test/00004",
            ),
            (
                2,
                "2012 Ram C/V Cargo Van Minivan",
                "cars_{}.jpg",
                "train/00003 train/00006|train/00009|test/00003 test/00006",
            ),
        ],
    ),
    "flowers102": (
        "jpg/",
        [
            (2, "canterbury bells", "image_000{}.jpg", "01 04|07|10 13"),
            (0, "pink primrose", "image_000{}.jpg", "02 05|08|11 14"),
            (1, "hard-leaved pocket orchid", "image_000{}.jpg", "03 06|09|12 15"),
        ],
    ),
    "food101": (
        "images/",
        [
            (0, "apple_pie", "apple_pie/100560{}.jpg", "1 2|3|4 5"),
            (1, "beef_carpaccio", "beef_carpaccio/100560{}.jpg", "1 2|3|4 5"),
            (2, "waffles", "waffles/100560{}.jpg", "1 2|3|4 5"),
        ],
    ),
    "sun397": (
        "SUN397/",
        [
            (0, "abbey", "a/abbey/sun_0{}.jpg", "1 2|3|4 5"),
            (1, "outdoor apartment_building", "a/apartment_building/outdoor/sun_0{}.jpg", "1 2|3|4 5"),
            (2, "ball_pit", "b/ball_pit/sun_0{}.jpg", "1 2|3|4 5"),
        ],
    ),
    "dtd": (
        "images/",
        [
            (0, "banded", "banded/banded_000{}.jpg", "1 2|3|4 5"),
            (1, "dotted", "dotted/dotted_000{}.jpg", "1 2|3|4 5"),
            (2, "polka-dotted", "polka-dotted/polka-dotted_000{}.jpg", "1 2|3|4 5"),
        ],
    ),
    "eurosat": (
        "2750/",
        [
            (0, "Annual Crop Land", "AnnualCrop/AnnualCrop_{}.jpg", "1 2|3|4 5"),
            (1, "Forest", "Forest/Forest_{}.jpg", "1 2|3|4 5"),
            (2, "Sea or Lake", "SeaLake/SeaLake_{}.jpg", "1 2|3|4 5"),
        ],
    ),
    "ucf101": (
        "UCF-101-midframes/",
        [
            (0, "Apply_Eye_Makeup", "Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c0{}.jpg", "1 2|3|4 5"),
            (1, "Handstand_Pushups", "Handstand_Pushups/v_HandStandPushups_g01_c0{}.jpg", "1 2|3|4 5"),
            (2, "Hammering", "Hammering/v_Hammering_g01_c0{}.jpg", "1 2|3|4 5"),
            (3, "Hammer_Throw", "Hammer_Throw/v_HammerThrow_g01_c0{}.jpg", "1 2|3|4 5"),
        ],
    ),
}
# Without the split file: labels in the order in which the files list the classes, and whether the test part is official.
FALLBACKS = {
    "caltech101": ([0, 1, 2, 3, 4], False),
    "oxford_pets": ([0, 1, 2], True),
    "stanford_cars": ([0, 1, 2], True),
    "flowers102": ([2, 0, 1], False),
    "food101": ([0, 1, 2], False),
    "sun397": ([0, 1, 2], True),
    "dtd": ([0, 1, 2], False),
    "eurosat": ([0, 1, 2], False),
    "ucf101": ([0, 3, 2, 1], True),  # code points: HammerThrow, Hammering, HandstandPushups
}
NAMES = ("tench", "kite (bird of prey)", "baluster / handrail", "missile", "missile")
TRAIN = "imagenet/images/train/{wnid}/{wnid}_{number}.JPEG"
# Positions of the set's classes among ImageNet's, and the pattern of its images.
IMAGENETS = {
    "imagenet": ([0, 1, 2, 3, 4], "images/val/{wnid}/ILSVRC2012_val_{image:08d}.JPEG"),
    "imagenet_v2": ([0, 1, 2, 3, 4], "imagenetv2-matched-frequency-format-val/{place}/{number}.jpeg"),
    "imagenet_sketch": ([0, 1, 2, 3, 4], "images/{wnid}/sketch_{number}.JPEG"),
    "imagenet_a": ([1, 2, 4], "imagenet-a/{wnid}/0.00{number}_fox_0.9.jpg"),
    "imagenet_r": ([0, 2, 3], "imagenet-r/{wnid}/art_{number}.jpg"),
}
FOLDERS = {path.stem: OmegaConf.load(path).folder for path in CONF.glob("*.yaml")}

DTD = "dtd/split_zhou_DescribableTextures.json"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return data_tree.build(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bare_tree(tmp_path_factory):
    return data_tree.build(tmp_path_factory.mktemp("data"), missing_split=True)


def read(root, name, allow=False, folder=None, **changes):
    """What conf/data/<name>.yaml reads under `root`."""
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    arguments = config["reader"] | changes
    target = arguments.pop("_target_")
    check_call(target, "data.reader._target_", arguments, given=1)
    location = Location(name, root, root / (folder or config["folder"]), allow)
    return locate(target, "data.reader._target_")(location, **arguments)


def rows(items):
    return [(item.image, item.label, item.name) for item in items]


def classes_of(name):
    """Label -> (name, [paths of train, of val, of test]), in the order of the split file."""
    folder, classes = SPLIT_FILES[name]
    return {
        label: (
            title,
            [[f"{name}/{folder}{pattern.format(word)}" for word in part.split()] for part in fill.split("|")],
        )
        for label, title, pattern, fill in classes
    }


@pytest.mark.parametrize("name", SPLIT_FILES)
def test_split_files(tree, name):
    source, classes = read(tree, name), classes_of(name)
    expected = [[(p, y, title) for y, (title, parts) in classes.items() for p in parts[k]] for k in range(3)]
    if name == "stanford_cars":  # its test part is in the order of the files
        expected[2].sort()
    assert [rows(source.train), rows(source.val), rows(source.test)] == expected
    assert source.names == tuple(classes[label][0] for label in sorted(classes))
    assert source.origin == "CoOp split"
    for item in (*source.train, *source.val, *source.test):
        assert source.images.open(item.image).size == (32, 24)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", SPLIT_FILES)
def test_fallback_splits(bare_tree, name, seed):
    order, official_test = FALLBACKS[name]
    rng, classes = random.Random(seed), classes_of(name)
    train, val, test = [], [], []
    for label in order:
        title, parts = classes[label]
        cut = [(path, label, title) for path in parts[0] + parts[1] + ([] if official_test else parts[2])]
        rng.shuffle(cut)
        if official_test:  # a fifth of 3 is 1 for val
            val, train = val + cut[:1], train + cut[1:]
            test += [(path, label, title) for path in parts[2]]
        else:  # 5 images: half to even gives 2 for train, then 1 for val
            train, val, test = train + cut[:2], val + cut[2:3], test + cut[3:]
    if name == "stanford_cars":
        test.sort()
    source = read(bare_tree, name, allow=True, fallback_seed=seed)
    assert [rows(source.train), rows(source.val), rows(source.test)] == [train, val, test]
    assert source.names == tuple(classes[label][0] for label in sorted(classes))
    assert source.origin == "fallback split"


def test_a_split_file_goes_before_a_fallback(tree):
    assert read(tree, "dtd", allow=True).origin == "CoOp split"


def test_aircraft(tree):
    source = read(tree, "fgvc_aircraft")
    names = ("707-320", "An-12", "F-16A/B", "F/A-18")  # the classes take turns in the numbers of the images
    expected = [(f"fgvc_aircraft/images/10000{n:02d}.jpg", (n - 1) % 4, names[(n - 1) % 4]) for n in range(1, 21)]
    assert rows(source.train + source.val + source.test) == expected
    assert (len(source.train), len(source.val), source.names, source.origin) == (8, 4, names, "official lists")


@pytest.mark.parametrize("name", IMAGENETS)
def test_imagenets(tree, name):
    present, pattern = IMAGENETS[name]
    wnids = ("n01440764", "n01608432", "n02788148", "n03773504", "n04008634")
    train, test = [], []
    for label, place in enumerate(present):
        for number in (1, 2):
            words = {"wnid": wnids[place], "number": number, "place": place, "image": 2 * place + number}
            train.append((TRAIN.format(**words), label, NAMES[place]))
            test.append((f"{name}/{pattern.format(**words)}", label, NAMES[place]))
    source = read(tree, name)
    assert [rows(source.train), rows(source.val), rows(source.test)] == [train, [], test]
    assert source.names == tuple(NAMES[place] for place in present)
    assert source.origin == (
        "ImageNet validation set" if name == "imagenet" else "official test set, trained on ImageNet"
    )
    for item in (*source.train, *source.test):
        assert source.images.open(item.image).size == (32, 24)


@pytest.mark.parametrize("name", IMAGENETS)
def test_imagenets_without_training_images(tmp_path, tree, name):
    folder = FOLDERS[name]
    shutil.copytree(tree / folder, tmp_path / folder, ignore=shutil.ignore_patterns("train"))
    if not (tmp_path / folder / "classnames.txt").exists():
        (tmp_path / "imagenet").mkdir()
        shutil.copy(tree / "imagenet/classnames.txt", tmp_path / "imagenet")
    source = read(tmp_path, name)
    assert source.train == () and rows(source.test) == rows(read(tree, name).test)
    assert source.origin == ("ImageNet validation set" if name == "imagenet" else "official test set")


def test_own_class_names_go_before_those_of_imagenet(tmp_path):
    data_tree.build(tmp_path)
    lines = (tmp_path / "imagenet/classnames.txt").read_text()
    (tmp_path / "imagenet-rendition/classnames.txt").write_text(lines.replace("tench", "Tinca tinca"))
    assert read(tmp_path, "imagenet_r").names[0] == "Tinca tinca"
    assert read(tmp_path, "imagenet_sketch").names[0] == "tench"


def photo_rows(prefix, part=""):
    names = ("Her_dog", "my cat", "teapot")
    files = ("1.png", "2.png", "3.png", "4.png", "holiday/2024/beach.JPG")
    return [(f"folder/{prefix}{name}/{file}", label, name) for label, name in enumerate(names) for file in files]


def test_own_photos_in_one_pool(tree):
    source = read(tree, "folder")
    assert rows(source.train) == photo_rows("") and source.val == source.test == ()
    assert source.names == ("Her_dog", "my cat", "teapot") and source.origin == "own images"
    assert source.images.open("folder/my cat/holiday/2024/beach.JPG").size == (32, 24)


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val", "test")], ids="-".join)
def test_own_photos_in_parts(tmp_path, tree, parts):
    for part in parts:
        shutil.copytree(tree / "photos", tmp_path / part)
    (tmp_path / "readme.txt").write_text("no class")
    source = read(tmp_path, "folder", folder=tmp_path)
    assert {part: rows(getattr(source, part)) for part in parts} == {part: photo_rows(f"{part}/") for part in parts}
    assert source.origin == "own split"


TABLE = "id,label,path\n1,my cat,my cat/1.png\n2, teapot ,./teapot/2.png\n\n3,my cat,Her_dog/../my cat/2.png\n"


@pytest.mark.parametrize("where", ["the file is the dataset", "a file in the folder", "a file in a sub-folder"])
def test_own_photos_in_a_table(tmp_path, tree, where):
    photos = tmp_path / "photos"
    shutil.copytree(tree / "photos", photos)
    table = photos / ("lists/mine.csv" if "sub" in where else "mine.csv")
    table.parent.mkdir(exist_ok=True)
    content = TABLE.replace("my cat/", "../my cat/").replace("./teapot", "../teapot") if "sub" in where else TABLE
    table.write_text("\ufeff" + content.replace("\n", "\r\n"), encoding="utf-8", newline="")  # as Excel writes it
    if where == "the file is the dataset":
        source = read(tmp_path, "folder", folder="photos/mine.csv")
    else:
        source = read(tmp_path, "folder", csv=str(table.relative_to(photos)))
    found = [
        ("folder/my cat/1.png", 0, "my cat"),
        ("folder/teapot/2.png", 1, "teapot"),
        ("folder/my cat/2.png", 0, "my cat"),
    ]
    assert rows(source.train) == found and source.origin == "own images"
    assert source.images.open("folder/teapot/2.png").size == (32, 24)


def test_own_photos_in_a_table_with_parts(tmp_path):
    (tmp_path / "a.csv").write_text("path,label,split\na.png,x,train\nb.png,y,test\nc.png,y,val\nd.png,x,test\n")
    source = read(tmp_path, "folder", folder="a.csv")
    assert [rows(source.train), rows(source.val)] == [[("folder/a.png", 0, "x")], [("folder/c.png", 1, "y")]]
    assert rows(source.test) == [("folder/b.png", 1, "y"), ("folder/d.png", 0, "x")]
    assert source.origin == "own split"


# Computed with CoOp's own code (read_split trainval halves), seeds 1 and 2.
@pytest.mark.parametrize(
    ("seed", "train", "val"),
    [(1, "x3 x5 x0 x4 x1 y2 y1 y4 y3", "x2 y0"), (2, "x3 x1 x4 x5 x0 y0 y3 y4 y2", "x2 y1")],
)
def test_split_trainval_equals_coop(tmp_path, seed, train, val):
    items = [Item(f"x{i}", 1, "x") for i in range(6)] + [Item(f"y{i}", 0, "y") for i in range(5)]
    parts = split_file.split_trainval(Location("d", tmp_path, tmp_path), items, random.Random(seed))
    assert [" ".join(item.image for item in part) for part in parts] == [train, val]


@pytest.mark.parametrize(
    ("seed", "train", "val", "test"),
    [
        (1, "a6 a8 a9 a7 a5 b2 b5 b4 b3", "a3 a0 b0", "a4 a1 a2 b1 b6"),
        (2, "a5 a9 a3 a4 a6 b5 b2 b3 b1", "a7 a2 b6", "a8 a1 a0 b0 b4"),
    ],
)
def test_split_folders_equals_coop(tmp_path, seed, train, val, test):
    for folder, letter, count in (("beta", "b", 7), ("alpha", "a", 10)):
        for number in reversed(range(count)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{letter}{number}").touch()
    (tmp_path / "alpha/.hidden").touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "list.txt").touch()
    parts = split_file.folders(Location("d", tmp_path, tmp_path), ".", random.Random(seed))
    found = [" ".join(Path(item.image).name for item in part) for part in (parts.train, parts.val, parts.test)]
    assert found == [train, val, test]


def test_fallback_reads_linked_class_folders(tmp_path, bare_tree):
    (tmp_path / "dtd/images").mkdir(parents=True)
    for folder in (bare_tree / "dtd/images").iterdir():
        (tmp_path / "dtd/images" / folder.name).symlink_to(folder)
    assert rows(read(tmp_path, "dtd", allow=True).train) == rows(read(bare_tree, "dtd", allow=True).train)


@pytest.mark.sampled
@pytest.mark.parametrize("name", sorted({*SPLIT_FILES, *IMAGENETS, "fgvc_aircraft", "folder"}))
def test_fingerprints_do_not_depend_on_the_place(tree, tmp_path, name):
    data_tree.build(tmp_path)
    assert read(tmp_path, name).fingerprint == read(tree, name).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["train"][1].__setitem__(0, "banded/banded_0009.jpg"),
        lambda content: content["train"][-1].__setitem__(1, 1),
        lambda content: [row.__setitem__(2, "spotted") for part in content.values() for row in part if row[1] == 1],
        lambda content: content["train"].reverse(),
        lambda content: content["test"].append(content["val"].pop()),
    ],
    ids=["path", "label", "name", "order", "part"],
)
def test_fingerprints_tell_datasets_apart(tmp_path, change):
    data_tree.build(tmp_path)
    before = read(tmp_path, "dtd").fingerprint
    content = json.loads((tmp_path / DTD).read_text())
    change(content)
    (tmp_path / DTD).write_text(json.dumps(content))
    assert read(tmp_path, "dtd").fingerprint != before


# What readers refuse: dataset, what happens to the tree, what the one line says.
def gone(path):
    def damage(root):
        shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()

    return damage


def changed(path, old, new):
    def damage(root):
        content = (root / path).read_text()
        assert old in content
        (root / path).write_text(content.replace(old, new, 1))

    return damage


def written(path, content):
    def damage(root):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


VAL = "imagenet/images/val"


def first_row(row):
    return written(DTD, json.dumps({"train": [row], "val": [], "test": []}))


def flatten(root):
    for path in list((root / VAL).rglob("*.JPEG")):
        path.rename(root / VAL / path.name)
        if not list(path.parent.iterdir()):
            path.parent.rmdir()


def only_parts(*parts):
    def damage(root):
        (root / "photos").rename(root / "old")
        for part in parts:
            shutil.copytree(root / "old", root / "photos" / part)

    return damage


def table(content):
    def damage(root):
        shutil.rmtree(root / "photos")
        (root / "photos").write_text(content)

    return damage


REFUSED = {
    "folder missing": (
        "dtd",
        gone("dtd"),
        r"data=dtd: .*/dtd does not exist; docs/datasets.md#dtd says what belongs there",
    ),
    "images missing": ("dtd", gone("dtd/images"), r"data=dtd: .*/dtd/images does not exist; docs/datasets.md#dtd"),
    "split missing": (
        "dtd",
        gone(DTD),
        r"split_zhou_DescribableTextures.json does not exist; docs/datasets.md#dtd .*data.allow_fallback_split=true",
    ),
    "split not JSON": ("dtd", written(DTD, "<html>"), r"Textures.json is not JSON \(Expecting value: line 1 column 1"),
    "split not UTF-8": ("dtd", written(DTD, b"\xff\xfe\x00"), r"Textures.json is not a text file in UTF-8"),
    "split a list": ("dtd", written(DTD, "[]"), r"Textures.json is not a split file: it needs the lists train, val"),
    "split without val": ("dtd", written(DTD, '{"train": [], "test": []}'), r"not a split file"),
    "split empty": ("dtd", written(DTD, '{"train": [], "val": [], "test": []}'), r"Textures.json lists no image"),
    "row too short": ("dtd", first_row(["a.jpg", 0]), r"json: train\[0\] is \[\"a.jpg\", 0\], not of the form"),
    "row with text label": ("dtd", first_row(["a.jpg", "0", "a"]), r"train\[0\] .* not of the form"),
    "row with truth label": ("dtd", first_row(["a.jpg", True, "a"]), r"train\[0\] .* not of the form"),
    "row an object": ("dtd", first_row({"path": "a.jpg"}), r"train\[0\] .* not of the form"),
    "row absolute": ("dtd", first_row(["/a.jpg", 0, "a"]), r"train\[0\]: '/a.jpg' is not relative"),
    "row outside": ("dtd", first_row(["a/../../b.jpg", 0, "a"]), r"train\[0\]: .* is not relative"),
    "label too high": (
        "dtd",
        first_row(["a.jpg", 3, "dots"]),
        r"1 label, which must be 0 to 0, but 0 does not .* 3 \('dots'\)",
    ),
    "label below 0": ("dtd", first_row(["a.jpg", -1, "dots"]), r"but 0 does not occur and -1 \('dots'\) does"),
    "variants missing": (
        "fgvc_aircraft",
        gone("fgvc_aircraft/variants.txt"),
        r"variants.txt does not exist; docs/datasets.md#fgvc",
    ),
    "unknown variant": (
        "fgvc_aircraft",
        changed("fgvc_aircraft/images_variant_val.txt", "An-12", "An-13"),
        r"images_variant_val.txt, line 2: 'An-13' is not in variants.txt",
    ),
    "no variant": (
        "fgvc_aircraft",
        changed("fgvc_aircraft/images_variant_test.txt", " An-12", ""),
        r"images_variant_test.txt, line 2: '1000014' is not of the form 'image variant'",
    ),
    "val flat": (
        "imagenet",
        flatten,
        r"images/val has 10 files and no class folders; sort the images into one folder per",
    ),
    "val missing": ("imagenet", gone(VAL), r"images/val does not exist; docs/datasets.md#imagenet says"),
    "class names missing": ("imagenet", gone("imagenet/classnames.txt"), r"classnames.txt does not exist"),
    "class without folder": (
        "imagenet",
        gone(f"{VAL}/n03773504"),
        r"val/n03773504 does not exist \(1 class folder is missing\)",
    ),
    "class without training folder": (
        "imagenet",
        gone("imagenet/images/train/n03773504"),
        r"train/n03773504 does not exist \(1 class folder is missing\)",
    ),
    "folder without class": ("imagenet", written(f"{VAL}/n999/x.JPEG", ""), r"val/n999 is not in classnames.txt"),
    "class names without blank": (
        "imagenet",
        changed("imagenet/classnames.txt", "n01440764 tench", "n01440764"),
        r"classnames.txt, line 1: 'n01440764' is not of the form 'wnid name'",
    ),
    "class names repeated": (
        "imagenet",
        changed("imagenet/classnames.txt", "n01608432", "n01440764"),
        r"classnames.txt, line 2: n01440764 has a line already",
    ),
    "V2 folder missing": (
        "imagenet_v2",
        gone("imagenetv2/imagenetv2-matched-frequency-format-val/3"),
        r"format-val/3 does not exist \(1 class folder",
    ),
    "V2 folder too many": (
        "imagenet_v2",
        written("imagenetv2/imagenetv2-matched-frequency-format-val/5/x.jpeg", ""),
        r"format-val/5 has no class \(1 folder too many\)",
    ),
    "sketch class missing": (
        "imagenet_sketch",
        gone("imagenet-sketch/images/n01440764"),
        r"images/n01440764 does not exist",
    ),
    "no class names at all": (
        "imagenet_a",
        gone("imagenet/classnames.txt"),
        r"neither .*/imagenet-adversarial/classnames.txt nor .*/imagenet/classnames.txt exists; docs/datasets.md#imagenet_a",
    ),
    "ImageNet lacks a class": (
        "imagenet_a",
        gone("imagenet/images/train/n04008634"),
        r"data=imagenet_a: .*imagenet/images/train/n04008634 does not exist",
    ),
    "photos missing": ("folder", gone("photos"), r"data=folder: .*/photos does not exist; docs/datasets.md#folder"),
    "one class": (
        "folder",
        lambda root: [gone(f"photos/{name}")(root) for name in ("my cat", "teapot")],
        r"photos has 1 class;",
    ),
    "class without photo": (
        "folder",
        written("photos/new/notes.txt", ""),
        r"class folder .*/photos/new has no photo \(.avif,",
    ),
    "stray photo": (
        "folder",
        written("photos/lost.jpg", "x"),
        r"photos/lost.jpg is in no class folder \(1 such photo\)",
    ),
    "no test part": (
        "folder",
        only_parts("train", "val"),
        r"photos has the folders train, val, but none to test on; call one of them test.*data.folder=.*/photos/train",
    ),
    "nothing": ("folder", only_parts(), r"photos does not exist"),
    "empty": (
        "folder",
        lambda root: only_parts()(root) or (root / "photos").mkdir(),
        r"photos holds no folders; it needs one folder per class",
    ),
    "table without label": ("folder", table("path,kind\n"), r"has no column 'label'; its header is 'path, kind'"),
    "table without path": ("folder", table("name;label\na;b\n"), r"has no column 'path'; its header is 'name, label'"),
    "table empty": ("folder", table(""), r"has no column 'path'; its header is ''"),
    "table without rows": ("folder", table("path,label\n"), r"photos has 0 classes"),
    "table row short": ("folder", table("path,label\na,b\nc\n"), r"row 3 has 1 cell, but the header has 2"),
    "table label empty": ("folder", table("path,label\na,b\n\nc, \n"), r"row 4: label is empty"),
    "table split unknown": (
        "folder",
        table("path,label,split\na,b,later\n"),
        r"row 2: split 'later' is not one of train, val, test",
    ),
    "table row twice": ("folder", table("path,label\na,b\n./a,c\n"), r"row 3: a has a row already"),
    "table row outside": ("folder", table("path,label\n../a,b\n"), r"row 2: ../a is outside"),
    "table row elsewhere": ("folder", table("path,label\n/etc/a,b\n"), r"row 2: /etc/a is outside"),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "damage", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, name, damage, message):
    data_tree.build(tmp_path)
    read(tmp_path, name)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        read(tmp_path, name)
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith(f"data={name}: ")


CARS = "stanford_cars/cars_test_annos_withlabels.mat"
FALLBACK_REFUSED = {
    "class too small": ("dtd", gone("dtd/images/banded/banded_0001.jpg"), None),
    "pets line": (
        "oxford_pets",
        changed("oxford_pets/annotations/test.txt", " 1 1 1", " 1"),
        r"test.txt, line 1: 'Abyssinian_4 1' is not",
    ),
    "pets class": (
        "oxford_pets",
        changed("oxford_pets/annotations/trainval.txt", " 1 1 1", " one 1 1"),
        r"trainval.txt, line 1: 'one' is not a whole number",
    ),
    "pets labels": (
        "oxford_pets",
        lambda root: (
            [changed("oxford_pets/annotations/trainval.txt", " 3 1 3", " 9 1 3")(root) for _ in range(3)]
            and changed("oxford_pets/annotations/test.txt", " 3 1 3\nBengal_5 3 1 3", " 9 1 3\nBengal_5 9 1 3")(root)
        ),
        r"has 3 labels, which must be 0 to 2, but 2 does not occur and 8 \('bengal'\) does",
    ),
    "cars not Matlab": (
        "stanford_cars",
        written(CARS, "x" * 200),
        r"withlabels.mat is not a .mat file that can be read",
    ),
    "cars missing": (
        "stanford_cars",
        gone("stanford_cars/devkit/cars_meta.mat"),
        r"cars_meta.mat does not exist; docs/data",
    ),
    "cars variable": (
        "stanford_cars",
        lambda root: shutil.copy(root / "stanford_cars/devkit/cars_meta.mat", root / CARS),
        r"withlabels.mat has no variable 'annotations'",
    ),
    "flowers names": (
        "flowers102",
        changed("oxford_flowers/cat_to_name.json", '"3"', '"4"'),
        r"no name for class 3 of image 1",
    ),
    "flowers JSON": ("flowers102", written("oxford_flowers/cat_to_name.json", "{"), r"cat_to_name.json is not JSON"),
    "flowers list": (
        "flowers102",
        written("oxford_flowers/cat_to_name.json", "[]"),
        r"cat_to_name.json must be an object",
    ),
    "sun class": (
        "sun397",
        changed("sun397/Testing_01.txt", "/b/", "/c/"),
        r"Testing_01.txt, line 5: 'c/ball_pit' is not in",
    ),
    "ucf class": (
        "ucf101",
        changed("ucf101/ucfTrainTestlist/trainlist01.txt", "HammerThrow/", "Hammerthrow/"),
        r"trainlist01.txt, line 4: 'Hammerthrow' is not in the list of classes",
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "damage", "message"), FALLBACK_REFUSED.values(), ids=FALLBACK_REFUSED)
def test_refused_by_fallbacks(tmp_path, name, damage, message):
    data_tree.build(tmp_path, missing_split=True)
    damage(tmp_path)
    if message is None:  # 4 images still are enough; 3 are not
        assert len(read(tmp_path, name, allow=True).test) == 5
        gone("dtd/images/banded/banded_0002.jpg")(tmp_path)
        message = r"class 'banded' has 3 images, too few to make train, val and test of them; use the split file"
    with pytest.raises(UserError, match=message) as refusal:
        read(tmp_path, name, allow=True)
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith(f"data={name}: ")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ignored": []}, "data.reader.fallback._target_ is missing"),
        ({"_target_": "common.data.split_file.foldres"}, "data.reader.fallback._target_=.* cannot be imported"),
        ({"_target_": "common.data.split_file.folders", "ignore": []}, "unexpected keyword argument 'ignore'"),
        (None, "Textures.json does not exist; docs/datasets.md#dtd says what belongs there$"),
    ],
    ids=["no target", "misspelt target", "misspelt argument", "no fallback"],
)
def test_fallback_entries_are_checked(bare_tree, entry, message):
    with pytest.raises(UserError, match=message):
        read(bare_tree, "dtd", allow=True, fallback=entry)


def test_saved_split_files_look_like_those_of_coop(tree):
    location = Location("dtd", tree, tree / "dtd")
    content = (tree / DTD).read_text()
    start = '{\n    "train": [\n        [\n            "banded/banded_0001.jpg",\n            0,\n            "banded"\n        ],'
    assert content.startswith(start) and content.endswith("        ]\n    ]\n}")
    assert len(parse(location, tree / DTD, "images").train) == 6


@pytest.mark.parametrize("shots", [1, 5])
def test_the_tree_has_the_shots_it_was_asked_for(tmp_path, shots):
    data_tree.build(tmp_path, shots)
    for name in (*SPLIT_FILES, "fgvc_aircraft"):
        source = read(tmp_path, name)
        count = len(source.names)
        assert (len(source.train), len(source.val), len(source.test)) == (shots * count, count, 2 * count)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/a", "test/a", "extra"], "has the folders train and test, but also extra"),
        (["my_cat", "My cat"], "classes 'My cat' and 'my_cat' are one answer"),
        ([b"caf\xe9", b"bar"], "which is not UTF-8"),
    ],
    ids=["stray folder", "same answer", "latin-1"],
)
def test_own_photos_that_cannot_be_asked_about(tmp_path, folders, message):
    for name in folders:
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), os.fsencode(name))))
        path.mkdir(parents=True)
        (path / "one.png").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        own_photos.read(Location("folder", tmp_path, tmp_path))


def test_labels_by_line_need_sorted_lines(tree, tmp_path):
    shutil.copytree(tree / "imagenetv2", tmp_path / "imagenetv2")
    lines = (tree / "imagenet" / "classnames.txt").read_text().splitlines()
    (tmp_path / "imagenetv2" / "classnames.txt").write_text("\n".join(reversed(lines)))
    with pytest.raises(UserError, match="classnames.txt is not in the order of WordNet ids"):
        read(tmp_path, "imagenet_v2")


@pytest.mark.slow
def test_targets_do_not_list_training_images(tree):
    for name in ("imagenet", "imagenet_v2", "imagenet_a"):
        data = configured([name], [f"data.root={tree}"])[0]
        whole, tested = source.load(data), source.load(data, only_test=True)
        assert whole.train and not tested.train and tested.test == whole.test and tested.names == whole.names
