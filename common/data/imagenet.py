"""Read ImageNet and other image sets of its classes. No download, no torch.

A class is a WordNet id such as `n01440764`; ImageNet's label order is that of the sorted ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from common.counted import agree, counted
from common.data.listing import Location, collect, fields, files, lines, subfolders
from common.data.source import Parts, assemble
from common.types import Item, Source, UserError

# ImageNet (ILSVRC 2012): `images/train` and `images/val` with one folder per class, named by its WordNet id, and
# `classnames.txt` with CLIP's class names. Two of the 1,000 names occur twice (missile, sunglasses).
#
# CoOp tests on the official validation set, since the labels of the test set are secret. CoOp takes file names in the
# order of the file system; here they are sorted, so that a seed picks the same images on every machine.

TRAIN, TEST = "images/train", "images/val"
CLASSNAMES = "classnames.txt"


def read(location: Location) -> Source:
    """Read the training images, if present, and the validation set as test set; labels in the order of WordNet ids.

    Raises:
        UserError: The validation set is missing or not sorted into class folders, or the class folders of the two
            parts differ.
    """
    names = classnames(location, location.need(CLASSNAMES))
    location.need(TEST)
    wanted = (TEST,) if location.only_test else (TRAIN, TEST)
    present = [part for part in wanted if (location.folder / part).is_dir()]
    folders = {part: class_folders(location, location.folder / part, names) for part in present}
    # both parts must have the same class folders, or labels would differ between them
    wnids = sorted(set().union(*folders.values()))
    for part in present:
        same_folders(location, location.folder / part, folders[part], wnids)
    images = {part: items(location, location.folder / part, location.key(part), wnids, names) for part in present}
    parts = Parts(images.get(TRAIN, []), (), images[TEST])
    return assemble(location, [names[wnid] for wnid in wnids], parts, "ImageNet validation set")


def classnames(location: Location, path: Path) -> dict[str, str]:
    """Read the class name of every WordNet id, in file order; each line is `<WordNet id> <class name>`.

    Raises:
        UserError: A line has another form or repeats an id.
    """
    names: dict[str, str] = {}
    for line in lines(location, path):
        wnid, name = fields(location, line, "wnid name")
        if wnid in names:
            raise location.error(f"{line[0]}: {wnid} has a line already")
        names[wnid] = name
    return names


def class_folders(location: Location, folder: Path, names: dict[str, str]) -> list[str]:
    """Return the sorted class folders in a folder.

    Raises:
        UserError: There is none, or one is not in `classnames.txt`.
    """
    folders = subfolders(location, folder)
    if not folders:
        raise location.error(
            f"{folder} has {counted(len(files(location, folder)), 'file')} and no class folders; sort the images into"
            " one folder"
            " per class, named by its WordNet id"
        )
    if strange := [name for name in folders if name not in names]:
        raise location.error(f"{folder / strange[0]} is not in {CLASSNAMES}: a class folder is named by its WordNet id")
    return folders


def same_folders(location: Location, folder: Path, actual: Iterable[str], expected: Iterable[str]) -> None:
    """Raise an error if class folders are missing or there are too many."""
    actual, expected = set(actual), set(expected)
    if missing := sorted(expected - actual):
        raise location.error(
            f"{folder / missing[0]} does not exist ({counted(len(missing), 'class folder')}"
            f" {agree(len(missing), 'is', 'are')} missing)"
        )
    if extra := sorted(actual - expected):
        raise location.error(f"{folder / extra[0]} has no class ({counted(len(extra), 'folder')} too many)")


def items(location: Location, folder: Path, key: str, wnids: list[str], names: dict[str, str]) -> list[Item]:
    """Return the images of class folders; a label is a position in `wnids`."""
    return collect(location, folder, key, [(wnid, label, names[wnid]) for label, wnid in enumerate(wnids)])


# ImageNetV2, -Sketch, -A and -R: other images of ImageNet's classes, all of them for testing.
#
# Training uses ImageNet's own training images of the classes in the set, if `imagenet/images/train` lies beside it.
# Class names come from the `classnames.txt` in the set's folder or, without it, from ImageNet's.

IMAGENET = "imagenet"  # ImageNet's folder beside this one, and its name in keys


def by_wnid(location: Location, *, images: str, all_classes: bool = False) -> Source:
    """Read a set with one folder per class, named by its WordNet id; labels number the sorted folders of the set.

    Args:
        location: Location of the dataset.
        images: The folder of the class folders, in the dataset's folder.
        all_classes: Require every class of `classnames.txt`.

    Raises:
        UserError: A folder or `classnames.txt` is missing, or a folder is not a class.
    """
    names = _classnames(location)
    folder = location.need(images)
    wnids = class_folders(location, folder, names)
    if all_classes:
        same_folders(location, folder, wnids, names)
    test = items(location, folder, location.key(images), wnids, names)
    return _source(location, wnids, names, test)


def by_number(location: Location, *, images: str) -> Source:
    """Read a set whose class folders are the labels 0, 1, 2, ...: the lines of `classnames.txt`.

    Args:
        location: Location of the dataset.
        images: The folder of the class folders, in the dataset's folder.

    Raises:
        UserError: A folder or `classnames.txt` is missing, or folders and lines differ in number.
    """
    names = _classnames(location)
    if list(names) != sorted(names):
        raise location.error(
            "classnames.txt is not in the order of WordNet ids, so its lines are not the labels; sort it"
        )
    folder = location.need(images)
    same_folders(location, folder, subfolders(location, folder), map(str, range(len(names))))
    classes = [(str(label), label, name) for label, name in enumerate(names.values())]
    return _source(location, list(names), names, collect(location, folder, location.key(images), classes))


def _classnames(location: Location) -> dict[str, str]:
    location.need(".")
    own, shared = location.folder / CLASSNAMES, location.root / IMAGENET / CLASSNAMES
    path = own if own.exists() else shared
    if not path.exists():
        raise UserError(
            f"data={location.name}: neither {own} nor {shared} exists; {location.section} says how to make one"
        )
    return classnames(location, path)


def _source(location: Location, wnids: list[str], names: dict[str, str], test: Sequence[Item]) -> Source:
    folders = {location.name: location.folder, IMAGENET: location.root / IMAGENET}
    train = _training_images(location, wnids, names, location.root / IMAGENET / TRAIN)
    origin = "official test set, trained on ImageNet" if train else "official test set"
    return assemble(location, [names[wnid] for wnid in wnids], Parts(train, (), test), origin, folders)


def _training_images(location: Location, wnids: list[str], names: dict[str, str], folder: Path) -> list[Item]:
    if location.only_test or not folder.is_dir():
        return []
    present = set(subfolders(location, folder))
    same_folders(location, folder, present & set(wnids), wnids)
    return items(location, folder, f"{IMAGENET}/{TRAIN}", wnids, names)
