"""Datasets in the hub's layout, on tiny parquet repositories; nothing is downloaded."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data import contents, hub
from common.data.hub import WORDINGS, match
from common.data.listing import Location
from common.types import BadImage, UserError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def local_cache(monkeypatch, tmp_path):
    """What is prepared stays in the test's folder, and the hub is out of reach even if `datasets` came first."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def location(tmp_path):
    folder = tmp_path / "data" / "dtd"
    folder.mkdir(parents=True)
    return Location("dtd", tmp_path / "data", folder)


def png(colour=RED):
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, "PNG")
    return file.getvalue()


def bmp(colour):
    """Of one size, whatever the colour."""
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, "BMP")
    return file.getvalue()


def write(folder, names, splits, images=None):
    """A repository with the columns `image` and `label`; `splits` are class names by row. names=None: labels as text."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    kind = Value("string") if names is None else ClassLabel(names=names)
    features = Features({"image": ImageFeature(), "label": kind})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, labels in splits.items():
        pictures = (images or {}).get(split) or [png() for _ in labels]
        table = Dataset.from_dict({"image": pictures_as_rows(pictures), "label": labels}, features=features)
        half = (len(table) + 1) // 2  # two files, as larger repositories have
        for number, some in enumerate((range(half), range(half, len(table)))):
            if some:
                table.select(some).to_parquet(folder / "data" / f"{split}-{number:05d}-of-00002.parquet")
    return str(folder)


def pictures_as_rows(pictures):
    return [{"bytes": one, "path": None} if isinstance(one, bytes) else one for one in pictures]


def split_file(location, names, file="split_zhou_DescribableTextures.json"):
    rows = [[f"{name}/1.jpg", label, name] for label, name in enumerate(names)]
    (location.folder / file).write_text(json.dumps({"train": rows, "val": rows, "test": rows[::-1]}))


def rows(items):
    return [(item.image, item.label, item.name) for item in items]


def test_the_dataset_s_own_names_and_order_win(location, tmp_path):
    split_file(location, ["yin_yang", "ant", "Sea or Lake"])
    id = write(tmp_path / "repo", ["sea_or_lake", "Yin Yang", "ant"], {"train": [0, 1, 2, 1], "test": [2]})
    source = hub.read(location, id=id)
    assert source.names == ("yin_yang", "ant", "Sea or Lake")
    assert rows(source.train) == [
        ("dtd/hub/train/0", 2, "Sea or Lake"),
        ("dtd/hub/train/1", 0, "yin_yang"),
        ("dtd/hub/train/2", 1, "ant"),
        ("dtd/hub/train/3", 0, "yin_yang"),
    ]
    assert rows(source.test) == [("dtd/hub/test/0", 1, "ant")]
    assert source.val == () and source.origin == "hub split"


def test_variants_name_the_classes(location, tmp_path):
    (location.folder / "variants.txt").write_text("F-16A/B\nAn-12\n")
    id = write(tmp_path / "repo", ["An-12", "F-16A/B"], {"train": [0, 1], "validation": [1], "test": [0]})
    source = hub.read(location, id=id, parts={"train": "train", "val": "validation", "test": "test"})
    assert source.names == ("F-16A/B", "An-12")
    assert rows(source.val) == [("dtd/hub/val/0", 0, "F-16A/B")]


def test_without_own_files_the_names_are_sorted(location, tmp_path):
    id = write(tmp_path / "repo", ["b_two", "Alpha", "C"], {"train": [0, 1, 2], "test": [2]})
    source = hub.read(location, id=id)
    assert source.names == ("Alpha", "b_two", "C")
    assert [item.label for item in source.train] == [1, 0, 2]


def test_labels_may_be_text(location, tmp_path):
    id = write(tmp_path / "repo", None, {"train": ["b", "a"], "test": ["c", "a"]})
    source = hub.read(location, id=id)
    assert source.names == ("a", "b", "c")
    assert [item.label for item in source.train + source.test] == [1, 0, 2, 0]


def test_dropped_classes_keep_the_row_numbers(location, tmp_path):
    names = ["background_google", "Faces", "Faces_easy", "ant"]
    id = write(tmp_path / "repo", names, {"train": [0, 1, 2, 3], "test": [3, 1]})
    source = hub.read(location, id=id, drop=["BACKGROUND_Google", "Faces_easy"], renames={"faces": "face"})
    assert source.names == ("ant", "face")
    assert rows(source.train) == [("dtd/hub/train/1", 1, "face"), ("dtd/hub/train/3", 0, "ant")]


@pytest.mark.parametrize(
    ("wording", "names", "expected"),
    [
        ("year_first", ["Audi TTS Coupe 2012", "Ram C/V Cargo Van 2012"], ["2012 Audi TTS Coupe", "2012 Ram C/V Cargo Van"]),
        ("path", ["/b/ball_pit", "/a/apse/indoor", "/w/a/b/c"], ["ball_pit", "c b a", "indoor apse"]),
        ("as_is", ["Sea or Lake"], ["Sea or Lake"]),
    ],
    ids=["cars", "scenes", "as is"],
)  # fmt: skip
def test_wordings(location, tmp_path, wording, names, expected):
    id = write(tmp_path / "repo", names, {"train": list(range(len(names)))})
    assert list(hub.read(location, id=id, parts={"train": "train"}, wording=wording).names) == expected


CLASSNAMES = (
    "n01440764 tench\nn02012849 crane bird\nn03126707 construction crane\nn03773504 missile\nn04008634 missile\n"
)


def test_wordnet_ids_get_the_names_of_imagenet(location, tmp_path):
    (location.root / "imagenet").mkdir()
    (location.root / "imagenet" / "classnames.txt").write_text(CLASSNAMES)
    id = write(tmp_path / "repo", None, {"test": ["n04008634", "n01440764", "n03773504"]})
    source = hub.read(location, id=id, parts={"test": "test"}, wording="wnid")
    assert source.names == ("tench", "missile", "missile")
    assert [item.label for item in source.test] == [2, 0, 1]


def test_synonyms_tell_the_two_cranes_apart(location, tmp_path):
    (location.folder / "classnames.txt").write_text(CLASSNAMES)
    names = ["missile", "crane2", "projectile, missile", "crane", "tench, Tinca tinca"]
    id = write(tmp_path / "repo", names, {"train": [0, 1, 2, 3, 4]})
    cranes = {"crane": "n02012849", "crane2": "n03126707"}
    source = hub.read(location, id=id, parts={"train": "train"}, wording="synonyms", renames=cranes)
    assert source.names == ("tench", "crane bird", "construction crane", "missile", "missile")
    assert [item.label for item in source.train] == [3, 2, 4, 1, 0]
    with pytest.raises(UserError, match="the hub's 'crane', 'crane2' is no class"):
        hub.read(location, id=id, parts={"train": "train"}, wording="synonyms")


def test_pictures(location, tmp_path):
    file = tmp_path / "file.png"
    file.write_bytes(png(BLUE))
    damaged = png(GREEN)[:40]
    images = [png(RED), damaged, b"", None, {"bytes": None, "path": str(file)}, png(GREEN)]
    id = write(tmp_path / "repo", ["a"], {"train": [0] * 6}, {"train": images})
    source = hub.read(location, id=id, parts={"train": "train"})
    keys = [item.image for item in source.train]
    for row, colour in ((0, RED), (4, BLUE), (5, GREEN)):
        picture = np.asarray(source.images.open(keys[row]))
        assert picture.shape == (2, 3, 3) and (picture == colour).all()
    with pytest.raises(BadImage):
        source.images.open(keys[1])
    for row in (2, 3):
        with pytest.raises(BadImage, match="no picture in this row"):
            source.images.stamp(keys[row])
        with pytest.raises(BadImage, match="no picture in this row"):
            source.images.size(keys[row])
    for row, stored in ((0, png(RED)), (1, damaged), (4, png(BLUE))):
        assert (source.images.size(keys[row]), source.images.content(keys[row])) == (len(stored), stored)
        assert source.images.content(keys[row], 3, 5) == stored[3:8]
    stamps = [source.images.stamp(keys[row]) for row in (0, 1, 4, 5)]
    assert len(set(stamps)) == 4
    file.write_bytes(png(GREEN) + b" ")
    assert source.images.stamp(keys[4]) != stamps[2]


def test_a_path_of_another_machine_is_named(location, tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(png(BLUE))
    images = [{"bytes": None, "path": str(file)}, png(RED)]
    id = write(tmp_path / "repo", ["a"], {"train": [0, 0]}, {"train": images})
    file.unlink()
    found = hub.read(location, id=id, parts={"train": "train"}).images
    for ask in (found.size, found.stamp, found.open):
        with pytest.raises(BadImage, match=f"no picture in this row: it names {file}, which is not on"):
            ask("dtd/hub/train/0")


def test_other_data_has_other_stamps(location, tmp_path):
    found = []
    for name, colour in (("one", RED), ("two", BLUE), ("one", GREEN)):
        id = write(tmp_path / name, ["a"], {"train": [0]}, {"train": [png(colour)]})
        source = hub.read(location, id=id, parts={"train": "train"})
        assert (np.asarray(source.images.open("dtd/hub/train/0")) == colour).all()
        found.append(source.images.stamp("dtd/hub/train/0"))
        assert source.images == hub.read(location, id=id, parts={"train": "train"}).images
    assert len(set(found)) == 3


def test_a_copy_whose_files_keep_size_and_time_is_read_anew(location, tmp_path):
    """`datasets` itself knows files by path and time of modification."""

    def read(colour, folder):
        id = write(tmp_path / folder, ["a"], {"train": [0]}, {"train": [bmp(colour)]})
        return next((tmp_path / folder).rglob("*.parquet")), id

    path, id = read(RED, "repo")
    first = hub.read(location, id=id, parts={"train": "train"}).images.stamp("dtd/hub/train/0")
    other, before = read(BLUE, "other")[0].read_bytes(), path.stat()
    path.write_bytes(other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    images = hub.read(location, id=id, parts={"train": "train"}).images
    assert (np.asarray(images.open("dtd/hub/train/0")) == BLUE).all()
    assert images.stamp("dtd/hub/train/0") == hashlib.sha256(bmp(BLUE)).hexdigest() != first


def test_a_picture_between_those_that_are_sampled_has_its_own_stamp(location, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SAMPLES", 1)
    monkeypatch.setattr(contents, "SETTLED", 0)  # hashes are kept at once
    found = []
    for folder, colour in (("one", GREEN), ("two", BLUE)):
        pictures = [bmp(RED), bmp(colour)]
        id = write(tmp_path / folder, ["a"], {"train": [0, 0]}, {"train": pictures})
        images = hub.read(location, id=id, parts={"train": "train"}).images
        found.append([images.stamp(f"dtd/hub/train/{row}") for row in (0, 1)])
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_fingerprint_is_of_names_labels_and_pictures(location, tmp_path):
    def fingerprint(folder, names, labels, picture=RED, **arguments):
        id = write(tmp_path / folder, names, {"train": labels}, {"train": [png(picture) for _ in labels]})
        return hub.read(location, id=id, parts={"train": "train"}, **arguments).fingerprint

    first = fingerprint("one", ["a", "b"], [0, 1, 1])
    assert len(first) == 64 and int(first, 16)
    assert fingerprint("two", ["b", "a"], [1, 0, 0]) == first, "numbers and places do not matter"
    others = [
        fingerprint("blue", ["a", "b"], [0, 1, 1], BLUE),
        fingerprint("three", ["a", "b"], [0, 1, 0]),
        fingerprint("four", ["a", "c"], [0, 1, 1]),
        fingerprint("five", ["a", "b", "x"], [0, 1, 1, 2]),
        fingerprint("six", ["a", "b", "x"], [0, 2, 1, 1], drop=["x"]),
    ]
    assert len({first, *others}) == 6


@pytest.mark.parametrize(
    ("own", "names", "arguments", "message"),
    [
        (["ant", "bee"], ["ant", "wasp"], {}, "the hub's 'wasp' is no class of the dataset"),
        (["ant", "bee", "fly"], ["bee", "ant"], {}, "the hub has no class 'fly'; its names are 'ant', 'bee'"),
        (["ant"], ["ant", "Ameise"], {"renames": {"Ameise": "ant"}}, "the hub's 'Ameise', 'ant' are one class"),
        (["ant", "Ant"], ["ant"], {}, "the hub's 'ant' could be several classes"),
        (None, ["a b", "x"], {"renames": {"x": "A_b"}}, "two of the hub's classes are called 'A_b'|called 'a b'"),
        (None, ["ant"], {"drop": ["bee"]}, "data.hub.drop names 'bee'"),
        (None, ["ant"], {"renames": {"bee": "wasp"}}, "data.hub.renames names 'bee'"),
        (None, ["ant"], {"wording": "loud"}, "data.hub.wording=loud: choose one of as_is"),
        (None, ["n01440764"], {"wording": "wnid"}, "classnames.txt does not exist.*python -m common.data.names"),
        (None, ["ant"], {"image": "photo"}, "data.hub.image=photo: .* has the columns image, label"),
        (None, ["ant"], {"label": "class"}, "data.hub.label=class: .* has the columns image, label"),
        (None, ["ant"], {"image": "label"}, "data.hub.image=label: the column holds no pictures"),
        (None, ["ant"], {"label": "image"}, "data.hub.label=image: the column has no class names"),
        (None, ["ant"], {"parts": {"train": "training"}}, 'data.hub.parts does not fit .*"training".*train'),
        (None, ["ant"], {"parts": {"valid": "train"}}, "data.hub.parts.valid: the parts are train, val, test"),
    ],
    ids=[
        *(
            "unmatched",
            "missing",
            "same class",
            "ambiguous",
            "same name",
            "drop",
            "renames",
            "wording",
            "no classnames",
        ),
        *("no image column", "no label column", "no pictures", "no labels", "unknown split", "unknown part"),
    ],
)
def test_what_does_not_fit_is_named(location, tmp_path, own, names, arguments, message):
    if own:
        split_file(location, own)
    id = write(tmp_path / "repo", names, {"train": list(range(len(names)))})
    with pytest.raises(UserError, match=message) as error:
        hub.read(location, **{"id": id, "parts": {"train": "train"}, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("split_zhou_DescribableTextures.json", "{", "split_zhou_DescribableTextures.json"),
        ("split_zhou_DescribableTextures.json", '{"train": [["a.jpg", 1, "ant"]]}', "split_zhou_DescribableTextures.json"),
    ],
    ids=["no JSON", "gap in the labels"],
)  # fmt: skip
def test_damaged_own_files_are_named(location, tmp_path, file, content, message):
    (location.folder / file).write_text(content)
    id = write(tmp_path / "repo", ["ant"], {"train": [0]})
    with pytest.raises(UserError, match=message):
        hub.read(location, id=id, parts={"train": "train"})


def test_two_split_files_are_refused(location, tmp_path):
    split_file(location, ["ant"])
    split_file(location, ["ant"], "split_zhou_Other.json")
    id = write(tmp_path / "repo", ["ant"], {"train": [0]})
    with pytest.raises(UserError, match="several split files.*'split_zhou_Desc.*'split_zhou_Other.json'"):
        hub.read(location, id=id, parts={"train": "train"})


def test_rows_without_a_label_are_refused(location, tmp_path):
    id = write(tmp_path / "repo", ["ant"], {"train": [0], "test": [0, -1]})
    with pytest.raises(UserError, match="row 1 of the hub's split 'test' has no label"):
        hub.read(location, id=id)


def test_an_id_that_is_out_of_reach_is_one_line(location):
    with pytest.raises(
        UserError, match="tanganke/dtd cannot be reached.*hf download tanganke/dtd.*data.source=local"
    ) as error:
        hub.read(location, id="tanganke/dtd")
    assert "\n" not in str(error.value) and "docs/datasets.md#dtd" in str(error.value)


def test_a_loading_script_is_not_run(location, tmp_path):
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text("raise SystemExit(1)")
    with pytest.raises(UserError, match="script is a loading script"):
        hub.read(location, id=str(folder))


def test_a_folder_that_is_not_there(location, tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder with a dataset"):
        hub.read(location, id=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it.", "hf auth login"),
        ("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.", "check it at https://huggingface.co/datasets/a/b"),
    ],
    ids=["gated", "unknown"],
)  # fmt: skip
def test_what_the_hub_refuses(location, monkeypatch, text, advice):
    import datasets

    def refuse(*arguments, **keywords):
        raise datasets.exceptions.DatasetNotFoundError(text)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=advice):
        hub.read(location, id="a/b")


CONFIGURED = sorted((Path(__file__).parent.parent / "conf" / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURED, ids=lambda path: path.stem)
def test_configured_blocks_are_calls_of_the_reader(path, location):
    from omegaconf import OmegaConf

    block = OmegaConf.to_container(OmegaConf.load(path), resolve=True).get("hub")
    if not block:
        return
    assert block.pop("_target_") == "common.data.hub.read"
    bound = inspect.signature(hub.read).bind(location, **block)
    assert bound.arguments.get("wording", "as_is") in WORDINGS
    assert set(bound.arguments["parts"]) <= {"train", "val", "test"} and "test" in bound.arguments["parts"]


def test_a_task_from_the_hub(location, tmp_path, compose):
    from common.config.composition import validate
    from common.data import task

    split_file(location, ["polka-dotted", "banded_lines"])
    colours = [RED, GREEN, BLUE, RED]
    id = write(
        tmp_path / "repo",
        ["banded lines", "polka-dotted"],
        {"train": [0, 1, 0, 1], "test": [1, 0]},
        {"train": [png(colour) for colour in colours]},
    )
    settings = ["data=dtd", f"data.root={location.root}", "data.source=hub", f"data.hub.id={id}", "shots=all"]
    found = task.build(validate(compose("method=sft", *settings))).task
    assert found.origins == {"dtd": "hub split"} and found.train.names == ("polka-dotted", "banded lines")
    assert [(item.image, item.label) for item in found.train.items] == [
        (f"dtd/hub/train/{row}", label) for row, label in enumerate([1, 0, 1, 0])
    ]
    assert {name: len(split.items) for name, split in found.evaluation.items()} == {"test": 2}
    for item, colour in zip(found.train.items, colours, strict=True):
        assert (np.asarray(found.images.open(item.image)) == colour).all()


def test_datasets_without_a_known_copy_say_so(compose):
    from omegaconf import OmegaConf

    config = compose("data=flowers102", "data.source=hub")
    with pytest.raises(UserError, match="data=flowers102: no hub id"):
        OmegaConf.to_object(config.data)


REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "coop_splits"


@pytest.mark.sampled
@pytest.mark.skipif(not REAL.is_dir(), reason="the published split files are not here")
@pytest.mark.parametrize(
    ("file", "count"),
    [("Caltech101", 100), ("OxfordPets", 37), ("StanfordCars", 196), ("DescribableTextures", 47), ("EuroSAT", 10), ("UCF101", 101)],
)  # fmt: skip
def test_real_names_find_their_classes(location, file, count):
    path = REAL / f"split_zhou_{file}.json"
    (location.folder / path.name).symlink_to(path)
    names = {label: name for _, label, name in json.loads(path.read_text())["test"]}
    assert len(names) == count
    on_the_hub = {name.upper().replace("_", " "): label for label, name in names.items()}
    wording = "as_is"
    if file == "StanfordCars":  # the year to the end, as the hub has it
        on_the_hub = {" ".join([*name.split()[1:], name.split()[0]]): label for name, label in on_the_hub.items()}
        wording = "year_first"
    found = match(location, sorted(on_the_hub), wording, {}, [])
    assert found.labels == on_the_hub
    assert found.names == tuple(names[label] for label in range(count))
