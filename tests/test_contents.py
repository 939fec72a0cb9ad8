"""Hashes of files: each is read once, and again whenever it may have changed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from common.data import contents
from common.data.contents import FILE, Contents


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A file that has been as it is for longer than a file system's clock takes for a step."""
    monkeypatch.setattr(contents, "SETTLED", 0)
    (tmp_path / "a.bmp").write_bytes(b"first")
    return tmp_path / "a.bmp"


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read."""
    names, sha256 = [], contents._sha256
    monkeypatch.setattr(contents, "_sha256", lambda path: names.append(path.name) or sha256(path))
    return names


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_by_all_processes(path, tmp_path, read):
    for book in (first := Contents(tmp_path), first, Contents(tmp_path)):
        assert book.of(path) == sha256(b"first")
    assert read == ["a.bmp"]
    assert Contents().of(path) == sha256(b"first") and read == ["a.bmp"] * 2, "nothing is kept without a folder"


def overwrite(path, content):
    path.write_bytes(content)


def replace(path, content):
    path.with_name("new").write_bytes(content)
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("change", [overwrite, replace])
def test_the_same_size_and_time_say_nothing(path, tmp_path, change):
    book, before = Contents(tmp_path), path.stat()
    book.of(path)
    time.sleep(0.02)  # longer than a step of the file system's clock
    change(path, b"other")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert book.of(path) == Contents(tmp_path).of(path) == sha256(b"other")


def test_what_has_just_changed_is_not_kept(path, tmp_path, monkeypatch, read):
    """Its clock may be too coarse to tell the next change from the last."""
    monkeypatch.setattr(contents, "SETTLED", 10**18)
    book = Contents(tmp_path)
    assert book.of(path) == book.of(path) == sha256(b"first")
    assert read == ["a.bmp"] * 2 and not (tmp_path / FILE).exists()


def test_a_torn_line_costs_one_reading(path, tmp_path, read):
    Contents(tmp_path).of(path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-5] + b"\xff")
    assert Contents(tmp_path).of(path) == sha256(b"first") and read == ["a.bmp"] * 2
    assert Contents(tmp_path).of(path) == sha256(b"first") and read == ["a.bmp"] * 2


def test_a_folder_that_cannot_be_written_ends_nothing(path, tmp_path, caplog):
    (tmp_path / FILE).mkdir()
    book = Contents(tmp_path)
    for _ in range(2):
        assert book.of(path) == sha256(b"first")
    (tmp_path / "b.bmp").write_bytes(b"more")
    assert book.of(tmp_path / "b.bmp") == sha256(b"more")
    assert [record.getMessage() for record in caplog.records] == [
        f"hashes of pictures are not kept in {tmp_path / FILE} (Is a directory)"
    ]


def test_hashes_that_cannot_be_read_end_nothing(path, tmp_path, caplog, monkeypatch):
    def refuse(self, *arguments, **options):
        if self.name == FILE:
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    Contents(tmp_path).of(path)
    opened = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    assert Contents(tmp_path).of(path) == sha256(b"first")
    assert "Permission denied" in caplog.text and "are not kept in" in caplog.text


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        Contents().of(tmp_path / "nothing")
