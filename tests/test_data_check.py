"""The overview of the datasets, on a small `$DATA` with every dataset in its own format."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from common.data import check
from common.types import UserError
from tests import data_tree

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "conf" / "data").glob("*.yaml"))
# What data_tree writes with two shots: one image per class for validation, two for testing.
SIZES = {
    "caltech101": {"classes": 5, "train": 10, "val": 5, "test": 10},
    "fgvc_aircraft": {"classes": 4, "train": 8, "val": 4, "test": 8},
    "imagenet": {"classes": 5, "train": 10, "val": 0, "test": 10},
    "imagenet_a": {"classes": 3, "train": 6, "val": 0, "test": 6},
    "digits": {"classes": 10, "train": 1797, "val": 0, "test": 0},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return data_tree.build(tmp_path_factory.mktemp("data"))


@pytest.fixture
def configured(tree, monkeypatch):
    """The configuration of a dataset in the tree."""
    monkeypatch.setenv("DATA", str(tree))

    def get(name, **changes):
        (data,) = check.configured([name], [])
        return replace(data, **changes)

    return get


@pytest.mark.sampled
@pytest.mark.parametrize("name", SIZES)
def test_sizes(configured, name):
    report = check.examine(configured(name, published=SIZES[name]))
    assert report.found and report.sizes == SIZES[name] and report.problems == ()


@pytest.mark.slow
def test_every_dataset_is_found_and_complete(monkeypatch, tree):
    monkeypatch.setenv("DATA", str(tree))
    reports = [check.examine(replace(data, published={})) for data in check.configured([], [])]
    assert [report.data.name for report in reports] == NAMES
    assert all(report.found and not report.problems for report in reports)
    assert {report.data.name: report.origin for report in reports}["fgvc_aircraft"] == "official lists"


@pytest.mark.slow
def test_other_sizes_than_published(configured):
    published = {"classes": 3, "train": 2820, "val": 3, "test": 1692}
    report = check.examine(configured("dtd", published=published))
    assert report.problems == ("not the published sizes: train 6 of 2,820, test 6 of 1,692",)
    shown = check.table([report])
    assert [str(cell) for column in shown.columns for cell in column.cells][7] == "differs"
    # ImageNet without its training images is enough for zero-shot
    assert check.examine(configured("digits", published={"classes": 10, "train": 1797, "test": 5})).problems == ()


def test_missing_and_empty_images_are_counted(configured, tree, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tree / "dtd", root / "dtd")
    (root / "dtd/images/banded/banded_0002.jpg").unlink()
    (root / "dtd/images/dotted/dotted_0005.jpg").write_bytes(b"")
    report = check.examine(configured("dtd", root=str(root), published={}))
    assert report.problems == (
        "2 of 15 images are missing or empty, first: dtd/images/banded/banded_0002.jpg (no such file or directory)",
    )


@pytest.mark.slow
def test_borrowed_images_belong_to_the_report_of_their_dataset(configured, tree, tmp_path):
    for folder in ("imagenet", "imagenet-adversarial"):
        shutil.copytree(tree / folder, tmp_path / folder)
    (tmp_path / "imagenet/images/train/n01608432/n01608432_1.JPEG").write_bytes(b"")
    problems = {
        name: check.examine(configured(name, root=str(tmp_path), published={})).problems
        for name in ("imagenet", "imagenet_a")
    }
    assert problems == {
        "imagenet": (
            "1 of 20 images is missing or empty, first: imagenet/images/train/n01608432/n01608432_1.JPEG (an empty file)",
        ),
        "imagenet_a": (),
    }


def test_a_missing_split_file_is_a_problem(configured, tree, tmp_path):
    shutil.copytree(tree / "dtd", tmp_path / "dtd", ignore=shutil.ignore_patterns("*.json"))
    report = check.examine(configured("dtd", root=str(tmp_path)))
    assert report.found and report.problems[0].endswith("published results have")
    (line,) = check.lines([report])
    assert line.startswith("dtd: ") and line.count("docs/datasets.md#dtd") == 1 and line.count("dtd: ") == 1


@pytest.mark.slow
def test_the_command(tree, tmp_path, capsys, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.setenv("DATA", str(tmp_path))
    assert check.main(["digits", "dtd", "eurosat"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"│ digits +│ found +│ own split +│ +10 │ 1,797 │ +– │ +– │ +ok │", output)
    assert "missing: dtd, eurosat; docs/datasets.md" in output
    assert check.main(["folder", "digits"]) == 1
    assert "folder: " in capsys.readouterr().out


def test_overrides(configured, tree, tmp_path, monkeypatch, capsys):
    shutil.copytree(tree / "dtd", tmp_path / "dtd", ignore=shutil.ignore_patterns("*.json"))
    monkeypatch.setenv("DATA", str(tmp_path))
    check.main(["dtd", "data.allow_fallback_split=true"])
    assert "│ fallback split │" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar"], "there is no data=cifar; there are caltech101"),
        (["dtd", "data.rot=x"], "rot"),
        (["dtd", "data.source=net"], "data.source=net: choose one of local, hub"),
    ],
    ids=["name", "key", "value"],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        check.main(arguments)
    assert "\n" not in str(error.value)


def test_without_a_folder_of_datasets(monkeypatch):
    monkeypatch.delenv("DATA", raising=False)
    with pytest.raises(UserError, match="DATA is not set"):
        check.main(["dtd"])


def test_the_make_target_names_the_folder():
    def make(*arguments):
        # this suite may itself run under make, which tells its children where it is
        alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, env=alone).stdout

    assert make("-n", "data-check", "DATA=/data").strip().splitlines()[-1] == ".venv/bin/python -m common.data.check"
    assert re.search(r"data-check\s.*DATA=", make())


@pytest.mark.parametrize("name", NAMES)
def test_every_dataset_has_its_section(name):
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "datasets.md").read_text(), re.MULTILINE)
    assert headings.count(name) == 1


def test_the_page_has_no_section_too_many():
    page = (ROOT / "docs" / "datasets.md").read_text()
    first = re.findall(r"^## (.+)$", page[: page.index("# What a run does")], re.MULTILINE)
    assert sorted(first) == NAMES
    links = set(re.findall(r"\]\(#(\w+)\)", page))
    assert links <= set(NAMES) and len(links) >= len(NAMES)
