"""Split datasets whose labels are in annotation files, and read FGVC-Aircraft's official lists."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.data.listing import Location, fields, lines, number, text
from common.data.source import Parts, assemble
from common.data.split_file import prefix, split_classes, split_trainval
from common.types import Item, Source

# Splits of our own for datasets whose labels are in annotation files; `split_file.py` splits class folders.
#
# Every function takes the location, the image folder and the random generator. A test part that the authors publish
# stays the test part; only their training part is cut into train and val.


def pets(location: Location, images: str, rng: random.Random) -> Parts:
    """Split Oxford-IIIT Pets: lines `Abyssinian_100 1 1 1` (image, class, species, breed; from 1) in `annotations/`.

    The class name is the image name without its number, in lower case.
    """
    start = location.key(prefix(images))

    def item(line: tuple[str, str]) -> Item:
        image, label, *_ = fields(location, line, "image class species breed")
        name = image.rpartition("_")[0].lower()
        return Item(f"{start}{image}.jpg", number(location, line[0], label) - 1, name)

    return _official_test(location, rng, "annotations/trainval.txt", "annotations/test.txt", item)


def sun397(location: Location, images: str, rng: random.Random) -> Parts:
    """Split SUN397: lines `/a/abbey/sun_x.jpg` of partition 01; the label is the folder's line in `ClassName.txt`.

    The class name is the folder's path backwards, without the letter folder: `outdoor apartment_building`.
    """
    folders = [line.strip("/") for _, line in lines(location, location.need("ClassName.txt"))]
    labels = {folder: label for label, folder in enumerate(folders)}
    start = location.key(prefix(images))

    def item(line: tuple[str, str]) -> Item:
        path = line[1].strip("/")
        folder = path.rpartition("/")[0]
        label = _label(location, line, labels, folder)
        return Item(start + path, label, " ".join(reversed(folder.split("/")[1:])))

    return _official_test(location, rng, "Training_01.txt", "Testing_01.txt", item)


def ucf101(location: Location, images: str, rng: random.Random) -> Parts:
    """Split UCF101's middle frames: lines `HammerThrow/v_x.avi` of list 01; labels in `classInd.txt` (from 1).

    The class name is the folder name with `_` between the words: `Hammer_Throw`.
    """
    labels = {}
    for line in lines(location, location.need("ucfTrainTestlist/classInd.txt")):
        label, action = fields(location, line, "label class")
        labels[action] = number(location, line[0], label) - 1
    start = location.key(prefix(images))

    def item(line: tuple[str, str]) -> Item:
        action, _, video = line[1].split()[0].partition("/")
        name = "_".join(re.findall("[A-Z][^A-Z]*", action))
        frame = video.removesuffix(".avi") + ".jpg"
        return Item(f"{start}{name}/{frame}", _label(location, line, labels, action), name)

    return _official_test(location, rng, "ucfTrainTestlist/trainlist01.txt", "ucfTrainTestlist/testlist01.txt", item)


def cars(location: Location, images: str, rng: random.Random) -> Parts:
    """Split Stanford Cars by the devkit's .mat files; names begin with the year: `2012 Ram C/V Cargo Van Minivan`."""
    names = [str(name[0]) for name in _matlab(location, "devkit/cars_meta.mat", "class_names")]
    start = location.key(prefix(images))

    def items(file: str, folder: str) -> list[Item]:
        examples = []
        for row in _matlab(location, file, "annotations"):
            image, label = str(row["fname"][0]), int(row["class"][0, 0]) - 1
            # loadmat returns nested arrays; classes are counted from 1
            if not 0 <= label < len(names):
                raise location.error(f"{location.folder / file}: {image} has class {label + 1} of {len(names)}")
            examples.append(Item(f"{start}{folder}/{image}", label, year_first(names[label])))
        return examples

    train, val = split_trainval(location, items("devkit/cars_train_annos.mat", "cars_train"), rng)
    return Parts(train, val, items("cars_test_annos_withlabels.mat", "cars_test"))


def flowers(location: Location, images: str, rng: random.Random) -> Parts:
    """Split Oxford Flowers: `imagelabels.mat` has the class of every image (from 1), `cat_to_name.json` the names.

    The official parts (`setid.mat`) are not used, as in CoOp.
    """
    path = location.need("cat_to_name.json")
    names = _names(location, path)
    start = location.key(prefix(images))
    items = []
    for position, category in enumerate(map(int, _matlab(location, "imagelabels.mat", "labels")), start=1):
        if str(category) not in names:
            raise location.error(f"{path} has no name for class {category} of image {position}")
        items.append(Item(f"{start}image_{position:05d}.jpg", category - 1, names[str(category)]))
    return split_classes(location, items, rng)


def _official_test(
    location: Location, rng: random.Random, trainval: str, test: str, item: Callable[[tuple[str, str]], Item]
) -> Parts:
    """Keep the official test list; cut the official training list into train and val."""
    train, val = split_trainval(location, map(item, lines(location, location.need(trainval))), rng)
    return Parts(train, val, [item(line) for line in lines(location, location.need(test))])


def _label(location: Location, line: tuple[str, str], labels: Mapping[str, int], name: str) -> int:
    if name not in labels:
        raise location.error(f"{line[0]}: '{name}' is not in the list of classes")
    return labels[name]


def year_first(name: str) -> str:
    """Return a car's name as CoOp's files spell it, the year first.

    >>> year_first("Audi TTS Coupe 2012")
    '2012 Audi TTS Coupe'
    """
    model, _, year = name.rpartition(" ")
    return f"{year} {model}".strip()


def _names(location: Location, path: Path) -> dict[str, str]:
    try:
        names = json.loads(text(location, path))
    except json.JSONDecodeError as error:
        raise location.error(f"{path} is not JSON ({error})") from error
    if not isinstance(names, dict):
        raise location.error(f'{path} must be an object of class and name, like {{"1": "pink primrose"}}')
    return names


def _matlab(location: Location, file: str, variable: str) -> Any:
    """Return the first row of a variable in a .mat file.

    Raises:
        UserError: The file is missing or has no such variable.
    """
    from scipy.io import loadmat

    path = location.need(file)
    try:
        content = loadmat(str(path))
    except (ValueError, OSError, NotImplementedError) as error:
        raise location.error(f"{path} is not a .mat file that can be read ({error})") from error
    if variable not in content:
        raise location.error(f"{path} has no variable '{variable}'")
    return content[variable][0]


# FGVC-Aircraft: read by the official lists, which are also CoOp's split (CoOp has no split file for it).
#
# `variants.txt` has one class per line; the lines of `images_variant_{train,val,test}.txt` are image number and class.


def aircraft(location: Location) -> Source:
    """Read the dataset with its official parts; a label is the line of the class in `variants.txt`, from 0.

    Raises:
        UserError: A file is missing, or a line names an unknown class.
    """
    location.need("images")
    names = [name for _, name in lines(location, location.need("variants.txt"))]
    labels = {name: label for label, name in enumerate(names)}
    train, val, test = (
        _items(location, location.need(f"images_variant_{part}.txt"), labels) for part in ("train", "val", "test")
    )
    return assemble(location, names, Parts(train, val, test), "official lists")


def _items(location: Location, path: Path, labels: dict[str, int]) -> list[Item]:
    items = []
    for line in lines(location, path):
        image, name = fields(location, line, "image variant")
        if name not in labels:
            raise location.error(f"{line[0]}: '{name}' is not in variants.txt")
        items.append(Item(location.key(f"images/{image}.jpg"), labels[name], name))
    return items
