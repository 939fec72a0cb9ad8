"""Photos of one moment or thing stay on one side of every split: groups by burst, folder and column."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
import torch
from PIL import ExifTags, Image

from common.data import folder
from common.data.listing import Location
from common.data.sampling import Sampling, draw, set_apart
from common.few_shot.heads.base import Pictures, Support, Text
from common.few_shot.heads.best_of import BestOf
from common.few_shot.heads.folds import stratified_groups
from common.few_shot.learner import FeatureExtractor
from common.types import Item, Source, Split, Task, UserError

NOON = datetime(2026, 5, 1, 12)


def photo(path, second=None, camera="Alpha"):
    """Write a photo that was taken so many seconds after noon."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = camera
    if second is not None:
        time = NOON + timedelta(seconds=second)
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = f"{time:%Y:%m:%d %H:%M:%S}"
    Image.new("RGB", (4, 4)).save(path, exif=exif)


def read(root, **arguments):
    location = Location("folder", root, root)
    return folder.read(location, **arguments)


def groups(source):
    """Return the images of every group, without those that are alone."""
    found = {}
    for item in source.train:
        if item.group:
            found.setdefault(item.group, set()).add(item.image.removeprefix("folder/"))
    return sorted(map(sorted, found.values()))


def test_a_burst_ends_after_a_minute_without_a_photo(tmp_path):
    """Seconds 0, 40, 100 follow one another within 60; 161 does not; another camera has bursts of its own."""
    for name, second in {"jay/a": 0, "jay/b": 40, "tit/c": 100, "tit/d": 161, "tit/e": None}.items():
        photo(tmp_path / f"{name}.jpg", second)
    photo(tmp_path / "jay" / "f.jpg", 20, camera="Beta")
    source = read(tmp_path, group_by="burst")
    assert groups(source) == [["jay/a.jpg", "jay/b.jpg", "tit/c.jpg"], ["jay/f.jpg"], ["tit/d.jpg"]]
    assert "grouped by burst: 3 groups with up to 3 photos, and 1 photo alone" in source.notes


def test_folders_below_a_class_are_groups(tmp_path):
    for name in ("jay/north/a", "jay/north/b", "jay/south/c", "jay/d", "tit/north/e"):
        photo(tmp_path / f"{name}.jpg")
    assert groups(read(tmp_path, group_by="folder")) == [
        ["jay/north/a.jpg", "jay/north/b.jpg"],
        ["jay/south/c.jpg"],
        ["tit/north/e.jpg"],
    ]


def test_a_column_names_groups(tmp_path):
    for name in "abcd":
        photo(tmp_path / f"{name}.jpg")
    rows = ["path,label,Camera Site", "a.jpg,jay,1", "b.jpg,tit,1", "c.jpg,jay,2", "d.jpg,tit,"]
    (tmp_path / "photos.csv").write_text("\n".join(rows))
    assert groups(read(tmp_path, group_by="camera_site")) == [["a.jpg", "b.jpg"], ["c.jpg"]]
    with pytest.raises(UserError, match=r"group_by=site is the name of 0 columns of .*name one of path, label, Camera"):
        read(tmp_path, group_by="site")


@pytest.mark.parametrize(
    ("by", "said"),
    [("burst", "no photo says when"), ("folder", "lie directly in"), ("site", "folders, which have no columns")],
)
def test_what_cannot_be_grouped_is_refused(tmp_path, by, said):
    for name in ("jay/a", "tit/b"):
        photo(tmp_path / f"{name}.jpg")
    with pytest.raises(UserError, match=f"data.reader.group_by={by}: .*{said}"):
        read(tmp_path, group_by=by)


def test_an_own_split_that_divides_groups_is_told(tmp_path):
    for number, name in enumerate(("train/jay/a", "train/tit/b", "test/jay/c", "test/tit/d")):
        photo(tmp_path / f"{name}.jpg", 1000 * (number % 2))
    notes = read(tmp_path, group_by="burst").notes
    assert any("2 groups of photos lie in more than one of train, val and test" in note for note in notes)


def items(sizes, per_group):
    """Images of classes of such sizes, in groups of so many; the last one of a class may be smaller."""
    return [
        Item(f"{name}/{n}", label, name, f"{name}-{n // per_group}")
        for label, (name, size) in enumerate(sizes.items())
        for n in range(size)
    ]


@pytest.mark.parametrize("per_group", [2, 3, 7])
def test_no_group_is_on_both_sides(per_group):
    pool = items({"ant": 30, "bee": 21, "cow": 10, "dog": 4}, per_group)
    for seed in range(20):
        rest, tested = set_apart(pool, 0.2, seed)
        assert not {i.group for i in rest} & {i.group for i in tested} and len(rest) + len(tested) == len(pool)
        for name, size, wanted in (("ant", 30, 6), ("bee", 21, 4), ("cow", 10, 2)):
            count = sum(item.name == name for item in tested)
            assert 1 <= count < size and abs(count - wanted) <= per_group - 1
        # with groups of 7 all of its photos are one group: trained on, not tested
        assert any(item.name == "dog" for item in tested) == (per_group < 4)


def test_groups_of_several_classes_go_together():
    pool = [
        Item(f"{name}/{n}", label, name, str(n // 2)) for n in range(40) for label, name in enumerate(("ant", "bee"))
    ]
    rest, tested = set_apart(pool, 0.25, 3)
    assert not {i.group for i in rest} & {i.group for i in tested} and len(tested) == 20


@pytest.mark.parametrize("validation", ["none", "held_out"])
@pytest.mark.parametrize("share", [None, 0.2])
def test_no_photo_of_a_trained_group_is_tested_or_validated(validation, share):
    pool = tuple(items({"ant": 30, "bee": 30}, 3))
    source = Source(("ant", "bee"), pool, (), (), None, "", "")
    for seed in range(10):
        picks = draw(source, Sampling(3, seed, validation=validation, test_share=share))
        sides = [{item.group for item in part} for part in (picks.train, picks.val, picks.test)]
        assert all(not one & other for n, one in enumerate(sides) for other in sides[n + 1 :])
        assert len(picks.train) == 6 and len(picks.val) == (6 if validation == "held_out" else 0) and picks.test


def test_folds_keep_groups_whole_and_classes_known():
    labels = [0] * 24 + [1] * 12 + [2] * 6 + [3] * 3 + [4]
    names = [f"g{n // 3}" for n in range(45)] + [""]
    for seed in "123":
        parts = stratified_groups(labels, names, 4, seed)
        assert parts == stratified_groups(labels, names, 4, seed)
        for name in set(names):
            assert len({part for part, of in zip(parts, names, strict=True) if of == name}) == 1
        # the one group of class 3, and the one photo of class 4
        assert parts[42:] == [-1] * 4 and set(parts[:36]) == {0, 1, 2, 3}
        for label in range(3):
            assert len({part for part, of in zip(parts, labels, strict=True) if of == label}) > 1


def test_cross_validation_does_not_know_the_group_that_it_tests():
    """Every photo has a near copy in its group: without groups nearest neighbours look perfect, with them random."""
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(40, 16, generator=generator).repeat_interleave(2, 0)
    pictures = Pictures(
        moments + 0.01 * torch.randn(80, 16, generator=generator), torch.arange(2).repeat(20).repeat_interleave(2)
    )
    learners = {
        "tip_adapter": {
            "_target_": "common.few_shot.heads.tip_adapter.TipAdapter",
            "alpha": 1.0,
            "beta": 50.0,
            "search_scale": [7, 3],
            "key_views": 1,
        }
    }

    def right(groups):
        head = BestOf(seed=1, learners=learners, folds=5, repeats=2)
        head.begin(Support(pictures, lambda _: pictures, 1, groups=groups), None, Text(("a", "b")))
        for number in range(head.steps):
            head.step(number)
        return head.measured(0)["accuracy"]

    assert right(()) > 0.75
    assert right([str(n // 2) for n in range(80)]) < 0.65


def test_corrections_come_in_several_tables(tmp_path):
    """A later one counts more; it sees the classes of the earlier one."""
    photos = tmp_path / "photos"
    for name in ("jay/1", "jay/2", "jay/3", "tit/4", "tit/5"):
        photo(photos / f"{name}.jpg")
    photo(tmp_path / "one" / "new.jpg")
    photo(tmp_path / "two" / "new.jpg")
    (tmp_path / "one" / "a.csv").write_text("path,label\njay/1.jpg,tit\njay/2.jpg,tit\ntit/4.jpg,\nnew.jpg,jay\n")
    (tmp_path / "two" / "b.csv").write_text("path,label\njay/1.jpg,jay\njay/2.jpg,tit\ntit/4.jpg,jay\nnew.jpg,wren\n")
    tables = [str(tmp_path / "one" / "a.csv"), str(tmp_path / "two" / "b.csv")]
    source = read(photos, corrections=tables)
    assert {item.image: item.name for item in source.train} == {
        "folder/jay/1.jpg": "jay",
        "folder/jay/2.jpg": "tit",
        "folder/jay/3.jpg": "jay",
        "folder/tit/4.jpg": "jay",
        "folder/tit/5.jpg": "tit",
        "corrections/new.jpg": "jay",
        "corrections_2/new.jpg": "wren",
    }
    assert source.images.open("corrections_2/new.jpg").size == (4, 4)
    assert "a.csv: 2 photos corrected, 1 left out, 1 added to the training" in source.notes
    assert "warning: b.csv has classes that the photos have not: wren" in source.notes
    (tmp_path / "two" / "b.csv").write_text("path,label\njay/1.jpg,tits\njay/2.jpg,owl\n")
    near = read(photos, corrections=[tables[1]]).notes
    assert "warning: b.csv has classes that the photos have not: owl, tits (did you mean tit?)" in near
    assert source.added == {"corrections/new.jpg", "corrections_2/new.jpg"}


def test_images_without_a_part_are_the_same_in_every_repeat(monkeypatch):
    """The held-out predictions of the repeats are compared image by image."""
    divided = iter([[0, 1, -1, 0, 1, 0], [0, 1, 0, 1, -1, 0]])
    monkeypatch.setattr("common.few_shot.heads.folds.stratified_groups", lambda *_: next(divided))
    pictures = Pictures(torch.zeros(6, 2), torch.tensor([0, 0, 0, 1, 1, 1]))
    head = BestOf(
        seed=1,
        learners={"nearest_mean": {"_target_": "common.few_shot.heads.nearest_mean.NearestMean"}},
        folds=2,
        repeats=2,
    )
    head.begin(Support(pictures, lambda _: pictures, 1, groups=["a"] * 6), None, Text(("a", "b")))
    assert head.parts == [[0, 1, -1, 0, -1, 0], [0, 1, -1, 1, -1, 0]]


def test_learners_are_given_the_groups():
    class Extractor:
        def _support(self, images, items):
            return Support(None, None, 1)

    shots = items({"ant": 4}, 2)
    task = Task(Split(tuple(shots), ("ant",), "", ""), {}, None, "", {})
    assert FeatureExtractor.support(Extractor(), task).groups == ("ant-0", "ant-0", "ant-1", "ant-1")


@pytest.mark.parametrize("share", [None, 0.3])
def test_what_was_added_is_never_tested(share):
    """Their labels are somebody's later word, or a model's own answers."""
    pool = tuple(Item(f"{name}/{n}", label, name) for label, name in enumerate(("ant", "bee")) for n in range(10))
    new = tuple(Item(f"corrections/{n}", n % 2, ("ant", "bee")[n % 2]) for n in range(6))
    source = Source(("ant", "bee"), (*pool, *new), (), (), None, "", "", added=frozenset(i.image for i in new))
    plain = Source(("ant", "bee"), pool, (), (), None, "", "")
    for seed in range(10):
        picks, before = (draw(each, Sampling(4, seed, test_share=share)) for each in (source, plain))
        assert not {item.image for item in picks.test} & source.added and picks.test
        if share is not None:
            assert picks.test == before.test, "the test stays what it was"
    everyone = draw(source, Sampling(None, 1, test_share=0.3))
    assert source.added < {item.image for item in everyone.train}
