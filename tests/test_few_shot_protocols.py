"""Few-shot learners under `clean` and `official`: where the authors' code differs, and what is the same in both."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from common.config.composition import validate
from common.data import task as tasks
from common.few_shot.check import check_fit, make
from common.few_shot.heads import cafo, clip_adapter, linear_probe, tip_adapter
from common.few_shot.heads.base import Pictures, Plan, fit
from common.few_shot.heads.search import Found
from common.few_shot.learner import FeatureExtractor
from tests import data_tree
from tests.test_few_shot import KEYS, LEARNERS, PLAN, VIEWS, C, N, task, world  # noqa: F401

CACHED = ("tip_adapter_f", "cafo")


# --- what a picture is remembered by, and what it is trained on


@pytest.mark.sampled
@pytest.mark.parametrize("views", [VIEWS, None])
@pytest.mark.parametrize("name", [*CACHED, "clip_adapter"])
def test_no_epoch_shows_what_keys_are_made_of(world, name, views):  # noqa: F811
    """The authors draw views for the keys and others for every epoch. Two are of the keys; four epochs."""
    train, _, text, _ = world
    asked = []

    def view(number):
        asked.append(number)
        return train.view(number % (2 + VIEWS))

    learner = LEARNERS[name]()
    fit(learner, type(train)(train.seen, view, views), None, text)
    kept = [0, 1] if name in CACHED else []
    assert asked == [*kept, *(len(kept) + (e if views is None else e % views) for e in range(4))]


@pytest.mark.parametrize("name", CACHED)
def test_a_picture_is_not_its_own_key(world, name):  # noqa: F811
    """With one view for the keys, the very view that they are made of would have cosine 1 to its own."""
    train, _, text, _ = world
    learner = {"tip_adapter_f": tip_adapter.TipAdapterF, "cafo": cafo.CaFo}[name](
        seed=1, **PLAN, **KEYS | {"key_views": 1}
    )
    learner.begin(train, None, text)
    keys = learner.module.keys()[0].values.detach().flatten(0, 1)
    own = (normalize(learner.pictures(train, 0).images, dim=1) * keys).sum(1)
    assert float(own.max()) < 0.999
    same = (normalize(train.view(0).images, dim=1) * keys).sum(1)
    torch.testing.assert_close(same, torch.ones(N))


@pytest.mark.parametrize("pictures", [1, 31, 32, 33, 63, 64, 160])
def test_the_last_batch_is_dropped_as_dassl_drops_it(pictures):
    """dassl/data/data_manager.py: drop_last=is_train and len(data_source) >= batch_size."""
    loader = DataLoader(list(range(pictures)), 32, drop_last=pictures >= 32)
    assert Plan("sgd", 1, 32, 1.0, 0.0, drop_last=True).batches(pictures) == len(loader)
    assert Plan("sgd", 1, 32, 1.0, 0.0).batches(pictures) == len(DataLoader(list(range(pictures)), 32))


def test_what_an_epoch_saw_is_what_its_accuracy_is_of(world, monkeypatch):  # noqa: F811
    train, _, text, _ = world
    monkeypatch.setattr(
        "common.few_shot.heads.base.descend", lambda optimizer, logits, labels, rate, penalty: (0.0, len(labels))
    )
    learner = clip_adapter.ClipAdapter(seed=1, **PLAN, ratio=0.3, drop_last=True)
    learner.begin(train, None, text)
    assert learner.step(0)["train/accuracy"] == 1.0, "ten of twelve, all right"


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("learner", "own", "clip", "expected"),
    [
        ("coop", (0.08, 1.0), None, (0.08, 1.0)),
        ("clip_adapter", (0.08, 1.0), None, (0.08, 1.0)),
        ("tip_adapter_f", (0.5, 1.0), None, (0.5, 1.0)),
        ("cafo", (0.5, 1.0), None, (0.5, 1.0)),
        ("coop", (0.08, 1.0), [0.8, 1.0], (0.8, 1.0)),
    ],
)
def test_random_views_cover_what_the_learners_authors_crop(compose, task, learner, own, clip, expected):  # noqa: F811
    """Dassl's default for those that its trainer trains, Tip-Adapter's and CaFo's own; `clip.crop` for all of them."""
    config = validate(compose(f"method={learner}", "clip=rn50", *([] if clip is None else [f"clip.crop={clip}"])))
    made, seen = make(config), []
    assert made.crop == own
    extractor = FeatureExtractor.__new__(FeatureExtractor)
    extractor.config, extractor.crop, extractor.clip, extractor.needs = config, made.crop, object(), made.needs
    extractor.device = torch.device("cpu")
    extractor._rows = lambda images, items, view, maps: seen.append(view) or [torch.zeros(len(items), 2), None, None]
    extractor.support(task()).view(3)
    assert [each.scale for each in seen if each.number >= 0] == [expected]


def test_the_tiny_clip_keeps_its_own_crop(compose):
    assert validate(compose("method=coop")).clip.crop == [0.8, 1.0], "less of 32 pixels is another picture"


# --- the two protocols


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "official"),
    [("tip_adapter", "full"), ("tip_adapter_f", "full"), ("cafo", "full"), ("linear_probe", "few"), ("coop", "few")],
)
def test_validation_is_what_the_authors_search_on(compose, method, official):
    """DTD at one shot: CoOp draws one picture of each of the 47 classes; Tip-Adapter and CaFo take all 1,128."""
    clean, paper = (compose(f"method={method}", f"protocol={p}") for p in ("clean", "official"))
    assert (clean.validation, clean.selection) == ("held_out", "val")
    assert (paper.validation, paper.selection) == (official, "paper")
    assert (paper.sampler, paper.protocol.test_rows) == ("coop", "test"), "CLS-RL's are not theirs"


def test_what_a_user_types_wins_over_the_protocol(compose):
    assert compose("method=cafo", "selection=paper").validation == "full"
    typed = compose("method=cafo", "protocol=official", "validation=none", "selection=val", "clip.views=3")
    assert (typed.validation, typed.selection, typed.clip.views) == ("none", "val", 3)


@pytest.mark.slow
def test_official_is_the_authors_training(compose):
    def both(name):
        return (validate(compose(f"method={name}", "clip=rn50", f"protocol={p}")) for p in ("official", "clean"))

    for name in ("coop", "clip_adapter", "vt_clip", "calip_fs"):
        official, clean = both(name)
        assert official.few_shot["drop_last"] is True and clean.few_shot["drop_last"] is False
    official, clean = both("cafo")
    assert (official.few_shot["scheduler"], clean.few_shot["scheduler"]) == ("paper", "proper")
    assert (official.clip.views, official.visual.views) == (None, None), "another view in every epoch"
    assert (clean.clip.views, clean.visual.views) == (20, 20)


@pytest.mark.slow
def test_clip_adapters_code_has_one_template_for_imagenet(compose):
    def templates(*words):
        return list(compose("data=imagenet", "clip=rn50", *words).clip.templates)

    one = ["a photo of a {}."]
    assert templates("method=clip_adapter", "protocol=official") == one
    for words in (["method=clip_adapter"], ["method=tip_adapter_f", "protocol=official"]):
        assert len(templates(*words)) == 7, words
    assert templates("method=clip_adapter", "protocol=official", "clip.templates=['{} here']") == ["{} here"]


@pytest.mark.slow
def test_the_language_models_protocols_are_as_they_were(compose):
    official = validate(compose("method=clsrl", "protocol=official"))
    assert (official.sampler, official.protocol.test_rows, official.selection) == ("clsrl", "val_and_test", "val")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["selection=paper"], ["protocol=official"]])
def test_imagenet_has_no_validation_images_for_the_authors(compose, tmp_path, words):
    """They search on its test images; with `selection=val`, training images are held out."""
    asked = ["method=cafo", "data=imagenet", f"data.root={data_tree.build(tmp_path)}", "shots=1"]
    by_val, by_paper = (tasks.build(validate(compose(*asked, *more))).task for more in ([], words))
    assert set(by_val.evaluation) == {"val", "test"} and set(by_paper.evaluation) == {"test"}
    whole = tasks.build(validate(compose("method=cafo", "data=dtd", f"data.root={tmp_path}", "shots=1", *words))).task
    assert set(whole.evaluation) == {"val", "test"}


# --- what is searched on, with which keys


@pytest.mark.parametrize(
    ("val_there", "by_paper", "searched_on", "keys"),
    [
        (True, False, "val", "trained"),
        (True, True, "val", "initial"),  # CaFo's main.py searches without the adapters, before it applies them
        (False, True, "test", "trained"),  # its main_imagenet.py with them
    ],
)
def test_cafo_searches_as_its_authors_do_or_with_what_is_tested(
    world,  # noqa: F811
    monkeypatch,
    val_there,
    by_paper,
    searched_on,
    keys,
):
    train, val, text, test = world
    learner, seen = LEARNERS["cafo"](), []

    def search(vote, pictures, asked):
        seen.append((pictures, [v.detach().clone() for v in learner.module.values]))
        return Found(1.0, 1.0, 0.5)

    monkeypatch.setattr(learner.mix, "search", search)
    fit(learner, train, val if val_there else None, text, test if by_paper else None)
    (asked, used), (end, begun) = seen[0], (learner.module.values, learner.begun)
    assert len(seen) == 1 and asked is (val if searched_on == "val" else test)
    for number, value in enumerate(used):
        assert not torch.equal(end[number], begun[f"values.{number}"]), "the training moved them"
        assert torch.equal(value, end[number] if keys == "trained" else begun[f"values.{number}"])


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize(("accuracies", "kept"), [([0.7, 0.7], False), ([0.7, 0.8], True), ([0.7, 0.6], False)])
def test_a_search_that_is_not_better_changes_nothing(world, monkeypatch, name, accuracies, kept):  # noqa: F811
    """main.py: max(best_acc, acc), so of equal ones what was trained with stays."""
    train, val, text, _ = world
    learner, told = LEARNERS[name](), iter(accuracies)
    learner.begin(train, val, text)
    learner.step(0)
    monkeypatch.setattr(learner, "search", lambda pictures: Found(1.25, 2.5, 0.9))
    monkeypatch.setattr("common.few_shot.heads.tip_adapter.accuracy", lambda *_: next(told))
    facts = learner.end()
    expected = (1.25, 2.5) if kept else (KEYS["alpha"], KEYS["beta"])
    assert (facts["alpha"], facts["beta"], facts["searched"]) == (*expected, kept)
    assert (learner.mix.alpha, learner.mix.beta) == expected


def test_the_probe_searches_on_a_few_test_pictures_where_its_authors_have_no_others(world, monkeypatch):  # noqa: F811
    """CoOp's ImageNet gives its test split as `val`; lpclip draws min(shots, 4) of each class from it."""
    train, val, text, test = world
    asked = []

    def search(judge):
        judge(1.0)
        return linear_probe.Trace(((1.0, 0.5),), 1.0)

    monkeypatch.setattr(linear_probe, "search", search)
    kept = linear_probe.Probe.logits
    monkeypatch.setattr(linear_probe.Probe, "logits", lambda self, images: asked.append(images) or kept(self, images))
    for there, given in ((None, test), (val, test), (val, None)):
        learner = linear_probe.LinearProbe(seed=1)
        fit(learner, train, there, text, given)
        assert learner.chosen_by_test is (there is None)
    few, own, plain = asked
    assert len(few) == 4 * C and torch.equal(own, val.images) and torch.equal(plain, val.images)
    labels = [int(test.labels[(test.images == row).all(1)][0]) for row in few]
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert not linear_probe.LinearProbe(seed=1, strength=1.0).chosen_by_test


def test_the_draw_of_test_pictures_is_of_the_seed():
    pictures = Pictures(torch.arange(40.0)[:, None], torch.arange(40) % 5)
    first, again, other = (linear_probe.some_of_each(pictures, 3, seed).images.flatten().tolist() for seed in (1, 1, 2))
    assert first == again != other and sorted(first) == first
    assert sorted(int(each) % 5 for each in first) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert len(linear_probe.some_of_each(pictures, 99, 1)) == 40


def test_a_search_needs_no_validation_pictures_where_it_takes_test_pictures(compose, task):  # noqa: F811
    check_fit(validate(compose("method=linear_probe", "selection=paper")), task())
