"""Read and write the labels of classification in two tools' JSON: COCO's (images, annotations, categories) and Label
Studio's full export (tasks).

COCO: https://cocodataset.org/#format-data; Label Studio: https://labelstud.io/guide/export and /guide/predictions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote
from xml.etree import ElementTree

from common.counted import counted
from common.data.layout import pictures
from common.data.listing import Location

IMAGE_KEY = re.compile(r"(?:images?|img|picture|photo)(?:_?(?:path|url))?", re.IGNORECASE)
FROM, TO = "choice", "image"  # names in Label Studio's configuration; its CSV export has them as columns
Row = tuple[str, Any, Any]  # place for error messages, path of a picture, class


@dataclass(frozen=True)
class Labelled:
    """An answer to a picture.

    path: relative to the file that is written, with `/`.
    label: the class name; None: the picture gets no label.
    score: confidence from 0 to 1.
    size: width and height in pixels; None: the picture is broken.
    """

    path: str
    label: str | None = None
    score: float | None = None
    size: tuple[int, int] | None = None


def rows(location: Location, path: Path, content: Any, labelled: bool) -> list[Row] | None:
    """Return the pictures of a COCO file or a Label Studio export; None for other content.

    Args:
        location: For errors, and for a note on pictures that are left out.
        path: The file, for error messages.
        content: Its parsed JSON.
        labelled: Leave out pictures without a class; False: return all, each with the class "".

    Raises:
        UserError: The file lacks something or contradicts itself, or a picture has two classes.
    """
    read = _coco_rows if _is_coco(content) else _task_rows if _is_tasks(content) else None
    if read is None:
        return None
    found = read(location, path, content, labelled)
    if not labelled:
        return [(where, image, "") for where, image, _ in found]
    full = [row for row in found if row[2] is not None]
    if missing := len(found) - len(full):
        location.notes.append(f"{path.name}: {counted(missing, 'picture')} without a class left out")
    return full


def _is_coco(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("images"), list)


def _coco_rows(location: Location, path: Path, content: Mapping[str, Any], labelled: bool) -> list[Row]:
    images = _by_id(location, path, content, "images", "file_name")
    labels: dict[Any, str] = {}
    if labelled:
        names = _by_id(location, path, content, "categories", "name")
        for number, each in enumerate(_objects(location, path, content, "annotations"), start=1):
            where = f"{path}, annotation {each.get('id', number)}"
            image, category = _key(location, where, each, "image_id"), _key(location, where, each, "category_id")
            if image not in images:
                raise location.error(f"{where}: image_id {image!r} is the id of no image; add the image, or remove it")
            if category not in names:
                raise location.error(f"{where}: category_id {category!r} is the id of no category; add the category")
            if labels.setdefault(image, names[category]) != names[category]:
                both = f"{labels[image]} and {names[category]}"
                raise location.error(f"{path}: {images[image]} has the classes {both}; give each photo one class")
    return [(f"{path}, image {key}", file, labels.get(key)) for key, file in images.items()]


def _by_id(location: Location, path: Path, content: Mapping[str, Any], part: str, field: str) -> dict[Any, str]:
    """Return a field of COCO's images or categories by their ids, in their order."""
    found: dict[Any, str] = {}
    for number, each in enumerate(_objects(location, path, content, part), start=1):
        where = f"{path}, {part} {number}"
        key, value = _key(location, where, each, "id"), each.get(field)
        if not isinstance(value, str) or not value:
            raise location.error(f"{where}: {field} is missing or no text")
        if key in found:
            raise location.error(f"{where}: id {key!r} occurs twice; give each its own")
        found[key] = value
    return found


def _objects(location: Location, path: Path, content: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    objects = content.get(part)
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise location.error(f"{path} has images as in COCO's format, but no list of objects called '{part}'; add it")
    return objects


def _key(location: Location, where: str, entry: Mapping[str, Any], field: str) -> int | str:
    if not isinstance(key := entry.get(field), int | str):
        raise location.error(f"{where}: {field} is missing, or neither a number nor text")
    return key


def _is_tasks(content: Any) -> bool:
    is_list = isinstance(content, list) and bool(content)
    return is_list and all(isinstance(each, dict) and isinstance(each.get("data"), dict) for each in content)


def _task_rows(location: Location, path: Path, content: Sequence[Mapping[str, Any]], labelled: bool) -> list[Row]:
    found: list[Row] = []
    for number, task in enumerate(content, start=1):
        where = f"{path}, task {task.get('id', number)}"
        found.append(
            (where, _address(location, where, task["data"]), _choice(location, where, task) if labelled else None)
        )
    return found


def _address(location: Location, where: str, data: Mapping[str, Any]) -> str:
    """Return the address of a task's image: under a key called so, else the only text that looks like one."""
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    hits = [key for key in texts if IMAGE_KEY.fullmatch(key)]
    if len(hits) != 1:
        hits = [key for key, value in texts.items() if pictures([unquote(value)])]
    if len(hits) != 1:
        among = " and ".join(hits) or "none"
        raise location.error(f"{where}: one key of its data ({', '.join(data)}) must hold a picture, but {among} could")
    return texts[hits[0]]


def _choice(location: Location, where: str, task: Mapping[str, Any]) -> str | None:
    """Return the class that a task's annotations choose; None without one. Cancelled ones do not count."""
    choices: list[str] = []
    try:
        for annotation in task.get("annotations") or []:
            if not annotation.get("was_cancelled"):
                for result in annotation["result"]:
                    if result["type"] == "choices":
                        choices += map(str, result["value"]["choices"])
    except (KeyError, TypeError, AttributeError) as error:
        raise location.error(
            f"{where} has an annotation that lacks or misuses {error}; export the tasks anew"
        ) from error
    different = list(dict.fromkeys(choices))
    if len(different) > 1:
        raise location.error(f"{where}: it has the choices {' and '.join(different)}; give each photo one class")
    return different[0] if different else None


def coco(answers: Sequence[Labelled], names: Sequence[str], model: str) -> dict[str, Any]:
    """Return answers in COCO's format, each with its `score`; pictures without a label get no annotation.

    Args:
        answers: Answers in the order of the images, whose ids count from 1.
        names: Class names in the order of the categories, whose ids count from 1.
        model: Name of the model.
    """
    ids = {name: number for number, name in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, answer in enumerate(answers, start=1):
        size = {} if answer.size is None else {"width": answer.size[0], "height": answer.size[1]}
        images.append({"id": number, "file_name": answer.path, **size})
        if answer.label in ids:
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": ids[answer.label]}
            annotations.append(annotation | {"score": answer.score})
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    described = {"description": f"Answers of {model}"}
    return {"info": described, "images": images, "annotations": annotations, "categories": categories}


def label_studio(answers: Sequence[Labelled], names: Sequence[str], model: str) -> list[dict[str, Any]]:
    """Return answers as Label Studio's tasks with predictions; pictures without a label get none.

    Label Studio serves the pictures if its LOCAL_FILES_DOCUMENT_ROOT is the folder of the file. Arguments: see `coco`.
    """
    tasks = []
    for answer in answers:
        chosen = {"from_name": FROM, "to_name": TO, "type": "choices", "value": {"choices": [answer.label]}}
        prediction = {"model_version": model, "score": answer.score, "result": [chosen]}
        address = f"/data/local-files/?d={quote(answer.path)}"
        tasks.append({"data": {TO: address}, "predictions": [prediction] if answer.label in names else []})
    return tasks


def labelling_configuration(names: Sequence[str]) -> str:
    """Return Label Studio's labelling configuration in XML: an image, and one choice among the class names."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=TO, value=f"${TO}")
    choices = ElementTree.SubElement(view, "Choices", name=FROM, toName=TO, choice="single")
    for name in names:
        ElementTree.SubElement(choices, "Choice", value=name)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"
