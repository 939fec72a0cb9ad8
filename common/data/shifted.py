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
from common.data.place import Place
from common.types import Item, Source, UserError

IMAGENET = "imagenet"  # ImageNet's folder beside this one, and its name in keys


def by_wnid(place: Place, *, images: str, all_classes: bool = False) -> Source:
    """A set with one folder per class, named by its WordNet id; a label is its place among the set's own folders.

    Args:
        place: Of the dataset.
        images: The folder of the class folders, in the dataset's folder.
        all_classes: Whether every class of `classnames.txt` must be there.

    Raises:
        UserError: A folder or `classnames.txt` is missing, or a folder is not a class.
    """
    names = _classnames(place)
    folder = place.need(images)
    wnids = imagenet.class_folders(place, folder, names)
    if all_classes:
        imagenet.same_folders(place, folder, wnids, names)
    test = imagenet.items(place, folder, place.key(images), wnids, names)
    return _source(place, wnids, names, test)


def by_number(place: Place, *, images: str) -> Source:
    """A set whose class folders are the labels 0, 1, 2, ...: the lines of `classnames.txt`.

    Args:
        place: Of the dataset.
        images: The folder of the class folders, in the dataset's folder.

    Raises:
        UserError: A folder or `classnames.txt` is missing, or folders and lines differ in number.
    """
    names = _classnames(place)
    if list(names) != sorted(names):
        raise place.error("classnames.txt is not in the order of WordNet ids, so its lines are not the labels; sort it")
    folder = place.need(images)
    imagenet.same_folders(place, folder, subfolders(place, folder), map(str, range(len(names))))
    classes = [(str(label), label, name) for label, name in enumerate(names.values())]
    return _source(place, list(names), names, collect(place, folder, place.key(images), classes))


def _classnames(place: Place) -> dict[str, str]:
    place.need(".")
    own, shared = place.folder / imagenet.CLASSNAMES, place.root / IMAGENET / imagenet.CLASSNAMES
    path = own if own.exists() else shared
    if not path.exists():
        raise UserError(f"data={place.name}: neither {own} nor {shared} exists; {place.section} says how to make one")
    return imagenet.classnames(place, path)


def _source(place: Place, wnids: list[str], names: dict[str, str], test: Sequence[Item]) -> Source:
    folders = {place.name: place.folder, IMAGENET: place.root / IMAGENET}
    train = _training_images(place, wnids, names, place.root / IMAGENET / imagenet.TRAIN)
    origin = "official test set, trained on ImageNet" if train else "official test set"
    return assemble(place, [names[wnid] for wnid in wnids], Parts(train, (), test), origin, folders)


def _training_images(place: Place, wnids: list[str], names: dict[str, str], folder: Path) -> list[Item]:
    if place.only_test or not folder.is_dir():
        return []
    present = set(subfolders(place, folder))
    imagenet.same_folders(place, folder, present & set(wnids), wnids)
    return imagenet.items(place, folder, f"{IMAGENET}/{imagenet.TRAIN}", wnids, names)
