"""Other pictures of ImageNet's classes: ImageNetV2, -Sketch, -A and -R. All their images are for testing.

To train, take ImageNet's own training images of the classes that the set has, if `imagenet/images/train` lies beside
it. Class names come from the `classnames.txt` in the set's folder or, without it, from ImageNet's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.data import imagenet
from common.data.assemble import Parts, assemble
from common.data.listing import collect, subfolders
from common.data.location import Location
from common.types import Item, Source, UserError

IMAGENET = "imagenet"  # ImageNet's folder beside this one, and its name in keys


def by_wnid(location: Location, *, images: str, all_classes: bool = False) -> Source:
    """A set with one folder per class, named by its WordNet id; a label is its number among the set's own folders.

    Args:
        location: Of the dataset.
        images: The folder of the class folders, in the dataset's folder.
        all_classes: Whether every class of `classnames.txt` must be there.

    Raises:
        UserError: A folder or `classnames.txt` is missing, or a folder is not a class.
    """
    names = _classnames(location)
    folder = location.need(images)
    wnids = imagenet.class_folders(location, folder, names)
    if all_classes:
        imagenet.same_folders(location, folder, wnids, names)
    test = imagenet.items(location, folder, location.key(images), wnids, names)
    return _source(location, wnids, names, test)


def by_number(location: Location, *, images: str) -> Source:
    """A set whose class folders are the labels 0, 1, 2, ...: the lines of `classnames.txt`.

    Args:
        location: Of the dataset.
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
    imagenet.same_folders(location, folder, subfolders(location, folder), map(str, range(len(names))))
    classes = [(str(label), label, name) for label, name in enumerate(names.values())]
    return _source(location, list(names), names, collect(location, folder, location.key(images), classes))


def _classnames(location: Location) -> dict[str, str]:
    location.need(".")
    own, shared = location.folder / imagenet.CLASSNAMES, location.root / IMAGENET / imagenet.CLASSNAMES
    path = own if own.exists() else shared
    if not path.exists():
        raise UserError(
            f"data={location.name}: neither {own} nor {shared} exists; {location.section} says how to make one"
        )
    return imagenet.classnames(location, path)


def _source(location: Location, wnids: list[str], names: dict[str, str], test: Sequence[Item]) -> Source:
    folders = {location.name: location.folder, IMAGENET: location.root / IMAGENET}
    train = _training_images(location, wnids, names, location.root / IMAGENET / imagenet.TRAIN)
    origin = "official test set, trained on ImageNet" if train else "official test set"
    return assemble(location, [names[wnid] for wnid in wnids], Parts(train, (), test), origin, folders)


def _training_images(location: Location, wnids: list[str], names: dict[str, str], folder: Path) -> list[Item]:
    if location.only_test or not folder.is_dir():
        return []
    present = set(subfolders(location, folder))
    imagenet.same_folders(location, folder, present & set(wnids), wnids)
    return imagenet.items(location, folder, f"{IMAGENET}/{imagenet.TRAIN}", wnids, names)
