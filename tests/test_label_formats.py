"""COCO's and Label Studio's JSON: read as datasets, corrections and lists of pictures, and written by predict."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from PIL import Image

from common.config.composition import validate
from common.data import folder, images, source
from common.data.listing import Location
from common.predict import __main__ as command
from common.predict import cards, photos
from common.predict.classifier import Answer
from common.types import UserError
from tests import data_tree


def pictures(root, *paths):
    for path in paths:
        data_tree.picture(root / path)


def read(root, path=".", **given):
    return folder.read(Location("folder", root, root / path), **given)


def labels(source):
    return {item.image: item.name for item in source.train}


def write(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def coco(images, categories, pairs):
    return {
        "images": [{"id": key, "file_name": name} for key, name in images.items()],
        "categories": [{"id": key, "name": name} for key, name in categories.items()],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category} for n, (image, category) in enumerate(pairs, 9)
        ],
    }


def annotation(*choices, cancelled=False, kind="choices"):
    value = {"type": kind, "from_name": "kind", "to_name": "image", "value": {kind: list(choices)}}
    return {"id": 3, "was_cancelled": cancelled, "result": [value] if choices else []}


def task(image, *annotations, key="image", **data):
    return {"id": 7, "data": {key: image, **data}, "annotations": list(annotations), "predictions": []}


IMAGES, KINDS = {4: "in/a 1%.png", 8: "b.png", 9: "c.png"}, {1: "wren", 5: "tit & \u201cco\u201d", 7: "unused"}


def test_coco(tmp_path):
    """Images by their paths and names; two annotations of one category are one label."""
    pictures(tmp_path, "in/a 1%.png", "deep/b.png", "c.png")
    write(tmp_path / "a.json", coco(IMAGES, KINDS, [(4, 5), (8, 1), (4, 5)]))
    found = read(tmp_path, "a.json")
    assert labels(found) == {"folder/in/a 1%.png": "tit & \u201cco\u201d", "folder/deep/b.png": "wren"}
    assert "a.json: 1 picture without a class left out" in found.notes
    assert found.images.open("folder/deep/b.png").size == (32, 24)
    assert labels(read(tmp_path, csv="a.json")) == labels(found)


WRONG_COCO = {
    "two classes": (coco(IMAGES, KINDS, [(8, 1), (8, 5)]), "a.json: b.png has the classes wren and tit .*one class"),
    "unknown image": (coco(IMAGES, KINDS, [(4, 1), (3, 1)]), "a.json, annotation 10: image_id 3 is the id of no image"),
    "unknown category": (coco(IMAGES, KINDS, [(4, 2)]), "annotation 9: category_id 2 is the id of no category"),
    "no image": (coco(IMAGES, KINDS, [(None, 2)]), "annotation 9: image_id is missing"),
    "no name": (coco({4: None}, KINDS, []), "images 1: file_name is missing or no text"),
    "no categories": ({"images": [], "annotations": []}, "no list of objects called 'categories'; add it"),
    "one id twice": (coco(IMAGES, KINDS, []) | {"categories": [{"id": 1, "name": "x"}] * 2}, "id 1 occurs twice"),
    "one file twice": (coco({1: "b.png", 2: "b.png"}, KINDS, [(1, 1), (2, 5)]), "image 2: b.png has a row already"),
    "nothing": (coco(IMAGES, KINDS, []), "a.json has 0 classes; a task needs two or more"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_COCO.values(), ids=WRONG_COCO)
def test_wrong_coco(tmp_path, content, message):
    pictures(tmp_path, "b.png")
    write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=message) as refusal:
        read(tmp_path, "a.json")
    assert "\n" not in str(refusal.value)


def test_label_studio(tmp_path):
    """Any key for the image; predictions, cancelled annotations and those of other kinds are no labels."""
    pictures(tmp_path, "my a.png", "a%20b.png", "a b.png", "shots/c.png", "d.png")
    tasks = [
        task("/data/upload/1/0a1b2c3d-my%20a.png", annotation("wren"), annotation("robin", cancelled=True)),
        task("/data/local-files/?d=a%2520b.png", annotation("robin"), annotation("robin"), key="foto", title="x"),
        task("http://host:8080/data/local-files/?d=a%20b.png", annotation("wren"), key="img", note="thumb.png"),
        task("shots/c.png", annotation("box", kind="rectanglelabels"), annotation("robin")),
        task("d.png", annotation("robin", cancelled=True)) | {"predictions": [annotation("robin")]},
        task("d.png", annotation()),
    ]
    write(tmp_path / "a.json", tasks)
    found = read(tmp_path, "a.json")
    expected = {"my a.png": "wren", "a%20b.png": "robin", "a b.png": "wren", "shots/c.png": "robin"}
    assert labels(found) == {f"folder/{path}": name for path, name in expected.items()}
    assert "a.json: 2 pictures without a class left out" in found.notes


WRONG_TASKS = {
    "annotations disagree": (
        task("a.png", annotation("x"), annotation("y")),
        "a.json, task 7: .*choices x and y; give",
    ),
    "several choices": (task("a.png", annotation("x", "y")), "task 7: it has the choices x and y; give each photo one"),
    "no picture": (
        task("some text", annotation("x"), key="text"),
        r"task 7: one key of its data \(text\) .* none could",
    ),
    "two pictures": (task("a.png", annotation("x"), key="left", right="b.png"), "a picture, but left and right could"),
    "another shape": (task("a.png", {"id": 1}), "task 7 has an annotation that lacks or misuses 'result'; export"),
    "not there": (
        task("/data/upload/1/0a1b2c3d-z.png", annotation("x")),
        "z.png is not in .*; copy the pictures there",
    ),
}


@pytest.mark.parametrize(("content", "message"), WRONG_TASKS.values(), ids=WRONG_TASKS)
def test_wrong_tasks(tmp_path, content, message):
    write(tmp_path / "a.json", [content])
    with pytest.raises(UserError, match=message):
        read(tmp_path, "a.json")


@pytest.mark.parametrize("kind", ["coco", "label studio"])
def test_corrections(tmp_path, kind):
    """They name photos of the dataset by path or by name, and add others beside the table."""
    pictures(tmp_path, "birds/blue_tit/1 a.png", "birds/blue_tit/2.png", "birds/wren/3.png", "back/new.png")
    right = {"birds/blue_tit/1 a.png": "wren", "3.png": "blue tit", "new.png": "robin", "birds/blue_tit/2.png": None}
    if kind == "coco":
        ids = dict(enumerate(right))
        pairs = [(n, name) for n, name in enumerate(right.values()) if name]
        content = coco(ids, {name: name for name in right.values() if name}, pairs)
        write(tmp_path / "a.json", content)
        pictures(tmp_path, "new.png")
    else:
        paths = ["/data/local-files/?d=" + path.replace(" ", "%20") for path in right]
        paths[1:3] = ["/data/upload/2/0a1b2c3d-3.png", "/data/local-files/?d=back/new.png"]
        content = [
            task(path, annotation(*filter(None, [name]))) for path, name in zip(paths, right.values(), strict=True)
        ]
        write(tmp_path / "a.json", content)
    found = read(tmp_path / "birds", corrections=str(tmp_path / "a.json"))
    assert labels(found) == {
        "folder/blue_tit/1 a.png": "wren",
        "folder/blue_tit/2.png": "blue_tit",
        "folder/wren/3.png": "blue_tit",
        "corrections/new.png" if kind == "coco" else "corrections/back/new.png": "robin",
    }
    assert "a.json: 1 picture without a class left out" in found.notes
    assert "a.json: pictures were found by their names, 1 in wren/" in found.notes


def test_a_correction_of_two_photos_of_one_name(tmp_path):
    pictures(tmp_path, "birds/tit/1.png", "birds/wren/1.png")
    write(tmp_path / "a.json", [task("/data/upload/2/0a1b2c3d-1.png", annotation("tit"))])
    with pytest.raises(UserError, match="'1.png' could be tit/1.png or wren/1.png; give its path"):
        read(tmp_path / "birds", corrections=str(tmp_path / "a.json"))


def test_pictures_to_predict_need_no_labels(tmp_path):
    pictures(tmp_path, "a.png", "deep/b c.png")
    write(tmp_path / "a.json", {"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b c.png"}]})
    assert photos.find(str(tmp_path / "a.json")) == {
        "a.png": tmp_path / "a.png",
        "b c.png": tmp_path / "deep/b c.png",
    }
    address = "/data/local-files/?d=deep/b%20c.png"
    write(tmp_path / "b.json", [task(address, annotation("x"), annotation("y")), task("a.png")])
    found = photos.find(str(tmp_path / "b.json"))
    assert found == {address: tmp_path / "deep/b c.png", "a.png": tmp_path / "a.png"}


TIT = 'tit & "co" \u00e9<'
NAMES = ("wren", TIT, "not seen")
NEW = {"my 1%.png": "wren", "in/a%20b.png": TIT, "in/a b.png": "wren", "in/V\u00f6gel.png": TIT}


@pytest.fixture
def predict(tmp_path, monkeypatch):
    """A function that predicts the pictures in `new` with given answers, and returns what it has written."""

    def run(kind, output, others=()):
        pictures(tmp_path / "new", *NEW, *(each.image for each in others if not each.error))
        known = cards.About("bird_run", "", NAMES, "", "")
        answers = [Answer(name, label, 0.75) for name, label in NEW.items()] + list(others)

        def classify(chosen):
            found = photos.find(str(tmp_path / "new"))
            return answers, found | {each.image: tmp_path / "new" / each.image for each in others}, known

        monkeypatch.setattr(command, "classify", classify)
        (tmp_path / output).parent.mkdir(exist_ok=True)
        asked = ["bird_run", str(tmp_path / "new"), "--format", kind, "--output", str(tmp_path / output)]
        assert command.main(asked) == (1 if any(each.error for each in others) else 0)
        return json.loads((tmp_path / output).read_text(encoding="utf-8"))

    return run


UNANSWERED = [
    Answer("abstained.png", abstained=True, confidence=0.2),
    Answer("word.png", "horse"),
    Answer("none.png", reply="?"),
    Answer("broken.png", error="cut"),
]


def read_back(root, compose, *overrides):
    """What `data.folder=` reads, by paths in `new`."""
    data = validate(compose("data=folder", f"data.folder='{root}'", *overrides)).data
    found = source.load(data)
    assert all(found.images.open(item.image).size == (32, 24) for item in found.train)
    return {item.image.removeprefix("folder/").removeprefix("new/"): item.name for item in found.train}


@pytest.mark.parametrize("output", ["answers.json", "new/answers.json"])
def test_coco_is_written_and_read(tmp_path, predict, compose, output):
    content = predict("coco", output, UNANSWERED)
    assert [each["name"] for each in content["categories"]] == list(NAMES)
    assert [each["id"] for each in content["categories"]] == [1, 2, 3]
    start = "" if "/" in output else "new/"
    first, *_, last = content["images"]
    assert first == {"id": 1, "file_name": f"{start}my 1%.png", "width": 32, "height": 24}
    assert len(content["images"]) == 8 and last == {"id": 8, "file_name": f"{start}broken.png"}
    assert content["annotations"][1] == {"id": 2, "image_id": 2, "category_id": 2, "score": 0.75}
    assert len(content["annotations"]) == 4
    assert read_back(tmp_path / output, compose) == NEW


def annotated(tasks, changes):
    """The tool's export after each prediction was accepted; `changes`: other choices, by number of the task."""
    for number, each in enumerate(tasks):
        for prediction in each["predictions"]:
            result = [{**one, "id": "Xy", "origin": "prediction"} for one in prediction["result"]]
            result = (
                [{**one, "value": {"choices": [changes[number]]}} for one in result] if number in changes else result
            )
            each["annotations"] = [{"id": number, "was_cancelled": False, "ground_truth": False, "result": result}]
        each |= {"id": 100 + number, "meta": {}, "project": 1}
    return tasks


@pytest.mark.parametrize("output", ["answers.json", "new/answers.json"])
def test_label_studio_is_written_and_read(tmp_path, predict, compose, output):
    content = predict("label-studio", output, UNANSWERED)
    prediction = content[1]["predictions"][0]
    assert prediction["model_version"] == "bird_run" and prediction["score"] == 0.75
    result = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": [TIT]}}
    assert prediction["result"] == [result]
    start = "" if "/" in output else "new/"
    assert content[1]["data"] == {"image": f"/data/local-files/?d={start}in/a%2520b.png"}
    assert [len(each["predictions"]) for each in content] == [1] * 4 + [0] * 4
    view = ElementTree.parse((tmp_path / output).with_suffix(".xml")).getroot()
    image, choices = view
    assert (view.tag, image.tag, choices.tag, choices.get("choice")) == ("View", "Image", "Choices", "single")
    assert (image.get("name"), image.get("value")) == (result["to_name"], "$image")
    assert (choices.get("name"), choices.get("toName")) == (result["from_name"], result["to_name"])
    assert [each.get("value") for each in choices] == list(NAMES)
    write(tmp_path / output, annotated(content, {2: TIT}))
    right = NEW | {"in/a b.png": TIT}
    assert read_back(tmp_path / output, compose) == right
    # the same as corrections of a dataset of these pictures, where all are otherwise of one other class
    rows = [f'"{path}",{name}' for path, name in zip(NEW, ["x", "y", "x", "y"], strict=True)]
    (tmp_path / "new/own.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    corrections = f"data.reader.corrections='{tmp_path / output}'"
    assert read_back(tmp_path / "new", compose, corrections) == right


def test_files_of_label_tools_lie_above_their_pictures(tmp_path, capsys):
    pictures(tmp_path, "new/a.png")
    for output, message in (
        ([], "--format coco needs --output <file>.json, beside the pictures or above them"),
        (["--output", str(tmp_path / "a.txt")], "needs --output <file>.json"),
        (["--output", str(tmp_path / "else/a.json")], f"new/a.png is not below {tmp_path}/else, and the file names"),
    ):
        assert command.main([str(tmp_path), str(tmp_path / "new"), "--format", "coco", *output]) == 2
        assert message in capsys.readouterr().err


def test_the_size_is_that_of_the_upright_picture(tmp_path):
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
        assert images.size_of(tmp_path / "a.jpg") == images.decode(tmp_path / "a.jpg").size
