"""The published split files, where they lie beside the repository; skipped elsewhere."""

from __future__ import annotations

import json
import random
import re
from itertools import groupby
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.data.listing import Location
from common.data.sampling import by_label, pick
from common.data.split_file import parse, prefix, read, save_split
from tests import published_picks
from tests.test_sampling import sizes_of

REPOSITORY = Path(__file__).parent.parent
SPLITS = REPOSITORY.parent / "shared/data/coop_splits"
pytestmark = pytest.mark.skipif(not SPLITS.exists(), reason="the published split files are not here")

# Dataset: classes, training, validation and test images as published; the labels in the order in which train lists them.
PUBLISHED = {
    "caltech101": (100, 4128, 1649, 2465, range(100)),
    "oxford_pets": (37, 2944, 736, 3669, range(37)),
    "stanford_cars": (196, 6509, 1635, 8041, (13, 2, 90, 133, 105, 122)),
    "flowers102": (102, 4093, 1633, 2463, (76, 72, 87, 88, 80, 45, 73, 50)),
    "dtd": (47, 2820, 1128, 1692, range(47)),
    "eurosat": (10, 13500, 5400, 8100, range(10)),
    "ucf101": (101, 7639, 1898, 3783, range(101)),
}
# Class names by label: first, last, and those that are easy to get wrong.
NAMES = {
    "caltech101": {0: "face", 1: "leopard", 2: "motorbike", 3: "accordion", 4: "airplane", 5: "anchor", 99: "yin_yang"},
    "oxford_pets": {0: "abyssinian", 1: "american_bulldog", 2: "american_pit_bull_terrier", 36: "yorkshire_terrier"},
    "stanford_cars": {
        0: "2000 AM General Hummer SUV",
        13: "2012 Audi TTS Coupe",
        98: "2012 FIAT 500 Abarth",
        195: "2012 smart fortwo Convertible",
    },
    "flowers102": {0: "pink primrose", 76: "passion flower", 101: "blackberry lily"},
    "dtd": {0: "banded", 46: "zigzagged"},
    "eurosat": {0: "Annual Crop Land", 1: "Forest", 3: "Highway or Road", 9: "Sea or Lake"},
    "ucf101": {0: "Apply_Eye_Makeup", 34: "Hammering", 35: "Hammer_Throw", 46: "Jumping_Jack", 47: "Jump_Rope"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Every dataset with its published split file and an empty image folder."""
    found = {}
    for name in PUBLISHED:
        reader = settings(name).reader
        folder = tmp_path_factory.mktemp(name)
        (folder / reader.get("images", ".")).mkdir(exist_ok=True)
        (folder / reader.split).symlink_to(SPLITS / reader.split)
        arguments = {key: value for key, value in reader.items() if key != "_target_"}
        found[name] = read(Location(name, folder.parent, folder), **arguments)
    return found


def settings(name):
    return OmegaConf.load(REPOSITORY / f"conf/data/{name}.yaml")


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes(sources, name):
    source = sources[name]
    classes, train, val, test, _ = PUBLISHED[name]
    assert (len(source.names), len(source.train), len(source.val), len(source.test)) == (classes, train, val, test)
    assert settings(name).published == {"classes": classes, "train": train, "val": val, "test": test}
    items = source.train + source.val + source.test
    assert len({item.image for item in items}) == len(items)
    assert all(item.name == source.names[item.label] for item in items)
    assert all(len({item.label for item in part}) == classes for part in (source.train, source.val, source.test))


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_labels_and_names(sources, name):
    order = list(by_label(sources[name].train))
    expected = list(PUBLISHED[name][4])
    assert order[: len(expected)] == expected
    assert {label: sources[name].names[label] for label in NAMES[name]} == NAMES[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lists_are_drawn_from_blocks_of_these_sizes(sources, name):
    for part, runs in zip((sources[name].train, sources[name].val), published_picks.PUBLISHED[name], strict=False):
        assert [len(list(block)) for _, block in groupby(part, key=lambda item: item.label)] == sizes_of(runs)


@pytest.mark.sampled
@pytest.mark.parametrize("name", PUBLISHED)
def test_saved_again_to_the_byte(tmp_path, name):
    reader, location = settings(name).reader, Location(name, tmp_path, tmp_path)
    images = reader.get("images", ".")
    save_split(tmp_path / "again.json", location, parse(location, SPLITS / reader.split, images), images)
    assert (tmp_path / "again.json").read_bytes() == (SPLITS / reader.split).read_bytes()


def test_keys_begin_with_the_image_folder(sources):
    for name in PUBLISHED:
        start = f"{name}/{prefix(settings(name).reader.get('images', '.'))}"
        assert all(item.image.startswith(start) for item in sources[name].train)
    assert sources["caltech101"].train[0].image == "caltech101/101_ObjectCategories/Faces/image_0274.jpg"
    assert sources["stanford_cars"].train[0].image == "stanford_cars/cars_train/05266.jpg"


def test_flower_names_are_those_of_the_name_list(sources):
    names = json.loads((SPLITS / "cat_to_name.json").read_text())
    assert sources["flowers102"].names == tuple(names[str(number)] for number in range(1, 103))


def test_the_fallbacks_name_classes_as_the_split_files_do(sources):
    renames = settings("eurosat").reader.fallback.renames
    eurosat = {item.name: item.image.split("/")[2] for item in sources["eurosat"].train}
    assert all(renames.get(folder, folder) == name for name, folder in eurosat.items()) and len(eurosat) == 10
    renames = settings("caltech101").reader.fallback.renames
    assert all(renames.get(i.image.split("/")[2], i.image.split("/")[2]) == i.name for i in sources["caltech101"].train)
    assert all(
        item.image.split("/")[2].rpartition("_")[0].lower() == item.name for item in sources["oxford_pets"].train
    )
    for item in sources["ucf101"].train:
        folder, frame = item.image.split("/")[2:]
        action = frame.split("_")[1].replace("HandStand", "Handstand")
        assert "_".join(re.findall("[A-Z][^A-Z]*", action)) == folder == item.name


@pytest.mark.parametrize(
    ("name", "shots", "first"),
    [
        (
            "caltech101",
            1,
            "Faces/image_0201.jpg Leopards/image_0123.jpg Motorbikes/image_0036.jpg accordion/image_0043.jpg"
            " airplanes/image_0663.jpg anchor/image_0027.jpg ant/image_0003.jpg barrel/image_0022.jpg",
        ),
        ("oxford_pets", 4, "Abyssinian_141.jpg"),
    ],
)
def test_seed_1_picks_the_published_images(sources, name, shots, first):
    start = f"{name}/{prefix(settings(name).reader.images)}"
    picked = [item.image.removeprefix(start) for item in pick(sources[name].train, shots, random.Random(1))]
    assert picked[: len(first.split())] == first.split()
