"""ImageNet (ILSVRC 2012): `images/train` and `images/val` with one folder per class, named by its WordNet id, and
`classnames.txt` with CLIP's class names. Two of the 1,000 names occur twice (missile, sunglasses).

CoOp tests on the official validation set, since the test set's labels are secret. It takes file names in the order in
which the file system lists them; here they are sorted, so that a seed picks the same images on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from common.counted import agree, counted
from common.data.assemble import Parts, assemble
from common.data.listing import collect, fields, files, lines, subfolders
from common.data.location import Location
from common.types import Item, Source

TRAIN, TEST = "images/train", "images/val"
CLASSNAMES = "classnames.txt"


def read(location: Location) -> Source:
    """The training images, if they are there, and the validation set as test set; labels in the order of WordNet ids.

    Raises:
        UserError: The validation set is missing or not sorted into class folders, or the class folders of the two
            parts differ.
    """
    names = classnames(location, location.need(CLASSNAMES))
    location.need(TEST)
    wanted = (TEST,) if location.only_test else (TRAIN, TEST)
    present = [part for part in wanted if (location.folder / part).is_dir()]
    folders = {part: class_folders(location, location.folder / part, names) for part in present}
    wnids = sorted(set().union(*folders.values()))
    for part in present:
        same_folders(location, location.folder / part, folders[part], wnids)
    images = {part: items(location, location.folder / part, location.key(part), wnids, names) for part in present}
    parts = Parts(images.get(TRAIN, []), (), images[TEST])
    return assemble(location, [names[wnid] for wnid in wnids], parts, "ImageNet validation set")


def classnames(location: Location, path: Path) -> dict[str, str]:
    """Class name by WordNet id, in file order; each line is `<WordNet id> <class name>`.

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
    """The sorted class folders in a folder.

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
    """Refuse class folders that are missing or too many."""
    actual, expected = set(actual), set(expected)
    if missing := sorted(expected - actual):
        raise location.error(
            f"{folder / missing[0]} does not exist ({counted(len(missing), 'class folder')}"
            f" {agree(len(missing), 'is', 'are')} missing)"
        )
    if extra := sorted(actual - expected):
        raise location.error(f"{folder / extra[0]} has no class ({counted(len(extra), 'folder')} too many)")


def items(location: Location, folder: Path, key: str, wnids: list[str], names: dict[str, str]) -> list[Item]:
    """The images of class folders; labels count `wnids`."""
    return collect(location, folder, key, [(wnid, label, names[wnid]) for label, wnid in enumerate(wnids)])
