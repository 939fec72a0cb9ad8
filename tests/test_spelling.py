"""Names of files with accents: one letter or two, whatever the disk, the CSV file and the locale make of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata

import pytest

from common.data import folder, split_file
from common.data.listing import Location, on_disk, spellings
from common.data.names import display
from common.types import BadImage, UserError
from tests import data_tree
from tests.conftest import REPOSITORY

NFC, NFD = "V\u00f6gel", "Vo\u0308gel"
MIXED = "\u00e9te\u0301"  # the first accent composed, the second not
assert unicodedata.normalize("NFC", NFD) == NFC != NFD


def read(root, path=""):
    return folder.read(Location("folder", root, root / path))


def opened(source):
    return [source.images.open(item.image).size for item in (*source.train, *source.val, *source.test)]


@pytest.mark.parametrize("name", [NFC, NFD], ids=["NFC", "NFD"])
def test_folders_in_either_form_have_the_same_keys(tmp_path, name):
    for path in (f"{name}/{name}.jpg", "cat/1.jpg"):
        data_tree.picture(tmp_path / path)
    found = read(tmp_path)
    assert found.names == (NFC, "cat")
    assert [item.image for item in found.train] == [f"folder/{NFC}/{NFC}.jpg", "folder/cat/1.jpg"]
    assert opened(found) == [(32, 24)] * 2
    (file,) = tmp_path.glob("V*/*.jpg")
    assert found.images.content(found.train[0].image) == file.read_bytes() and found.images.stamp(found.train[0].image)


def test_a_class_may_have_a_folder_in_each_form(tmp_path):
    for path in (f"{NFC}/1.jpg", f"{NFD}/2.jpg", f"{NFC}/deep/3.jpg", f"{NFD}/deep/4.jpg", "cat/1.jpg"):
        data_tree.picture(tmp_path / path)
    found = read(tmp_path)
    assert found.names == (NFC, "cat") and opened(found) == [(32, 24)] * 5
    assert [item.image for item in found.train[:2]] == [f"folder/{NFC}/1.jpg", f"folder/{NFC}/2.jpg"]


def test_parts_in_different_forms_have_the_same_classes(tmp_path):
    for path in (f"train/{NFC}/1.jpg", f"test/{NFD}/1.jpg", "train/cat/1.jpg", "test/cat/1.jpg"):
        data_tree.picture(tmp_path / path)
    found = read(tmp_path)
    assert {item.name for item in found.train} == {item.name for item in found.test} == {NFC, "cat"}
    assert opened(found) == [(32, 24)] * 4


def test_two_files_of_one_name_are_refused(tmp_path):
    for path in (f"{NFC}/1.jpg", f"{NFD}/1.jpg", "cat/1.jpg"):
        data_tree.picture(tmp_path / path)
    with pytest.raises(UserError, match=f"{NFC}/1.jpg is two files, whose names differ in how accents are stored"):
        read(tmp_path)


def test_split_files_and_disks_may_differ(tmp_path):
    for number in (1, 2, 3):
        data_tree.picture(tmp_path / "images" / NFD / f"{number}.jpg")
    rows = [[f"{name}/{number}.jpg", 0, name] for number, name in enumerate((NFC, NFD, NFC), start=1)]
    content = {part: [row] for part, row in zip(("train", "val", "test"), rows, strict=True)}
    (tmp_path / "split.json").write_text(json.dumps(content))
    found = split_file.read(Location("d", tmp_path, tmp_path), split="split.json", images="images")
    assert opened(found) == [(32, 24)] * 3
    items = (*found.train, *found.val, *found.test)
    assert [item.image for item in items] == [f"d/images/{NFC}/{number}.jpg" for number in (1, 2, 3)]
    assert {display(item.name) for item in items} == {NFC}


def test_names_that_are_half_composed_are_found(tmp_path):
    data_tree.picture(tmp_path / MIXED / f"{MIXED}.jpg")
    composed = unicodedata.normalize("NFC", MIXED)
    assert composed != MIXED != unicodedata.normalize("NFD", MIXED)
    wanted = tmp_path / composed / f"{composed}.jpg"
    assert on_disk(wanted) == tmp_path / MIXED / f"{MIXED}.jpg" and spellings(wanted) == [on_disk(wanted)]


def test_paths_that_do_not_exist_stay_as_they_are(tmp_path):
    missing = tmp_path / NFC / "a.jpg"
    assert on_disk(missing) == missing and spellings(missing) == []


@pytest.mark.parametrize("key", ["folder/a\0b.jpg", "folder/a\ud800b.jpg"], ids=["NUL", "half a letter"])
def test_names_that_no_disk_has_are_bad_images(tmp_path, key):
    data_tree.picture(tmp_path / "a/1.jpg")
    data_tree.picture(tmp_path / "b/1.jpg")
    images = read(tmp_path).images
    with pytest.raises(BadImage):
        images.stamp(key)


READ = r"""
import json, os, sys
from pathlib import Path
from common.data import folder
from common.data.source import Location
from common.data.listing import on_disk
assert sys.getfilesystemencoding() == "ascii" and "\udcc3" in sys.argv[1]
root = Path(sys.argv[1])
assert os.fsencode(on_disk(root / "\u00f6.jpg")).endswith(b"/\xc3\xb6.jpg")  # though there is none
for location in (Location("folder", root, root / "photos"), Location("folder", root, root / "mine.csv")):
    found = folder.read(location)
    sizes = [found.images.open(item.image).size for item in found.train]
    assert all(found.images.stamp(item.image) for item in found.train)
    print(json.dumps([found.names, [item.image for item in found.train], sizes, found.fingerprint]))
"""


def test_a_locale_without_utf8_reads_the_same(tmp_path):
    """What this process reads, and one under the C locale, which sees every accent as two bytes."""
    root = tmp_path / "stra\u00dfe"
    for path in (f"{NFC}/{NFC}.jpg", f"{NFD}/2.jpg", "cat/1.jpg"):
        data_tree.picture(root / "photos" / path)
    paths = (f"photos/{NFD}/{NFC}.jpg,{NFD}", f"{root}/photos/{NFC}/2.jpg,{NFC}", "photos/cat/1.jpg,cat")
    (root / "mine.csv").write_text("\n".join(("path,label", *paths)), encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", READ, os.fsencode(root)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, env=os.environ | plain)
    assert done.returncode == 0, done.stderr.decode()
    for line, path in zip(done.stdout.splitlines(), ("photos", "mine.csv"), strict=True):
        here = read(root, path)
        keys = [item.image for item in here.train]
        assert json.loads(line) == [list(here.names), keys, [[32, 24]] * 3, here.fingerprint]
        assert len(keys) == 3 and here.names == (NFC, "cat")


@pytest.mark.slow
def test_a_command_speaks_utf8_under_every_locale(tmp_path):
    command = [sys.executable, "run.py", "data=folder", f"data.folder={tmp_path}/{NFC}"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [os.fsencode(word) for word in command], cwd=REPOSITORY, capture_output=True, env=os.environ | plain
    )
    said = done.stderr.decode("utf-8")
    doing = "composing the configuration", ": reading folder"  # what is said while somebody waits
    (line,) = (line for line in said.splitlines() if not line.endswith(doing))
    assert done.returncode == 1 and f"{tmp_path}/{NFC}" in line
