"""Names as they are shown, other words for them, and ImageNet's two generated files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import pytest

from common.data import names, wordnet
from common.parsing import normalize
from common.types import UserError

needs_open_clip = pytest.mark.skipif(find_spec("open_clip") is None, reason="open_clip_torch is not installed")


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("yin_yang", "yin yang"),
        ("  Sea   or Lake\t", "Sea or Lake"),
        ("outdoor apartment_building", "outdoor apartment building"),
        ("polka-dotted", "polka-dotted"),
        ("kite (bird of prey)", "kite (bird of prey)"),
        ("2012 Ram C/V Cargo Van Minivan", "2012 Ram C/V Cargo Van Minivan"),
        ("_a__b_", "a b"),
    ],
    ids=lambda text: repr(text),
)
def test_display(raw, shown):
    assert names.display(raw) == shown


def aliases_file(tmp_path, content):
    path = tmp_path / "aliases.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_aliases_are_found_by_normalised_name(tmp_path):
    path = aliases_file(tmp_path, {"Sea_or_Lake": ["ocean", "Sea or lake", "Water"], "forest": ["wood"]})
    found = names.read_aliases(path, ["Forest", "Sea or Lake", "River"])
    assert found == {"Sea or Lake": ("ocean", "Water"), "Forest": ("wood",)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"Desert": ["sand"]}, "no class 'Desert'"),
        ({"Forest": ["the river", "RIVER"]}, "'RIVER' of class 'Forest' means class 'River' too"),
        ({"Forest": ["green"], "River": ["Green"]}, "'Green' of class 'River' means class 'Forest' too"),
        ({"Forest": "wood"}, "'Forest' must have a list of words, not \"wood\""),
        ({"Forest": ["wood", ""]}, "'Forest' must have a list of words"),
        (["Forest"], "must be an object"),
        ("{", "is not JSON"),
        (None, "cannot be read: No such file"),
    ],
    ids=["unknown class", "other class", "two classes", "no list", "empty word", "no object", "no JSON", "no file"],
)
def test_wrong_aliases_are_named(tmp_path, content, message):
    path = tmp_path / "aliases.json" if content is None else aliases_file(tmp_path, content)
    with pytest.raises(UserError, match=message) as error:
        names.read_aliases(path, ["Forest", "River"])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_wordnet_ids():
    everything = wordnet.wnids()
    assert len(everything) == 1000 and list(everything) == sorted(everything)
    for subset in ("imagenet_a", "imagenet_r"):
        assert len(wordnet.wnids(subset)) == 200 and set(wordnet.wnids(subset)) < set(everything)
    assert wordnet.synonyms()["n01440764"] == "tench, Tinca tinca"
    assert wordnet.synonyms().keys() == set(everything)


def test_synonyms_that_could_mean_two_classes_are_dropped(monkeypatch):
    words = {"n1": "hen, chicken", "n2": "cock, chicken, rooster", "n3": "Missile, rocket", "n4": "projectile, missile"}
    monkeypatch.setattr(wordnet, "synonyms", lambda: words)
    found = names.wordnet_aliases({"n1": "hen", "n2": "rooster", "n3": "missile", "n4": "missile"})
    assert found == {"rooster": ["cock"], "missile": ["rocket", "projectile"]}


@needs_open_clip
def test_classnames_file(tmp_path):
    path = tmp_path / "classnames.txt"
    names.main(["classnames", str(path)])
    rows = [line.split(" ", 1) for line in path.read_text().splitlines()]
    assert len(rows) == 1000 and rows[0] == ["n01440764", "tench"] and rows[-1] == ["n15075141", "toilet paper"]
    assert [wnid for wnid, _ in rows] == sorted(wnid for wnid, _ in rows)
    assert [name for name, count in Counter(name for _, name in rows).items() if count > 1] == ["missile", "sunglasses"]
    places = {name: [label for label, row in enumerate(rows) if row[1] == name] for name in ("missile", "sunglasses")}
    assert places == {"missile": [657, 744], "sunglasses": [836, 837]}
    assert rows[21][1] == "kite (bird of prey)"


@needs_open_clip
@pytest.mark.parametrize("subset", ["imagenet", "imagenet_a", "imagenet_r"])
def test_aliases_file_is_one_that_can_be_read(tmp_path, subset):
    path = tmp_path / "aliases.json"
    names.main(["aliases", str(path), "--subset", subset])
    everything = names.imagenet_names()
    offered = [names.display(everything[wnid]) for wnid in wordnet.wnids(subset)]
    found = names.read_aliases(path, offered)
    assert len(found) >= len(offered) / 2
    taken = {normalize(name) for name in offered}
    assert not [word for words in found.values() for word in words if normalize(word) in taken]
    if subset == "imagenet":
        assert found["tench"] == ("Tinca tinca",) and found["missile"] == ("projectile",)


@needs_open_clip
def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "classnames.txt"
    path.write_text("mine")
    with pytest.raises(SystemExit, match="exists already"):
        names.main(["classnames", str(path)])
    assert path.read_text() == "mine"


def test_missing_package_is_one_line(tmp_path):
    code = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name: None if name == 'open_clip' else find(name);"
        "from common.data import names; names.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "classnames", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install open_clip_torch" in done.stderr and not (tmp_path / "file").exists()
