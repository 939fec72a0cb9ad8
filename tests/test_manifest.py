"""What was asked about what, frozen."""

from __future__ import annotations

import json

import pytest

from common.config.composition import validate
from common.data import manifest, task
from common.types import UserError
from tests.conftest import prompts_of


def data_of(compose, *overrides):
    return task.build(validate(compose(*overrides)))


def test_manifest_is_the_same_everywhere(compose):
    # a change of the picks, the class lists or the wording changes every published number: these hashes notice it
    found = data_of(compose, "shots=4").manifest
    assert found["fingerprint"] == "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
    train = found["splits"]["train"]
    assert train["items_sha256"] == "332e54a0253ea6edda27fa8a1fe03827a98409636ff21ef522600c17c1ea289b"
    hashes = prompts_of(validate(compose("shots=4"))).hashes()
    assert hashes["train"] == "1dbc3579231e265b717669ec57610d763a60209e4db08961603ac8b351e64583"


@pytest.mark.sampled
@pytest.mark.parametrize("change", ["shots=4", "seed=2", "validation=none"])
def test_any_change_of_the_task_changes_the_hash(compose, change):
    assert data_of(compose).manifest["hash"] != data_of(compose, change).manifest["hash"]


@pytest.mark.sampled
@pytest.mark.parametrize("change", ["method=clsrl", "data.question=Which digit?", "seed=2"])
def test_any_change_of_what_is_asked_changes_the_hash_of_the_prompts(compose, change):
    assert prompts_of(validate(compose())).hashes() != prompts_of(validate(compose(change))).hashes()


def test_verify_accepts_the_same_task(compose, tmp_path):
    q = data_of(compose, "shots=2")
    path = tmp_path / "manifest.json"
    manifest.write(q.manifest, path)
    assert json.loads(path.read_text()) == q.manifest
    manifest.verify(path, q.manifest)


@pytest.mark.slow
def test_verify_names_what_differs(compose, tmp_path):
    path = tmp_path / "manifest.json"
    manifest.write(data_of(compose, "shots=2").manifest, path)
    with pytest.raises(UserError, match="froze another task: the images of split 'train' differ"):
        manifest.verify(path, data_of(compose, "shots=2", "seed=2").manifest)


@pytest.mark.slow
def test_a_run_that_goes_on_asks_what_it_asked(compose, tmp_path):
    asked, other = (prompts_of(validate(compose("shots=2", *method))) for method in ([], ["method=clsrl"]))
    manifest.freeze_prompts(tmp_path, asked.hashes(), {})
    manifest.freeze_prompts(tmp_path, asked.hashes(), {})
    with pytest.raises(UserError, match="prompts.json froze other prompts for split 'train' than this configuration"):
        manifest.freeze_prompts(tmp_path, other.hashes(), {})


def test_an_edited_manifest_is_noticed(compose, tmp_path):
    q = data_of(compose, "shots=2")
    path = tmp_path / "manifest.json"
    manifest.write(q.manifest, path)
    first = q.task.train.items[0].image
    path.write_text(path.read_text().replace(f'["{first}", 0]', f'["{first}", 1]', 1))
    with pytest.raises(UserError, match="was changed after the run began"):
        manifest.verify(path, q.manifest)


def test_contents_are_no_part_of_the_hash(compose, tmp_path):
    found = data_of(compose, "shots=2")
    full = manifest.with_contents(found.manifest, {image: image for image in found.images})
    assert full["hash"] == found.manifest["hash"] == manifest.digest(manifest.defining(full))
    manifest.write(full, tmp_path / "manifest.json")
    assert json.loads((tmp_path / "manifest.json").read_text()) == full
    manifest.verify(tmp_path / "manifest.json", found.manifest)  # of an earlier version
    manifest.verify(tmp_path / "manifest.json", full)


def test_verify_names_pictures_that_have_changed_under_their_names(compose, tmp_path):
    found, path = data_of(compose, "shots=2"), tmp_path / "manifest.json"
    stamps = {image: image for image in found.images}
    manifest.write(manifest.with_contents(found.manifest, stamps), path)
    first, second = found.images[:2]
    now = manifest.with_contents(found.manifest, {**stamps, second: "other"})
    with pytest.raises(UserError, match=f"^1 of 1,797 pictures .first: {second}. has changed since .*run_name=<name>$"):
        manifest.verify(path, now)
    now = manifest.with_contents(found.manifest, {**stamps, first: "other", second: "other"})
    with pytest.raises(
        UserError, match="the run is finished, but 2 of 1,797 pictures .* have changed since; .*run_name"
    ):
        manifest.verify_finished(path, now)
    del stamps[first]  # it is gone
    with pytest.raises(UserError, match=f"1 of 1,797 pictures .first: {first}. has changed since"):
        manifest.verify_finished(path, manifest.with_contents(found.manifest, stamps))
    other = data_of(compose, "shots=2", "seed=2").manifest
    with pytest.raises(UserError, match="the run is finished, but 'train' has other images or labels now"):
        manifest.verify_finished(path, other)
    less = {**found.manifest, "splits": {"train": found.manifest["splits"]["train"]}}
    with pytest.raises(UserError, match="'test' has other images or labels now, first: "):
        manifest.verify_finished(path, less)
