"""The embedded slice of Fashion-MNIST, other IDX files, and validation images that are held out."""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.config.composition import validate
from common.data import idx, task
from common.data.listing import Location
from common.data.sampling import Sampling, draw
from common.types import Item, Source, UserError

NAMES = ("a", "b")
WHOLE = Path("/usr/share/datasets/fashion-mnist")


def write(folder, part, pictures, labels, magic=(0, 0, 8)):
    for kind, array in (("images-idx3", pictures), ("labels-idx1", labels)):
        head = bytes([*magic, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def folder(tmp_path):
    pictures = np.arange(6 * 3 * 5, dtype=np.uint8).reshape(6, 3, 5)
    write(tmp_path, "train", pictures, np.array([0, 1, 0, 1, 0, 1], np.uint8))
    write(tmp_path, "t10k", pictures[:2] + 100, np.array([1, 0], np.uint8))
    return tmp_path


def test_pictures_and_labels_come_as_they_were_written(folder):
    source = idx.read(Location("x", folder, folder / "."), NAMES, val_per_class=1)
    assert [(i.image, i.name) for i in source.train] == [(f"x/train/{n}", NAMES[n % 2]) for n in range(4)]
    assert [i.image for i in source.val] == ["x/train/4", "x/train/5"] and [i.name for i in source.test] == ["b", "a"]
    picture = np.asarray(source.images.open("x/test/1"))
    assert picture.shape == (3, 5, 3) and (picture[..., 1].ravel() == np.arange(15, 30) + 100).all()
    assert source.images.stamp("x/train/0") != source.images.stamp("x/train/1")
    assert source.images.content("x/train/1", 2, 3) == bytes([17, 18, 19]) and source.images.size("x/train/1") == 15


def test_damaged_files_are_named(folder):
    where = Location("x", folder, folder / ".")
    with pytest.raises(UserError, match="label 1 in train, but data.reader.names has 1 name;"):
        idx.read(where, ("a",))
    whole = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    for content in (whole[:-1], b"\0\0\r" + whole[3:], whole[:6]):
        (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz (is no IDX|cannot be read)"):
            idx.read(where, NAMES)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read"):
        idx.read(where, NAMES)
    (folder / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz does not exist"):
        idx.read(where, NAMES)
    (folder / "train-images-idx3-ubyte").write_bytes(whole)
    assert len(idx.read(where, NAMES).train) == 6, "plain files are read, too"


def test_the_slice_is_balanced_and_small(compose):
    asked = task.build(validate(compose("data=fashion", "method=nearest_mean"))).task
    counts = [Counter(i.label for i in part.items) for part in (asked.train, asked.evaluation["val"])]
    assert counts[0] == dict.fromkeys(range(10), 16) and counts[1] == dict.fromkeys(range(10), 4)
    assert Counter(i.label for i in asked.evaluation["test"].items) == dict.fromkeys(range(10), 200)
    assert sum(path.stat().st_size for path in idx.EMBEDDED.iterdir()) < 1.5e6


@pytest.mark.skipif(not WHOLE.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_slice_begins_as_the_whole(compose):
    whole = idx.read(Location("x", WHOLE, WHOLE / "."), [str(n) for n in range(10)])
    part = idx.read(Location("x", idx.EMBEDDED, idx.EMBEDDED / "."), [str(n) for n in range(10)])
    assert (len(whole.train), len(whole.test)) == (60_000, 10_000)
    there = {label: [i.image for i in whole.test if i.label == label][:200] for label in range(10)}
    for label in range(10):
        ours = [part.images.stamp(i.image) for i in part.test if i.label == label]
        assert ours == [whole.images.stamp(image) for image in there[label]]


def pool(count, test=0, val=0):
    def items(part, many):
        return tuple(Item(f"{part}{label}-{n}", label, NAMES[label]) for label in (0, 1) for n in range(many))

    return Source(NAMES, items("train", count), items("val", val), items("test", test), None, "", "")


@pytest.mark.parametrize("test", [0, 3])
def test_held_out_images_are_neither_trained_nor_tested(test):
    picks = draw(pool(12, test), Sampling(6, 1, validation="held_out"))
    few = draw(pool(12, test), Sampling(6, 1, validation="few"))
    assert picks.train == few.train, "the shots stay CoOp's"
    assert Counter(i.label for i in picks.val) == {0: 4, 1: 4} and not few.val
    assert not {i.image for i in picks.val} & {i.image for i in (*picks.train, *picks.test)}
    assert len(picks.test) == (6 if test else 2 * 12 - 12 - 8)


def test_held_out_leaves_something_to_test_and_follows_val_where_there_is_one():
    picks = draw(pool(8), Sampling(6, 1, validation="held_out"))
    assert Counter(i.label for i in picks.val) == {0: 1, 1: 1} == Counter(i.label for i in picks.test)
    with_val = draw(pool(8, 2, 5), Sampling(2, 1, validation="held_out"))
    assert with_val.val == draw(pool(8, 2, 5), Sampling(2, 1, validation="few")).val
