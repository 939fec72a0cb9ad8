"""A small `$DATA` with every dataset in its own format: real pictures, annotation files, split files.

Every class has `shots_per_class` training images, one for validation and two for testing. Names and file layouts are
those of the real datasets, their traps included.
"""

from __future__ import annotations

import colorsys
import io
import json
import random
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from common.data.listing import Location
from common.data.source import Parts
from common.data.split_file import save_split
from common.types import Item

# Dataset, its folder, image folder, split file, file names, and class names by folder.
CLASS_FOLDERS = [
    (
        "caltech101",
        "caltech-101",
        "101_ObjectCategories",
        "split_zhou_Caltech101.json",
        "image_{number:04d}.jpg",
        {
            "Faces": "face",
            "Leopards": "leopard",
            "accordion": "accordion",
            "airplanes": "airplane",
            "yin_yang": "yin_yang",
        },
    ),
    (
        "food101",
        "food-101",
        "images",
        "split_zhou_Food101.json",
        "10056{number:02d}.jpg",
        {"apple_pie": "apple_pie", "beef_carpaccio": "beef_carpaccio", "waffles": "waffles"},
    ),
    (
        "dtd",
        "dtd",
        "images",
        "split_zhou_DescribableTextures.json",
        "{folder}_{number:04d}.jpg",
        {"banded": "banded", "dotted": "dotted", "polka-dotted": "polka-dotted"},
    ),
    (
        "eurosat",
        "eurosat",
        "2750",
        "split_zhou_EuroSAT.json",
        "{folder}_{number}.jpg",
        {"AnnualCrop": "Annual Crop Land", "Forest": "Forest", "SeaLake": "Sea or Lake"},
    ),
]
PETS = ("Abyssinian", "american_pit_bull_terrier", "Bengal")
CARS = ("AM General Hummer SUV 2000", "Audi TTS Coupe 2012", "Ram C/V Cargo Van Minivan 2012")
FLOWERS = ("pink primrose", "hard-leaved pocket orchid", "canterbury bells")
AIRCRAFT = ("707-320", "An-12", "F-16A/B", "F/A-18")
SCENES = {"a/abbey": "abbey", "a/apartment_building/outdoor": "outdoor apartment_building", "b/ball_pit": "ball_pit"}
ACTIONS = {  # by its name in the lists; in the order of the labels, which is not that of the folders
    "ApplyEyeMakeup": "Apply_Eye_Makeup",
    "HandstandPushups": "Handstand_Pushups",
    "Hammering": "Hammering",
    "HammerThrow": "Hammer_Throw",
}
WNIDS = {
    "n01440764": "tench",
    "n01608432": "kite (bird of prey)",
    "n02788148": "baluster / handrail",
    "n03773504": "missile",
    "n04008634": "missile",
}

Row = tuple[str, int, str]  # path inside the image folder, label, class name


def build(root: Path, shots_per_class: int = 2, missing_split: bool = False) -> Path:
    """Write the tree and return `root`. `missing_split`: without the split files, so that only fallbacks are left."""
    for name, folder, images, split, classes in _with_split_files(root, shots_per_class):
        for rows in classes:
            for path, label, _ in rows:
                picture(root / folder / images / path, label)
        if not missing_split:
            _save(Location(name, root, root / folder), images, split, classes, shots_per_class)
    _aircraft(root / "fgvc_aircraft", shots_per_class)
    _imagenet(root, shots_per_class)
    _photos(root / "photos", shots_per_class)
    return root


def picture(path: Path, label: int = 0) -> None:
    """A picture that is the same every time, coloured by its label, with noise that its file name decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encoded(path.name, label))


@cache
def _encoded(name: str, label: int) -> bytes:
    colour = np.array(colorsys.hsv_to_rgb(label * 0.17 % 1, 0.8, 0.8)) * 255
    noise = np.random.default_rng(random.Random(name).randrange(2**32)).integers(-40, 41, (24, 32, 3))
    kind = "PNG" if name.lower().endswith(".png") or name == "sun_02.jpg" else "JPEG"  # some of SUN397's are PNG
    content = io.BytesIO()
    Image.fromarray((colour + noise).clip(0, 255).astype("uint8")).save(content, kind)
    return content.getvalue()


def _save(location: Location, images: str, split: str, classes: list[list[Row]], shots: int) -> None:
    rows = {"train": [], "val": [], "test": []}
    for group in classes:
        rows["train"] += group[:shots]
        rows["val"] += group[shots : shots + 1]
        rows["test"] += group[shots + 1 :]
    if location.name == "stanford_cars":  # in the order of the files, over all classes
        rows["test"].sort()
    start = "" if images == "." else f"{images}/"
    items = {part: [Item(location.key(start + path), label, name) for path, label, name in rows[part]] for part in rows}
    save_split(location.folder / split, location, Parts(**items), images)


def _with_split_files(root: Path, shots: int):
    """Dataset, folder, image folder, split file, and the rows of every class: training, validation, test."""
    numbers = range(1, shots + 4)
    for name, folder, images, split, pattern, names in CLASS_FOLDERS:
        yield (
            name,
            folder,
            images,
            split,
            [
                [(f"{sub}/{pattern.format(folder=sub, number=number)}", label, names[sub]) for number in numbers]
                for label, sub in enumerate(names)
            ],
        )
    for ignored in ("BACKGROUND_Google", "Faces_easy"):
        picture(root / "caltech-101/101_ObjectCategories" / ignored / "image_0001.jpg")
    yield "oxford_pets", "oxford_pets", "images", "split_zhou_OxfordPets.json", _pets(root / "oxford_pets", shots)
    yield "stanford_cars", "stanford_cars", ".", "split_zhou_StanfordCars.json", _cars(root / "stanford_cars", shots)
    yield (
        "flowers102",
        "oxford_flowers",
        "jpg",
        "split_zhou_OxfordFlowers.json",
        _flowers(root / "oxford_flowers", shots),
    )
    yield "sun397", "sun397", "SUN397", "split_zhou_SUN397.json", _sun397(root / "sun397", shots)
    yield "ucf101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", _ucf101(root / "ucf101", shots)


def _pets(folder: Path, shots: int) -> list[list[Row]]:
    numbers = range(1, shots + 4)
    lines = [[f"{breed}_{number} {label} 1 {label}" for number in numbers] for label, breed in enumerate(PETS, start=1)]
    _write(folder / "annotations/trainval.txt", [line for group in lines for line in group[: shots + 1]])
    _write(folder / "annotations/test.txt", [line for group in lines for line in group[shots + 1 :]])
    return [[(f"{breed}_{number}.jpg", label, breed.lower()) for number in numbers] for label, breed in enumerate(PETS)]


def _cars(folder: Path, shots: int) -> list[list[Row]]:
    """The classes take turns in the numbering of the files."""
    classes: list[list[Row]] = [[], [], []]
    for part, count, file in (
        ("train", shots + 1, "devkit/cars_train_annos.mat"),
        ("test", 2, "cars_test_annos_withlabels.mat"),
    ):
        kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
        annotations = np.empty((1, 3 * count), dtype=kind)
        for position in range(3 * count):
            label, image = position % 3, f"{position + 1:05d}.jpg"
            annotations[0, position] = (np.array([[30]]), np.array([[label + 1]], "uint8"), image)
            model, _, year = CARS[label].rpartition(" ")
            classes[label].append((f"cars_{part}/{image}", label, f"{year} {model}"))
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        savemat(folder / file, {"annotations": annotations})
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array([CARS], dtype=object)})
    return [classes[1], classes[0], classes[2]]  # labels not ascending, as in the real file


def _flowers(folder: Path, shots: int) -> list[list[Row]]:
    """The classes take turns, beginning with the last."""
    labels = [(2, 0, 1)[position % 3] for position in range(3 * (shots + 3))]
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], "uint8") + 1})
    (folder / "cat_to_name.json").write_text(json.dumps({str(k): FLOWERS[k - 1] for k in (3, 1, 2)}))
    rows = [(f"image_{number:05d}.jpg", label, FLOWERS[label]) for number, label in enumerate(labels, start=1)]
    return [[row for row in rows if row[1] == label] for label in (2, 0, 1)]


def _sun397(folder: Path, shots: int) -> list[list[Row]]:
    numbers = range(1, shots + 4)
    _write(folder / "ClassName.txt", [f"/{path}" for path in SCENES])
    for file, chosen in (("Training_01.txt", numbers[: shots + 1]), ("Testing_01.txt", numbers[shots + 1 :])):
        _write(folder / file, [f"/{path}/sun_{number:02d}.jpg" for path in SCENES for number in chosen])
    return [
        [(f"{path}/sun_{number:02d}.jpg", label, SCENES[path]) for number in numbers]
        for label, path in enumerate(SCENES)
    ]


def _ucf101(folder: Path, shots: int) -> list[list[Row]]:
    """Windows line ends and a file name that spells its class in another way, as in the real lists."""
    videos = {
        action: [f"v_{action.replace('Handstand', 'HandStand')}_g01_c{number:02d}" for number in range(1, shots + 4)]
        for action in ACTIONS
    }
    label = {action: number for number, action in enumerate(ACTIONS, start=1)}
    lists, end = folder / "ucfTrainTestlist", "\r\n"
    _write(lists / "classInd.txt", [f"{label[action]} {action}" for action in ACTIONS], end)
    train = [
        f"{action}/{video}.avi {label[action]}" for action in sorted(videos) for video in videos[action][: shots + 1]
    ]
    _write(lists / "trainlist01.txt", train, end)
    test = [f"{action}/{video}.avi" for action in sorted(videos) for video in videos[action][shots + 1 :]]
    _write(lists / "testlist01.txt", test, end)
    return [
        [(f"{ACTIONS[action]}/{video}.jpg", label[action] - 1, ACTIONS[action]) for video in videos[action]]
        for action in ACTIONS
    ]


def _aircraft(folder: Path, shots: int) -> None:
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for position in range(4 * (shots + 3)):  # the classes take turns
        turn, label = divmod(position, 4)
        image = f"{1000001 + position:07d}"
        picture(folder / f"images/{image}.jpg", label)
        part = "train" if turn < shots else "val" if turn == shots else "test"
        parts[part].append(f"{image} {AIRCRAFT[label]}")
    _write(folder / "variants.txt", AIRCRAFT)
    for part, lines in parts.items():
        _write(folder / f"images_variant_{part}.txt", lines)


def _imagenet(root: Path, shots: int) -> None:
    names = [f"{wnid} {name}" for wnid, name in WNIDS.items()]
    for folder in ("imagenet", "imagenetv2", "imagenet-sketch"):
        _write(root / folder / "classnames.txt", names)
    for label, wnid in enumerate(WNIDS):
        for number in range(1, shots + 1):
            picture(root / f"imagenet/images/train/{wnid}/{wnid}_{number}.JPEG", label)
        for number in (1, 2):
            image = f"ILSVRC2012_val_{2 * label + number:08d}.JPEG"
            picture(root / f"imagenet/images/val/{wnid}/{image}", label)
            picture(root / f"imagenetv2/imagenetv2-matched-frequency-format-val/{label}/{number}.jpeg", label)
            picture(root / f"imagenet-sketch/images/{wnid}/sketch_{number}.JPEG", label)
            if label in (1, 2, 4):
                picture(root / f"imagenet-adversarial/imagenet-a/{wnid}/0.00{number}_fox_0.9.jpg", label)
            if label in (0, 2, 3):
                picture(root / f"imagenet-rendition/imagenet-r/{wnid}/art_{number}.jpg", label)
    for folder in ("imagenet-adversarial/imagenet-a", "imagenet-rendition/imagenet-r"):
        (root / folder / "README.txt").write_text("This is no class.\n")


def _photos(folder: Path, shots: int) -> None:
    for label, name in enumerate(("Her_dog", "my cat", "teapot")):
        for number in range(1, shots + 3):
            picture(folder / name / f"{number}.png", label)
        picture(folder / name / "holiday/2024/beach.JPG", label)
        picture(folder / name / ".thumbnails/1.png", label)
        (folder / name / ".hidden.png").write_bytes(b"\0")
        (folder / name / "notes.txt").write_text("no photo\n")


def _write(path: Path, lines: list[str] | tuple[str, ...], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())
