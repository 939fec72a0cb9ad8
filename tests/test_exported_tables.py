"""Tables of photos as tools export them: Hugging Face, Kaggle, Label Studio, camera traps; and what is not read."""

from __future__ import annotations

import json
import re

import pytest

from common.config.composition import validate
from common.data import folder, source
from common.data.listing import Location
from common.predict import photos
from common.types import UserError
from tests import data_tree


def pictures(root, *paths):
    for path in paths:
        data_tree.picture(root / path)


def read(root, path="."):
    return folder.read(Location("folder", root, root / path))


def rows(source, part="train"):
    return [(item.image.removeprefix("folder/"), item.name) for item in getattr(source, part)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else "".join(json.dumps(each) + "\n" for each in content))


TWO = [("a.png", "cat"), ("b.png", "dog")]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_of_imagefolder(tmp_path, name):
    pictures(tmp_path, "a.png", "b.png")
    objects = [{"file_name": "a.png", "label": "cat", "box": [1]}, {"file_name": "b.png", "label": "dog"}]
    write(tmp_path / name, objects if name.endswith("l") else "file_name,label\na.png,cat\nb.png,dog\n")
    found = read(tmp_path)
    assert rows(found) == TWO and found.origin == "own images"
    assert found.notes[0] == f"the photos are those of {name}"
    assert all(found.images.open(item.image).size == (32, 24) for item in found.train)


def test_imagefolder_with_parts(tmp_path):
    for part in ("train", "test", "validation"):
        pictures(tmp_path / part, "a.png", "b.png")
        write(tmp_path / part / "metadata.csv", "file_name,label\na.png,cat\nb.png,dog\n")
    found = read(tmp_path)
    for part, inside in (("train", "train"), ("test", "test"), ("val", "validation")):
        assert rows(found, part) == [(f"{inside}/a.png", "cat"), (f"{inside}/b.png", "dog")]
    assert found.origin == "own split"


def test_one_metadata_file_above_the_parts(tmp_path):
    lines = [f"{part}/{name}.png,{name}" for part in ("train", "test") for name in ("x", "y")]
    pictures(tmp_path, *(line.split(",")[0] for line in lines))
    write(tmp_path / "metadata.csv", "\n".join(("file_name,label", *lines)))
    found = read(tmp_path)
    assert rows(found, "test") == [("test/x.png", "x"), ("test/y.png", "y")] and len(found.train) == 2


def test_imagefolder_goes_before_folders_that_are_no_classes(tmp_path):
    """Folders of stations look like classes; metadata.csv says what the photos are."""
    pictures(tmp_path, "north/a.png", "south/b.png")
    write(tmp_path / "metadata.csv", "file_name,label\nnorth/a.png,cat\nsouth/b.png,dog\n")
    assert read(tmp_path).names == ("cat", "dog")


def test_captions_are_no_labels(tmp_path):
    pictures(tmp_path, "cat/a.png", "dog/b.png")
    write(tmp_path / "metadata.csv", "file_name,text\ncat/a.png,a cat\n")
    assert read(tmp_path).names == ("cat", "dog") and read(tmp_path).notes == ()


def test_two_metadata_files_are_one_too_many(tmp_path):
    for name in ("metadata.csv", "metadata.jsonl"):
        write(tmp_path / name, [{"file_name": "a", "label": "b"}] if name.endswith("l") else "file_name,label\n")
    with pytest.raises(UserError, match="has metadata.csv and metadata.jsonl; remove one"):
        read(tmp_path)


def kaggle(root, ids=("1a", "2b"), where="train", suffix=".jpg"):
    pictures(root, *(f"{where}/{each}{suffix}" for each in ids))
    write(
        root / "train.csv", "image_id,label\n" + "".join(f"{i},{n}\n" for i, n in zip(ids, ("cat", "dog"), strict=True))
    )
    return root


@pytest.mark.parametrize("where", ["train", "train_images", "images", "deep/er"])
def test_kaggle(tmp_path, where):
    """Names without suffixes; the test images have no labels, and the form for answers the same for all."""
    kaggle(tmp_path, where=where)
    pictures(tmp_path, "test/1a.jpg", "test/9z.jpg") if where == "train" else None
    write(tmp_path / "test.csv", "image_id\n1a\n9z\n")
    write(tmp_path / "sample_submission.csv", "image_id,label\n1a,cat\n9z,cat\n")
    found = read(tmp_path)
    assert rows(found) == [(f"{where}/1a.jpg", "cat"), (f"{where}/2b.jpg", "dog")]
    assert found.notes == (
        "the photos are those of train.csv",
        "train.csv: column 'image_id' is the path, column 'label' is the label",
        f"train.csv: pictures were found by their names, 2 in {where}/",
    )


def test_kaggle_with_suffixes_and_given_directly(tmp_path):
    kaggle(tmp_path, ids=("1.b", "2"))
    assert rows(read(tmp_path, "train.csv")) == [("train/1.b.jpg", "cat"), ("train/2.jpg", "dog")]
    write(tmp_path / "train.csv", "image_id,label\n1.b.jpg,cat\n2.jpg,dog\n")
    assert rows(read(tmp_path, "train.csv")) == [("train/1.b.jpg", "cat"), ("train/2.jpg", "dog")]


def test_the_form_for_answers_is_no_table_of_labels(tmp_path):
    pictures(tmp_path, "images/a.png", "images/b.png")
    write(tmp_path / "labels.csv", "id,label\na,cat\nb,dog\n")
    write(tmp_path / "SampleSubmission.csv", "id,label\na,cat\nb,cat\n")
    assert rows(read(tmp_path)) == [("images/a.png", "cat"), ("images/b.png", "dog")]


def test_tables_called_like_parts(tmp_path):
    for part in ("train", "val", "test"):
        pictures(tmp_path, f"images/{part}1.png", f"images/{part}2.png")
        write(tmp_path / f"{part}.csv", f"image,class\nimages/{part}1.png,cat\nimages/{part}2.png,dog\n")
    found = read(tmp_path)
    assert [rows(found, part)[0] for part in ("train", "val", "test")] == [
        (f"images/{part}1.png", "cat") for part in ("train", "val", "test")
    ]


def test_a_name_that_two_pictures_have(tmp_path):
    kaggle(tmp_path, where="images")
    pictures(tmp_path, "more/1a.png")
    with pytest.raises(UserError, match=r"train.csv, row 2: '1a' could be images/1a.jpg or more/1a.png; give its path"):
        read(tmp_path, "train.csv")


def test_ids_of_no_picture(tmp_path):
    write(tmp_path / "train.csv", "id,label\n1,cat\n2,dog\n")
    with pytest.raises(
        UserError, match="there is no picture called 1 in .*, nor one of the 2 others; put the pictures"
    ):
        read(tmp_path, "train.csv")


def test_missing_pictures_stay_what_they_are(tmp_path):
    """`data.skip_bad` may leave them out."""
    pictures(tmp_path, "a.png")
    write(tmp_path / "a.csv", "path,label\na.png,cat\nx/gone.png,dog\n")
    assert rows(read(tmp_path, "a.csv")) == [("a.png", "cat"), ("x/gone.png", "dog")]


def test_camera_traps(tmp_path):
    pictures(tmp_path, "north/1.JPG", "south/1.JPG")
    write(tmp_path / "a.csv", "relative_path,species\nnorth/1.JPG,fox\nsouth/1.JPG,badger\n")
    assert rows(read(tmp_path, "a.csv")) == [("north/1.JPG", "fox"), ("south/1.JPG", "badger")]
    # Timelapse: the file, and its folder in the way of Windows
    write(tmp_path / "b.csv", "File,RelativePath,Folder,Species\n1.JPG,north,x,fox\n1.JPG,.\\south\\,x,badger\n")
    assert rows(read(tmp_path, "b.csv")) == [("north/1.JPG", "fox"), ("south/1.JPG", "badger")]
    write(tmp_path / "c.csv", "File,RelativePath,label\n1.JPG,north/1.JPG,fox\nsouth/1.JPG,south,badger\n")
    assert rows(read(tmp_path, "c.csv")) == [("north/1.JPG", "fox"), ("south/1.JPG", "badger")]


def test_stations_that_look_like_classes_are_said(tmp_path):
    pictures(tmp_path, "north/1.JPG", "south/1.JPG")
    write(tmp_path / "traps.csv", "relative_path,species\nnorth/1.JPG,fox\nsouth/1.JPG,badger\n")
    found = read(tmp_path)
    assert found.names == ("north", "south")
    (note,) = found.notes
    assert note.startswith("warning: traps.csv has labels, too; the folders were read as classes, and data.folder=")


STUDIO = ["/data/upload/3/0a1b2c3d-IMG%201.jpg", "/data/local-files/?d=shots/b.jpg"]


@pytest.mark.parametrize("stored", ["IMG 1.jpg", "0a1b2c3d-IMG 1.jpg", "upload/0a1b2c3d-IMG 1.jpg", "cats/IMG 1.jpg"])
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_label_studio(tmp_path, stored, kind):
    pictures(tmp_path, stored, "shots/b.jpg")
    if kind == "csv":
        text = "annotation_id,choice,id,image\n" + "".join(
            f"1,{n},7,{i}\n" for i, n in zip(STUDIO, ("cat", "dog"), strict=True)
        )
    else:
        text = json.dumps([{"id": 7, "image": i, "choice": n} for i, n in zip(STUDIO, ("cat", "dog"), strict=True)])
    write(tmp_path / f"project.{kind}", text)
    found = read(tmp_path, f"project.{kind}")
    assert rows(found) == [(stored, "cat"), ("shots/b.jpg", "dog")]
    assert found.notes[0] == f"project.{kind}: column 'image' is the path, column 'choice' is the label"


REFUSED = {
    "upload that is not there": (
        "image,choice\n/data/upload/3/0a1b2c3d-x.jpg,cat\n",
        r"row 2: /data/upload/3/0a1b2c3d-x.jpg is an address inside Label Studio, and x.jpg is not in",
    ),
    "several choices": (
        'image,choice\nx.jpg,"{""choices"": [""cat"", ""dog""]}"\n',
        r"row 2: label {\"choices\": \[\"cat\", \"dog\"\]} is not one word; give each photo one class",
    ),
    **{
        f"{start.split(':')[0]} address": (
            f"path,label\n{start}x/a.png,cat\n",
            f"row 2: '{start}x/a.png' is a URL, and URLs are",
        )
        for start in ("https://", "HTTP://", "s3://", "gs://", "file:///", "data:image/png;base64;")
    },
    "hidden in a path": ("path,label\n\u202aa.png,cat\n", r"row 2: path 'a.png' has the invisible character U\+202A"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, content, message):
    pictures(tmp_path, "a.png")
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as refusal:
        read(tmp_path, "a.csv")
    assert "\n" not in str(refusal.value)


def test_an_invisible_character_that_the_file_has_is_its_name(tmp_path):
    pictures(tmp_path, "\u202aa.png", "b.png")
    (tmp_path / "a.csv").write_text("path,label\n\u202aa.png,cat\nb.png,dog\n", encoding="utf-8")
    assert rows(read(tmp_path, "a.csv")) == [("\u202aa.png", "cat"), ("b.png", "dog")]


@pytest.mark.slow
def test_a_folder_that_is_a_url(compose, tmp_path):
    for given in ("https://example.org/photos", "s3://bucket/photos"):
        with pytest.raises(UserError, match=f"data.folder={given} is a URL, and URLs are not read; download"):
            source.find(validate(compose("data=folder", f"data.folder='{given}'")).data)


def test_percent_signs(tmp_path):
    """Decoded only where that exists and what is written does not."""
    pictures(tmp_path, "my cat.png", "V\u00f6gel/b.png", "100%25.png")
    write(tmp_path / "a.csv", "path,label\nmy%20cat.png,cat\nV%C3%B6gel/b.png,bird\n100%25.png,bill\n")
    assert rows(read(tmp_path, "a.csv")) == [
        ("my cat.png", "cat"),
        ("V\u00f6gel/b.png", "bird"),
        ("100%25.png", "bill"),
    ]


OTHERS = {
    "COCO": ("coco.json", "{}", "coco.json is there: data.folder=.*coco.json reads a list of objects"),
    "parquet": ("data.parquet", "PAR1", "data.parquet is there, but such files are not read: save a CSV file"),
    "spreadsheet": ("list.xlsx", "PK", "list.xlsx is there, but such files are not read: save a CSV file"),
    "no labels": (
        "all.csv",
        "name,kind\n",
        "all.csv is there, but has no column 'path'; has no column 'label': name its",
    ),
    "two columns": ("all.csv", "path,label,class\n", "all.csv is there, but has 2 columns that could be the label"),
    "no objects": (
        "metadata.jsonl",
        "[1]\n",
        "metadata.jsonl is there, but cannot be read .its first line is no object",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), OTHERS.values(), ids=OTHERS)
def test_a_file_that_is_there_is_named(tmp_path, name, content, message):
    pictures(tmp_path, "a.png", "b.png")
    write(tmp_path / name, content)
    with pytest.raises(UserError, match=f"it needs one folder per class.*{message}") as refusal:
        read(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["data.parquet", "List.XLSX"])
def test_a_file_of_another_kind_that_is_given(tmp_path, name):
    write(tmp_path / name, "PAR1")
    with pytest.raises(
        UserError, match=f"{name} is a file of a kind that is not read; save a CSV file with path,label"
    ):
        read(tmp_path, name)


def test_a_stray_photo_among_class_folders_reads_no_table_unasked(tmp_path):
    pictures(tmp_path, "cat/1.png", "dog/1.png", "stray.png")
    write(tmp_path / "labels.csv", "path,label\ncat/1.png,cat\n")
    path = re.escape(str(tmp_path / "labels.csv"))
    with pytest.raises(UserError, match=f"stray.png is in no class folder.*{path} is there: data.folder={path} reads"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        (
            '{"a": []}',
            "is no list of objects with a path and a label each, no COCO file .* and no export of Label Studio",
        ),
        ("[1]", "is no list of objects"),
        ("[]", "has no column 'path'; its header is ''"),
        ('[{"image": "a.png", "choice": ["cat", "dog"]}]', 'label ."cat", "dog". is not one word'),
        ('[{"image": "a\\ud800.png", "choice": "cat"}]', "object 1 has half a letter"),
        ('[{"image": "a.png", "choice": null}]', "object 1: label is empty"),
    ],
)
def test_json_that_is_no_table(tmp_path, content, message):
    write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=message):
        read(tmp_path, "a.json")


def test_lists_of_pictures_to_predict(tmp_path):
    """They are read as tables with labels are: names of columns, suffixes, percent signs, JSON."""
    pictures(tmp_path, "my cat.png", "in/2.png")
    write(tmp_path / "a.csv", "id;file_name\n1;my%20cat.png\n\n2;in/2.png\n")
    assert photos.find(str(tmp_path / "a.csv")) == {
        "my%20cat.png": tmp_path / "my cat.png",
        "in/2.png": tmp_path / "in/2.png",
    }
    write(tmp_path / "b.jsonl", [{"image": "in/2.png"}])
    assert photos.find(str(tmp_path / "b.jsonl")) == {"in/2.png": tmp_path / "in/2.png"}
    write(tmp_path / "c.csv", "image_id\n2\n")
    assert photos.find(str(tmp_path / "c.csv")) == {"2": tmp_path / "in/2.png"}
    write(tmp_path / "d.csv", "path\nhttps://x.org/a.png\n")
    with pytest.raises(UserError, match="^.*d.csv, row 2: 'https://x.org/a.png' is a URL"):
        photos.find(str(tmp_path / "d.csv"))


def test_pictures_to_predict(tmp_path):
    pictures(tmp_path, "my cat.png")
    assert photos.find(str(tmp_path / "my%20cat.png")) == {str(tmp_path / "my%20cat.png"): tmp_path / "my cat.png"}
    with pytest.raises(UserError, match="https://x.org/a.png is a URL, and URLs are not read"):
        photos.find("https://x.org/a.png")
    with pytest.raises(UserError, match=r"a.png: no picture is there \(it has the invisible character U\+202A"):
        photos.find("\u202aa.png")
