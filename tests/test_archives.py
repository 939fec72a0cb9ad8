"""Zip files of photos: unpacked once into the cache, never outside it, as data and to predict."""

from __future__ import annotations

import hashlib
import shutil
import stat
import zipfile
from io import BytesIO
from types import SimpleNamespace

import pytest
from PIL import Image

from common.config.composition import validate
from common.data import archive, folder, source, task
from common.data.contents import Contents
from common.data.listing import Location
from common.predict import photos
from common.types import UserError

TREE = ("cat/1.png", "cat/V\u00f6gel.png", "dog/1.png", "dog/deep/2.png")


def picture(color="red"):
    content = BytesIO()
    Image.new("RGB", (4, 4), color).save(content, "PNG")
    return content.getvalue()


def pack(path, members):
    """Write a zip file; a member's content: a picture if it is none."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in dict(members).items():
            file.writestr(name, picture() if content is None else content)
    return path


def unpack(path, cache):
    return archive.unpacked(Location("folder", path.parent, path, contents=Contents(cache)), path)


def files(root):
    return sorted(each.relative_to(root).as_posix() for each in root.rglob("*") if each.is_file())


def read(path, cache, **given):
    return folder.read(Location("folder", path.parent, path, contents=Contents(cache)), **given)


@pytest.mark.parametrize("top", ["", "birds/", "./all/birds/"])
def test_photos_in_a_zip_file(tmp_path, top):
    """The top folder is stepped into, and litter and other files are counted as in a folder."""
    rest = {"__MACOSX/._1.png": b"x", "__MACOSX/._2.png": b"x", ".git/a.png": b"x", "readme.txt": b"x", "cat/": b""}
    path = pack(tmp_path / "a.zip", dict.fromkeys(top + name for name in TREE) | {top + n: c for n, c in rest.items()})
    found = read(path, tmp_path / "cache")
    assert [item.image for item in found.train] == [f"folder/{name}" for name in TREE]
    assert found.names == ("cat", "dog") and found.images.open("folder/cat/V\u00f6gel.png").size == (4, 4)
    assert found.passed_over == {"hidden": 1, "litter": 1, "unknown suffix": 1}
    (target,) = (tmp_path / "cache/unpacked").iterdir()
    assert target.name == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read(path, tmp_path / "cache").passed_over == found.passed_over, "also where it is unpacked already"


def test_a_table_in_a_zip_file(tmp_path):
    path = pack(tmp_path / "a.ZIP", {"p/1.png": None, "p/2.png": None, "a.csv": "path,label\np/1.png,x\np/2.png,y\n"})
    assert read(path, tmp_path).names == read(path, tmp_path, csv="a.csv").names == ("x", "y")


def test_a_run_reads_a_zip_file_in_its_cache_folder(tmp_path, compose):
    path = pack(tmp_path / "a.zip", dict.fromkeys(TREE))
    asked = ("data=folder", f"data.folder={path}", "shots=1", f"cache_dir={tmp_path / 'cache'}")
    zipped = task.build(validate(compose(*asked)))
    plain = unpack(path, tmp_path / "cache")
    assert plain.parent == tmp_path / "cache/unpacked"
    shutil.copytree(plain, tmp_path / "plain")
    assert (
        zipped.manifest
        == task.build(validate(compose(*asked[:1], f"data.folder={tmp_path}/plain", "shots=1"))).manifest
    )


def test_it_is_unpacked_once(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.zip", dict.fromkeys(TREE))
    first = unpack(path, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_extract", None)
        assert unpack(path, tmp_path / "cache") == first
    pack(path, dict.fromkeys(TREE[1:]))
    second = unpack(path, tmp_path / "cache")
    assert second != first and files(second) == sorted(TREE[1:])


def test_an_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.zip", dict.fromkeys(TREE))
    copy, count = shutil.copyfileobj, []

    def stop(*files):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(copy(*files))

    with monkeypatch.context() as patch:
        patch.setattr(archive.shutil, "copyfileobj", stop)
        with pytest.raises(KeyboardInterrupt):
            unpack(path, tmp_path / "cache")
    assert list((tmp_path / "cache/unpacked").iterdir()) == []
    assert files(unpack(path, tmp_path / "cache")) == sorted(TREE)


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


REFUSED = {
    **dict.fromkeys(("../x.png", "cat/../../x.png", "/x.png", "..\\x.png", "\\x.png", "C:\\x.png"), "leads out of the"),
    "link.png": "link.png is a link; make the archive anew",
    "folder": "folder is a link",
}


@pytest.mark.parametrize(("name", "message"), REFUSED.items())
def test_nothing_is_written_outside(tmp_path, name, message):
    members = [(name if "out" in message else link(name), b"../../../target")]
    path = tmp_path / "in" / "a.zip"
    path.parent.mkdir()
    pack(path, dict.fromkeys(TREE) | dict(members))
    with pytest.raises(UserError, match=f"a.zip: .*{message}"):
        unpack(path, tmp_path / "in/cache")
    assert set(files(tmp_path)) <= {"in/a.zip", "in/cache/contents.txt"}


def test_backslashes_are_folders(tmp_path):
    path = pack(tmp_path / "a.zip", {"cat\\1.png": None, "dog\\1.png": None})
    assert files(unpack(path, tmp_path)) == ["cat/1.png", "dog/1.png"]


def spoilt(path, kind):
    pack(path, dict.fromkeys(TREE))
    content = bytearray(path.read_bytes())
    if kind == "encrypted":
        entry = content.index(b"PK\x01\x02")
        content[entry + 8] |= 1
    elif kind == "damaged":
        content[content.index(b"cat/1.png") + 20] ^= 0xFF
    else:
        del content[len(content) // 2 :]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("encrypted", "a.zip is encrypted; unpack it with its password, and give its folder"),
        ("damaged", "a.zip is broken .*; get it anew, or unpack it, and give its folder"),
        ("cut", "a.zip is broken .File is not a zip file"),
    ],
)
def test_what_cannot_be_unpacked_is_one_line(tmp_path, kind, message):
    spoilt(tmp_path / "a.zip", kind)
    with pytest.raises(UserError, match=message) as refusal:
        unpack(tmp_path / "a.zip", tmp_path / "cache")
    assert "\n" not in str(refusal.value) and not files(tmp_path / "cache/unpacked")


def test_sizes(tmp_path, monkeypatch):
    """More than the size that is always accepted and more than so many times the archive; or more than is free."""
    path = pack(tmp_path / "a.zip", {"cat/1.png": bytes(300_000), "dog/1.png": bytes(100_000)})
    monkeypatch.setattr(archive, "ALWAYS", 400_000)
    unpack(path, tmp_path / "one")
    monkeypatch.setattr(archive, "ALWAYS", 399_999)
    assert 100 * path.stat().st_size < 400_000
    with pytest.raises(UserError, match="would unpack to 0.0 GB; up to 0 GB and up to 100 times its own size are"):
        unpack(path, tmp_path / "two")
    monkeypatch.setattr(archive, "RATIO", 1000)
    unpack(path, tmp_path / "three")
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda path: SimpleNamespace(free=399_999))
    with pytest.raises(UserError, match="has 0.0 GB left; free some, or set FEWSHOT_CACHE or cache_dir"):
        unpack(path, tmp_path / "four")


def test_other_archives_and_empty_ones(tmp_path):
    for name in ("a.tar", "a.tar.gz", "a.7z", "a.RAR"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(
            UserError, match=f"{name} is an archive of a kind that is not read; unpack it, and give its"
        ):
            read(tmp_path / name, tmp_path)
        with pytest.raises(UserError, match=f"^{tmp_path}/{name} is an archive of a kind that is not read"):
            photos.find(str(tmp_path / name))
    with pytest.raises(UserError, match="a.zip holds no picture .* and no table"):
        unpack(pack(tmp_path / "a.zip", {"a.txt": b"x"}), tmp_path)
    with pytest.raises(UserError, match="a.zip holds cat/1.png twice; make the archive anew"):
        unpack(pack(tmp_path / "a.zip", {"cat/1.png": None, "cat//1.png": None}), tmp_path)
    (tmp_path / "photos.zip/cat").mkdir(parents=True)
    assert unpack(tmp_path / "photos.zip", tmp_path) == tmp_path / "photos.zip", "a folder is a folder"


def test_zip_files_to_predict(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSHOT_CACHE", str(tmp_path / "kept"))
    path = pack(tmp_path / "new.zip", {"new/b.png": None, "new/in/a.png": None, "__MACOSX/new/._a.png": b"x"})
    found = photos.find(str(path))
    assert list(found) == ["b.png", "in/a.png"] and found["b.png"].read_bytes() == picture()
    assert found["b.png"].is_relative_to(tmp_path / "kept/unpacked")
    with pytest.raises(UserError, match="https://x.org/a.zip is a URL, and URLs are not read; download"):
        photos.find("https://x.org/a.zip")


def test_other_datasets_are_no_zip_files(tmp_path, compose):
    path = pack(tmp_path / "a.zip", dict.fromkeys(TREE))
    with pytest.raises(UserError, match="a.zip/.* does not exist"):
        source.load(validate(compose("data=dtd", f"data.folder={path}")).data)
    with pytest.raises(UserError, match="data.folder=https://x.org/a.zip is a URL, and URLs are not read; download"):
        source.find(validate(compose("data=folder", "data.folder='https://x.org/a.zip'")).data)
