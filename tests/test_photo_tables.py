"""CSV files of photos as spreadsheets, pandas and people write them."""

from __future__ import annotations

import unicodedata

import pytest

from common.data import folder
from common.data.listing import Location
from common.types import UserError
from tests import data_tree

NFC, NFD = "V\u00f6gel", "Vo\u0308gel"


def read(root, path="a.csv"):
    return folder.read(Location("folder", root, root / path))


def written(root, content, encoding="utf-8"):
    (root / "a.csv").write_bytes(content.encode(encoding) if isinstance(content, str) else content)
    return root


def rows(source):
    return [(item.image.removeprefix("folder/"), item.name) for item in source.train]


TWO = [("a.png", "cat"), ("b.png", "dog")]
FORMS = {
    "commas": "path,label\na.png,cat\nb.png,dog\n",
    "semicolons": "path;label\na.png;cat\nb.png;dog\n",
    "tabs": "path\tlabel\na.png\tcat\nb.png\tdog\n",
    "capitals": "Path,LABEL\na.png,cat\nb.png,dog\n",
    "blanks around": " path , label \n a.png , cat \n b.png , dog \n",
    "quoted": '"path";"label"\n"a.png";"cat"\n"b.png";"dog"\n',
    "quoted after a blank": '"path", "label"\n"a.png", "cat"\n"b.png", "dog"\n',
    "byte order mark": "\ufeffpath,label\na.png,cat\nb.png,dog\n",
    "byte order mark and quotes": '\ufeff"path","label"\na.png,cat\nb.png,dog\n',
    "Windows lines": "path,label\r\na.png,cat\r\nb.png,dog\r\n",
    "old Macintosh lines": "path,label\ra.png,cat\rb.png,dog\r",
    "no last line end": "path,label\na.png,cat\nb.png,dog",
    "blank lines": "\n\npath,label\n\na.png,cat\n   \n\nb.png,dog\n\n",
    "rows of separators": "path,label\n,,\na.png,cat\nb.png,dog\n,\n",
    "separator at every end": "path,label,\na.png,cat,\nb.png,dog,\n",
    "separator at the rows' end": "path,label\na.png,cat,,\nb.png,dog,\n",
    "separator at the header's end": "path,label,\na.png,cat\nb.png,dog\n",
    "index of pandas": ",path,label\n0,a.png,cat\n1,b.png,dog\n",
    "more columns": "id;label;path;note, with commas\n1;cat;a.png;x,y\n2;dog;b.png;\n",
    "a header with commas": "path;label;one,two,three,four,five\na.png;cat;x\nb.png;dog;\n",
    "Windows paths": "path,label\n.\\a.png,cat\nb.png,dog\n",
    **{
        f"path is {name}": f"{name},label\na.png,cat\nb.png,dog\n"
        for name in ("file_name", "filename", "image", "File")
    },
    **{f"path is {name}": f"{name},label\na.png,cat\nb.png,dog\n" for name in ("filepath", "image_path", "File Name")},
    **{f"label is {name}": f"path,{name}\na.png,cat\nb.png,dog\n" for name in ("class", "Category", "class_name")},
    "Kaggle's birds": "class id,filepaths,labels,data set\n0,a.png,cat,train\n1,b.png,dog,train\n",
}


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_forms(tmp_path, content):
    assert rows(read(written(tmp_path, content))) == TWO


def test_quoted_cells_keep_what_they_hold(tmp_path):
    found = read(written(tmp_path, 'path,label\n"a, b.png","five "" nails"\n"c.png",5" nail\n'))
    assert rows(found) == [("a, b.png", 'five " nails'), ("c.png", '5" nail')]


def test_a_separator_in_the_cells_does_not_decide(tmp_path):
    content = "path;label;note\na.png;cat;one, two, three, four\nb.png;dog;\n"
    assert rows(read(written(tmp_path, content))) == TWO


def test_other_columns_are_said(tmp_path):
    assert read(written(tmp_path, FORMS["path is File Name"])).notes == (
        "a.csv: column 'File Name' is the path, column 'label' is the label",
    )
    assert read(written(tmp_path, FORMS["commas"])).notes == ()


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "VALID", "TEST"),
        ("training", "validation", "testing"),
        ("TRAIN", "dev", "eval"),
    ],
)
def test_names_of_splits(tmp_path, train, val, test):
    names = {"train": train, "val": val, "test": test}
    lines = [f"{part}{label}.png,{label},{names[part]}" for part in names for label in ("x", "y")]
    found = read(written(tmp_path, "\n".join(("path,label,Split", *lines))))
    for part in names:
        assert [item.image for item in getattr(found, part)] == [f"folder/{part}x.png", f"folder/{part}y.png"]


REFUSED = {
    "two paths": ("image,path,label\n", "columns 'image' and 'path', and each could be the path; rename or remove one"),
    "two labels": ("path,Class,label\n", "columns 'Class' and 'label', and each could be the label"),
    "one name twice": ("path,label,Path\n", "columns 'path' and 'Path'"),
    "two splits": ("path,label,split,SPLIT\n", "columns 'split' and 'SPLIT'"),
    "semicolons without label": ("path;kind\na;b\n", "no column 'label'; its header is 'path, kind', but path,label"),
    "nothing": ("\n\n", "no column 'path'; its header is '', but path,label"),
    "too few cells": ("path,label,split\na.png,cat\n", "row 2 has 2 cells, but the header has 3"),
    "too many cells": ("path,label\n\na.png,cat,x\n", "row 3 has 3 cells, but the header has 2"),
    "a split that is none": ("path,label,split\na,b,train\nc,d,\n", "row 3: split '' is not one of train, val, test"),
    "NUL in a path": ("path,label\na\0.png,cat\n", "row 2: path has the character NUL"),
    "NUL in a label": ("path,label\na.png,c\0t\n", "row 2: label has the character NUL"),
    "a quote without end": ('path,label\na.png,"cat\nb.png,dog\n', "is not a CSV file"),
    "a cell without end": ("path,label\n" + "x" * 200_000 + ",cat\n", "is not a CSV file"),
    "outside": ("path,label\n../a.png,cat\n", r"row 2: ../a.png is outside"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as refusal:
        read(written(tmp_path, content))
    assert "\n" not in str(refusal.value)


def test_a_name_that_begins_with_dots_is_inside(tmp_path):
    assert rows(read(written(tmp_path, "path,label\n..a.png,cat\n..b/c.png,dog\n"))) == [
        ("..a.png", "cat"),
        ("..b/c.png", "dog"),
    ]


@pytest.mark.parametrize(
    ("encoding", "advice"),
    [
        ("utf-16", "iconv -f utf-16 -t utf-8"),
        ("utf-16-le", "iconv -f utf-16le -t utf-8"),
        ("utf-16-be", "iconv -f utf-16be -t utf-8"),
        ("utf-32", "iconv -f utf-32 -t utf-8"),
        ("windows-1252", "written on Windows, convert it with `iconv -f windows-1252 -t utf-8"),
    ],
)
def test_other_encodings_name_the_command(tmp_path, encoding, advice):
    with pytest.raises(UserError, match=f"a.csv is not a text file in UTF-8.*{advice}"):
        read(written(tmp_path, f"path,label\na.png,{NFC}\nb.png,cat\n", encoding))


def test_a_spreadsheet_is_no_table(tmp_path):
    with pytest.raises(UserError, match="spreadsheet; unpack it, or save the table as CSV"):
        read(written(tmp_path, b"PK\x03\x04\x14\x00\x06\x00\x08\x00\xff"))


@pytest.mark.parametrize("stored", [NFC, NFD], ids=["stored as NFC", "stored as NFD"])
def test_tables_and_disks_may_spell_accents_differently(tmp_path, stored):
    for name in (f"{stored}1.jpg", f"{stored}2.jpg", "x.jpg"):
        data_tree.picture(tmp_path / "photos" / name)
    content = f"path,label\nphotos/{NFC}1.jpg,{NFC}\nphotos/{NFD}2.jpg,{NFD}\nphotos/x.jpg,cat\n"
    (tmp_path / f"{stored}.csv").write_text(content, encoding="utf-8")
    found = read(tmp_path, f"{NFC}.csv")
    assert found.names == (NFC, "cat")
    assert rows(found)[:2] == [(f"photos/{NFC}1.jpg", NFC), (f"photos/{NFC}2.jpg", NFC)]
    assert all(found.images.open(item.image).size == (32, 24) for item in found.train)


def test_one_photo_in_two_forms_is_one_row_too_many(tmp_path):
    assert unicodedata.normalize("NFC", NFD) == NFC != NFD
    with pytest.raises(UserError, match=f"row 3: {NFC}.jpg has a row already"):
        read(written(tmp_path, f"path,label\n{NFC}.jpg,a\n{NFD}.jpg,b\n"))
