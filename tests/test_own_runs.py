"""Runs on own photos up to the model: which are left out, replaced and tested, and what the manifest says of it."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

import run
from common import preflight
from common.config.composition import plain, validate
from common.data import loading, manifest, task
from common.run.result import describe
from common.run.run_folder import RunFolder
from common.types import UserError
from tests import data_tree

pytestmark = pytest.mark.slow  # most compose a run and read its data

CLASSES = ("cat", "dog")


@pytest.fixture
def root(tmp_path):
    """Ten photos of each class, no split."""
    for label, name in enumerate(CLASSES):
        for number in range(10):
            data_tree.picture(tmp_path / "photos" / name / f"{name}{number}.png", label)
    return tmp_path / "photos"


@pytest.fixture
def configured(compose, root, tmp_path):
    def get(*overrides):
        base = ["data=folder", f"data.folder={root}", f"cache_dir={tmp_path / 'cache'}", "method=sft"]
        return validate(compose(*base, *overrides))

    return get


def file_of(root, image):
    return root / image.removeprefix("folder/")


def spoil(root, *images):
    for image in images:
        file_of(root, image).write_bytes(b"no picture")


def keys(split):
    return [item.image for item in split.items]


def test_photos_that_cannot_be_used_are_replaced_and_named(configured, root, capsys):
    config = configured("shots=3", "data.skip_bad=true")
    before = task.build(config).task
    bad = before.train.items[0]
    spoil(root, bad.image)
    first = loading.readable(config)
    left_out = first.manifest["left_out"]
    fresh = first.task.train.items[0]
    assert fresh.label == bad.label and keys(first.task.train)[1:] == keys(before.train)[1:]
    spoil(root, fresh.image)  # its replacement is no better
    found = loading.readable(config)
    left_out = found.manifest["left_out"]
    assert left_out == sorted((bad.image, fresh.image)) == list(found.manifest["unusable"])
    assert set(found.manifest["unusable"].values()) == {"not a picture that PIL can read"}
    assert len(found.task.train.items) == 6 and not set(left_out) & set(found.images)
    assert (found.manifest["short_classes"], found.manifest["refilled"]) == ({}, {bad.name: 1})
    assert len(found.task.evaluation["test"].items) == 20 - 6 - 2, "a photo that replaces another is not tested"
    said = capsys.readouterr().err
    assert f"left out 2 pictures that cannot be used: {bad.image} (not a picture that PIL can read), " in said
    # after a resume, on every rank, and before the final evaluation
    assert loading.readable(config).manifest == found.manifest
    assert task.build(config, left_out).manifest["hash"] == found.manifest["hash"]


def test_pictures_that_changed_under_their_names_stop_what_goes_on_with_them(configured, root, tmp_path, capsys):
    """Of the same size and with the same times, as rsync, unzip and `cp -p` leave them."""
    config, path = configured("shots=2"), tmp_path / "manifest.json"
    for number, name in enumerate(CLASSES):  # without compression all have one size
        for photo in (root / name).iterdir():
            Image.new("RGB", (8, 8), (number * 100, int(photo.stem[3:]) * 9, 0)).save(photo.with_suffix(".bmp"))
            photo.unlink()
    before = loading.readable(config)
    assert loading.readable(config).manifest == before.manifest
    manifest.write(before.manifest, path)
    loading.check_finished(config, path)
    manifest.verify(path, before.manifest)
    one, other = (file_of(root, before.task.evaluation["test"].items[number].image) for number in (0, -1))
    kept = one.stat()
    one.write_bytes(other.read_bytes())
    os.utime(one, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    key = before.task.evaluation["test"].items[0].image
    with pytest.raises(
        UserError, match=f"1 of 20 pictures .first: {key}. has changed since .*manifest.json was written"
    ):
        manifest.verify(path, loading.readable(configured("shots=2", "data.duplicates=ignore")).manifest)
    with pytest.raises(UserError, match=f"the run is finished, but 1 of 20 pictures .first: {key}. has changed since"):
        loading.check_finished(config, path)
    one.unlink()
    with pytest.raises(UserError, match="the run is finished, but 'train' has other images or labels now, first: "):
        loading.check_finished(config, path)
    (root / "cat").rename(tmp_path / "cat")
    (root / "dog").rename(tmp_path / "dog")
    loading.check_finished(config, path)  # the result can be looked at without the data
    assert "whether its pictures are still the same cannot be told: data=folder" in capsys.readouterr().err


@pytest.fixture
def troubled(root):
    """Photos that are empty, cut off and no picture, with what is said of them."""
    (root / "cat" / "cat0.png").write_bytes(b"")
    (root / "cat" / "cat1.png").write_bytes(b"no picture")
    (root / "dog" / "dog0.png").write_bytes((root / "dog" / "dog1.png").read_bytes()[:80])
    return {
        "cat/cat0.png": "an empty file",
        "cat/cat1.png": "not a picture that PIL can read",
        "dog/dog0.png": "truncated",
    }


def test_all_that_is_wrong_is_said_at_once(compose, configured, troubled):
    config = configured("method=zeroshot")
    with pytest.raises(UserError, match="^3 of 20 images cannot be used: ") as before:
        preflight.check_images(config, task.build(config))
    for name, reason in troubled.items():
        assert re.search(f"folder/{name} .[^)]*{reason}", str(before.value))


def test_a_preview_opens_the_pictures(compose, configured, root, tmp_path, troubled):
    asked = [
        "data=folder",
        f"data.folder={root}",
        f"cache_dir={tmp_path / 'cache'}",
        "method=zeroshot",
        "manifest=true",
    ]
    with pytest.raises(UserError, match="^3 of 20 images cannot be used: .*cat0.png .an empty file"):
        run.job(compose(*asked), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run.job(compose(*asked, "data.skip_bad=true"), tmp_path / "run")
    written = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert written["left_out"] == list(written["unusable"]) == [f"folder/{name}" for name in troubled]
    assert all(len(row) == 3 and len(row[2]) == 16 for row in written["splits"]["test"]["rows"])


def test_a_finished_run_is_shown_only_with_its_pictures(compose, configured, root, tmp_path, capsys, monkeypatch):
    cfg = compose("data=folder", f"data.folder={root}", f"cache_dir={tmp_path / 'cache'}", "method=sft", "shots=2")
    folder = tmp_path / "run"
    place = RunFolder(folder)
    place.claim(plain(cfg))
    frozen = loading.readable(validate(cfg))
    manifest.write(frozen.manifest, folder / "manifest.json")
    place.write_result(describe(validate(cfg), {"path": "", "sha256": ""}, frozen, ""))
    monkeypatch.setattr("common.report.tables.show", lambda *arguments: None)  # nothing was measured
    monkeypatch.setattr(run, "write_page", lambda folder: None)
    run.job(cfg, folder)
    assert f"already finished: {folder}" in capsys.readouterr().out
    image = frozen.task.train.items[0].image
    data_tree.picture(file_of(root, image), 7)
    with pytest.raises(
        UserError, match=f"is finished, but 1 of 20 pictures .first: {image}. has changed since; {folder}"
    ):
        run.job(cfg, folder)
    assert "already finished" not in capsys.readouterr().out


def test_transparent_pictures_are_counted_and_said_once(configured, root, capsys):
    for number in range(3):
        Image.new("LA", (8, 8), (0, 50 * number)).save(root / "cat" / f"cat{number}.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(root / "cat" / "cat3.png")
    Image.fromarray(np.array([[0, 4000]], np.uint16)).save(root / "dog" / "dog0.png")
    bad = configured("method=zeroshot", "data.skip_bad=true")
    said = "transparent parts of 2 pictures are shown on white (data.background)"
    for _ in range(2):  # the second time, nothing is decoded
        found = loading.readable(bad)
        assert found.manifest["treated"] == {"transparent": 2, "stretched": 1}
        assert found.manifest["unusable"] == {
            "folder/cat/cat0.png": "nothing of it can be seen: all of it is transparent"
        }
        error = capsys.readouterr().err
        assert error.count(said) == 1 and error.count("16-bit levels of 1 picture use a part of their range") == 1
    assert found.task.images.open("folder/cat/cat1.png").getpixel((0, 0)) == (205, 205, 205)  # 255 * (1 - 50 / 255)
    black = loading.readable(configured("method=zeroshot", "data.skip_bad=true", "data.background=black"))
    assert black.task.images.open("folder/cat/cat1.png").getpixel((0, 0)) == (0, 0, 0)
    assert black.manifest["hash"] == found.manifest["hash"] and manifest.changed(found.manifest, black.manifest)


@pytest.mark.parametrize("value", ["wihte", "'#12345'", "'#ffffff80'"])
def test_a_background_is_a_colour(configured, value):
    with pytest.raises(UserError, match="data.background=.* is no colour: give a name such as white"):
        configured(f"data.background={value}")


def test_replacements_from_a_training_part_are_tried_too(configured, root):
    for part in ("train", "test"):
        for name in CLASSES:
            (root / part).mkdir(exist_ok=True)
            if part == "train":
                (root / name).rename(root / part / name)
            else:
                data_tree.picture(root / part / name / "t.png")
    config = configured("shots=2", "data.skip_bad=true", "data.duplicates=ignore")
    picks = keys(task.build(config).task.train)
    unpicked = sorted(
        f"folder/train/cat/{path.name}"
        for path in (root / "train/cat").iterdir()
        if f"folder/train/cat/{path.name}" not in picks
    )
    good = unpicked.pop()
    spoil(root, *(image for image in picks if "/cat/" in image), *unpicked)
    found = loading.readable(config)
    left_out = found.manifest["left_out"]
    assert [image for image in keys(found.task.train) if "/cat/" in image] == [good]
    assert found.manifest["short_classes"] == {"cat": 1} and found.manifest["refilled"] == {"cat": 1}
    assert len(left_out) == 9 and len(found.task.evaluation["test"].items) == 2, "no test image was taken"


@pytest.mark.slow
def test_the_field_s_picks_are_not_replaced(tmp_path, compose):
    root = data_tree.build(tmp_path / "data")
    arguments = ["data=dtd", f"data.root={root}", "shots=1", "data.skip_bad=true", f"cache_dir={tmp_path}"]
    config = validate(compose(*arguments, "data.duplicates=ignore"))
    bad = task.build(config).task.train.items[0]
    (root / "dtd" / bad.image.removeprefix("dtd/")).write_bytes(b"no picture")
    found = loading.readable(config)
    left_out = found.manifest["left_out"]
    assert left_out == [bad.image] and len(found.task.train.items) == 2
    assert found.manifest["short_classes"] == {bad.name: 0} and "refilled" not in found.manifest


def test_without_training_every_photo_is_tested(configured):
    found = task.build(configured("method=zeroshot", "shots=16"))
    assert found.task.train.items == () and len(found.task.evaluation["test"].items) == 20
    assert found.manifest["splits"]["train"]["n"] == 0 and found.manifest["short_classes"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        (["method=zeroshot"], 0),
        (["method=nothinking", "trainer=none"], 0),
        (["method=sft"], 4),
        (["method=gemma_1shot", "model=tiny_gemma3"], 4),
        (["method=alert_zeroshot", "model=tiny_gemma3"], 4),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_methods_that_look_at_the_shots_get_them(configured, overrides, trained):
    found = task.build(configured(*overrides, "shots=2", "validation=none"))
    assert (len(found.task.train.items), len(found.task.evaluation["test"].items)) == (trained, 20 - trained)


def test_too_many_shots_name_what_can_be_done(configured):
    with pytest.raises(UserError, match="shots=16, but class 'cat' has only 10 .*shots=9 or fewer.*method=zeroshot"):
        task.build(configured("shots=16"))


def trained_run(found, folder):
    """The folder of a run with this manifest, as far as it matters."""
    (folder / "model").mkdir(parents=True)
    (folder / "config.yaml").touch()
    manifest.write(found.manifest, folder / "manifest.json")
    return folder / "model"


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("model", ["model", "checkpoints/step-000004/model"])
def test_a_trained_model_is_not_tested_on_what_it_was_trained_on(configured, tmp_path, model):
    trained = task.build(configured("shots=3", "seed=2"))
    trained_run(trained, tmp_path / "run")
    (tmp_path / "run" / model).mkdir(parents=True, exist_ok=True)
    weights = ["model.recipe=null", f"model.path={tmp_path / 'run' / model}"]
    found = task.build(configured("method=zeroshot", *weights))
    assert keys(found.task.evaluation["test"]) == keys(trained.task.evaluation["test"])
    assert "6 images that the model was trained on are not tested" in found.manifest["notes"]
    # trained on with another seed: neither the old nor the new picks are tested
    more = task.build(configured("shots=3", "seed=1", *weights)).task
    assert not {*keys(trained.task.train), *keys(more.train)} & set(keys(more.evaluation["test"]))


@pytest.mark.slow
def test_a_model_of_other_photos_is_tested_on_all(configured, root, tmp_path):
    model = trained_run(task.build(configured("shots=3")), tmp_path / "run")
    (root / "dog/dog0.png").rename(root / "dog/dog99.png")  # other photos, though most have the same names
    found = task.build(configured("method=zeroshot", "model.recipe=null", f"model.path={model}"))
    assert len(found.task.evaluation["test"].items) == 20 and "notes" not in found.manifest


def test_what_readers_pass_over_stands_in_the_manifest_but_not_in_its_hash(configured, root, tmp_path, capsys):
    config = configured("shots=2", "data.duplicates=ignore")
    manifest.write(task.build(config).manifest, tmp_path / "manifest.json")
    assert json.loads((tmp_path / "manifest.json").read_text())["passed_over"] == {}
    (root / "cat/@eaDir").mkdir()  # the server made its thumbnails meanwhile
    data_tree.picture(root / "cat/@eaDir/cat1.png")
    (root / "cat/notes.txt").touch()
    found = loading.readable(config).manifest
    assert found["passed_over"] == {"litter": 1, "unknown suffix": 1}
    assert "passed over in the folders of the data: 1 litter, 1 unknown suffix" in capsys.readouterr().err
    manifest.verify(tmp_path / "manifest.json", found)


def test_how_parts_were_recognised_is_said(configured, root, capsys):
    for part in ("Training_Set", "Test_Set"):
        for name in CLASSES:
            data_tree.picture(root / "new" / part / name / f"{part}.png")
    found = loading.readable(configured(f"data.folder={root / 'new'}", "shots=1"))
    (note,) = found.manifest["notes"]
    assert note.startswith("data=folder: ") and "Training_Set/ is read as train" in note
    assert note in capsys.readouterr().err
