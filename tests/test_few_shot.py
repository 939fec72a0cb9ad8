"""Few-shot learners as classes: what they fit and choose, against plain loops; their state; what is refused early."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from torch.nn.functional import cross_entropy, normalize

from common.config.composition import validate
from common.evaluation.metrics import summarize
from common.few_shot.check import check, check_fit
from common.few_shot.encoders import tiny
from common.few_shot.heads import (
    ape,
    cafo,
    calip_fs,
    clap,
    clip_adapter,
    coop,
    cross_modal,
    linear_probe,
    lp_plus_plus,
    nearest_mean,
    proker,
    search,
    timo,
    tip_adapter,
    vt_clip,
)
from common.few_shot.heads import keys as keys_
from common.few_shot.heads.base import (
    GradientHead,
    Pictures,
    Plan,
    Support,
    Text,
    accuracy,
    all_logits,
    batches,
    cosine_logits,
    fit,
)
from common.few_shot.learner import probabilities
from common.types import Answers, Item, Prediction, Split, Task, UserError
from tests import encoders

N, C, D, P, D2, VIEWS = 12, 3, 8, 4, 6, 3
NAMES = ("red", "green", "blue")
PLAN = {"epochs": 4, "batch": 5, "learning_rate": 0.01, "weight_decay": 0.01}
KEYS = {"alpha": 2.0, "beta": 1.5, "search_scale": [4, 3], "key_views": 2}


@pytest.fixture
def world():
    """Features of three classes that overlap: support, validation and test pictures, and texts near the classes."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    centres, second, per = draw(C, D), draw(C, D2), draw(C, D)

    def pictures(labels, spread=1.0, maps=True):
        images = centres[labels] + spread * draw(len(labels), D)
        return Pictures(
            images, labels, draw(len(labels), P, D) if maps else None, second[labels] + draw(len(labels), D2)
        )

    labels = torch.arange(C).repeat_interleave(N // C)
    views = [pictures(labels, maps=False) for _ in range(VIEWS)]
    train = Support(pictures(labels), views.__getitem__, VIEWS)
    prompts = tuple(3 * (row + draw(2, D) / 4) for row in normalize(centres + 2 * per, dim=1))
    text = Text(NAMES, normalize(centres + 2 * per, dim=1), None, prompts)
    val, test = (pictures(torch.arange(C).repeat(20)) for _ in range(2))
    views += [
        pictures(labels, maps=False) for _ in range(KEYS["key_views"])
    ]  # those that keys are made of are no others
    return train, val, text, test


LEARNERS = {
    "nearest_mean": lambda: nearest_mean.NearestMean(seed=1),
    "linear_probe": lambda: linear_probe.LinearProbe(seed=1),
    "clip_adapter": lambda: clip_adapter.ClipAdapter(seed=1, **PLAN, ratio=0.3),
    "vt_clip": lambda: vt_clip.VTClip(seed=1, **PLAN, heads=2),
    "calip_fs": lambda: calip_fs.CalipFS(seed=1, **PLAN, betas=[1, 1, 0.1], hidden=5),
    "tip_adapter": lambda: tip_adapter.TipAdapter(seed=1, **KEYS),
    "tip_adapter_f": lambda: tip_adapter.TipAdapterF(seed=1, **PLAN, **KEYS),
    "cafo": lambda: cafo.CaFo(seed=1, **PLAN, **KEYS),
    "lp_plus_plus": lambda: lp_plus_plus.LPPlusPlus(seed=1, epochs=30),
    "proker": lambda: proker.ProKeR(seed=1, beta=1.7, lmbda=0.1),
    "clap": lambda: clap.CLAP(seed=1, **PLAN),
    "cross_modal": lambda: cross_modal.CrossModal(
        seed=1, iterations=300, batch=8, learning_rate=1e-2, weight_decay=0.01
    ),
    "ape": lambda: ape.APE(
        seed=1, alpha=1.0, beta=1.0, gamma=0.1, search_scale=[7, 7, 1], share=0.7, similarity=0.5, key_views=2
    ),
    "ape_t": lambda: ape.APET(seed=1, **PLAN, **KEYS, eps=1e-3, share=0.7, similarity=0.2),
    "timo": lambda: timo.TIMO(seed=1, alpha=1.0, gamma=50.0, key_views=2),
    "timo_s": lambda: timo.TIMO(seed=1, alpha=1.0, gamma=50.0, key_views=2, search_prompts=True),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_fit_is_better_than_zero_shot(world, name):
    """Texts that are half wrong: whoever sees shots is better on pictures that nobody has chosen by."""
    train, val, text, test = world
    learner = LEARNERS[name]()
    base = float((cosine_logits(test.images, text.known).argmax(1) == test.labels).float().mean())
    assert accuracy(learner, test, text) == base or "maps" in learner.needs, "it begins as zero-shot CLIP"
    fit(learner, train, val, text)
    assert accuracy(learner, test, text) > base


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_an_interrupted_fit_ends_as_if_nothing_had_happened(world, name, tmp_path):
    train, val, text, test = world
    whole, first, second = (LEARNERS[name]() for _ in range(3))
    facts = fit(whole, train, val, text)
    stop = max(1, first.steps // 2)
    first.begin(train, val, text)
    for number in range(stop):
        first.step(number)
    torch.save(first.state(), tmp_path / "s.pt")
    second.begin(train, val, text)
    second.restore(torch.load(tmp_path / "s.pt"))
    for number in range(stop, second.steps):
        second.step(number)
    again = second.end()
    assert again == facts
    assert torch.equal(all_logits(second, test, text), all_logits(whole, test, text))


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("uneven", [False, True])
def test_a_head_answers_as_what_it_was_taken_from(world, name, uneven, tmp_path):
    """Without a picture of the training; read as plain tensors. `uneven`: a class has a picture fewer than the others."""
    train, val, text, test = world
    few = slice(1, None) if uneven else slice(None)
    shots = Support(train.seen.take(few), lambda number: train.view(number).take(few), VIEWS)
    fitted, asked = LEARNERS[name](), LEARNERS[name]()
    fit(fitted, shots, val, text)
    torch.save(fitted.head(), tmp_path / "head.pt")
    asked.ready(torch.load(tmp_path / "head.pt", weights_only=True), text)
    assert torch.equal(all_logits(asked, test, text), all_logits(fitted, test, text))
    if name in ("tip_adapter_f", "cafo", "clip_adapter"):
        assert "optimizer" not in fitted.head() and "optimizer" in fitted.state()


def test_a_head_of_coop_is_its_context_alone():
    clip, images = encoders.clip(), torch.randn(6, tiny.EMBEDDING, generator=torch.Generator().manual_seed(2))
    text, seen = Text(("ox", "green"), None, clip), Pictures(images, torch.arange(6) % 2)
    plan = {"epochs": 2, "batch": 4, "learning_rate": 0.05, "weight_decay": 0.0, "length": 2}
    fitted, asked = (coop.CoOp(seed=1, **plan) for _ in range(2))
    fit(fitted, Support(seen, lambda number: seen, 1), None, text)
    assert {name: value.shape for name, value in fitted.head()["module"].items()} == {
        "context": (2, tiny.TEXT["width"])
    }
    asked.ready(fitted.head(), text)
    for names in (("ox", "green"), ("green", "red", "ox")):
        other = Text(names, None, clip)
        assert torch.equal(all_logits(asked, seen, other), all_logits(fitted, seen, other))


def test_keys_are_trained_as_a_plain_loop_trains_them(world):
    """Tip-Adapter-F: AdamW with the authors' eps, a cosine by batch, another view in each epoch."""
    train, _, text, test = world
    learner = LEARNERS["tip_adapter_f"]()
    fit(learner, train, None, text)
    mean = (train.view(0).images + train.view(1).images) / 2
    keys = normalize(mean, dim=1).clone().requires_grad_(True)
    onehot = torch.eye(C)[train.seen.labels]
    optimizer = torch.optim.AdamW([keys], lr=0.01, eps=1e-4, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * 3)

    def logits(images):
        near = normalize(images, dim=1) @ keys.T
        return 100 * normalize(images, dim=1) @ text.weights.T + 2.0 * torch.exp(-1.5 * (1 - near)) @ onehot

    for epoch in range(4):
        view = train.view(2 + epoch % VIEWS)  # the first two are what the keys are made of
        for index in batches(N, 5, 1, epoch):
            loss = cross_entropy(logits(view.images[index]), view.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(all_logits(learner, test, text), logits(test.images).detach(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_adapter_is_trained_as_a_plain_loop_trains_it(world, drop_last):
    """CLIP-Adapter: SGD with momentum, CoOp's rates by epoch; the first epoch at 1e-5; 12 pictures are 5 + 5 (+ 2)."""
    train, _, text, test = world
    learner = clip_adapter.ClipAdapter(seed=1, **PLAN, ratio=0.3, drop_last=drop_last)
    fit(learner, train, None, text)
    plain = clip_adapter.ClipAdapter(seed=1, **PLAN, ratio=0.3)
    plain.begin(train, None, text)
    down, up = (plain.module.layers[i].weight.detach().clone().requires_grad_(True) for i in (0, 2))
    optimizer = torch.optim.SGD([down, up], lr=0.01, momentum=0.9, weight_decay=0.01)

    def logits(images):
        mixed = 0.3 * torch.relu(torch.relu(images @ down.T) @ up.T) + 0.7 * images
        return 100 * normalize(mixed, dim=1) @ text.weights.T

    for epoch in range(4):
        rate = 1e-5 if epoch == 0 else 0.005 * (1 + np.cos(np.pi * (epoch - 1) / 4))
        optimizer.param_groups[0]["lr"] = rate
        view = train.view(epoch % VIEWS)
        for index in list(batches(N, 5, 1, epoch))[: 2 if drop_last else 3]:
            optimizer.zero_grad()
            cross_entropy(logits(view.images[index]), view.labels[index]).backward()
            optimizer.step()
    torch.testing.assert_close(all_logits(learner, test, text), logits(test.images).detach(), atol=2e-3, rtol=1e-4)


def test_cafo_without_its_generated_pictures_says_so():
    """Its published accuracies are with them, so a table has to mark ours."""
    assert "generated" in cafo.CaFo(seed=1, **PLAN, **KEYS).remark
    assert "generated" in cafo.CaFo(seed=1, **PLAN, **KEYS, generated="drawn").remark, "none of a class"
    assert cafo.CaFo(seed=1, **PLAN, **KEYS, generated="drawn", per_class=2).remark == ""


@pytest.mark.parametrize("scheduler", ["paper", "proper"])
def test_generated_pictures_move_the_cosine_as_in_cafos_code(world, scheduler):
    """torch's own schedule, made for the real batches (or all) and stepped on real and generated ones."""
    train, _, text, _ = world
    whole = Support(
        train.seen,
        train.view,
        VIEWS,
        generated=Support(train.seen.take(slice(0, 12, 2)), lambda n: train.view(n).take(slice(0, 12, 2)), VIEWS),
    )
    learner = cafo.CaFo(seed=1, **PLAN, **KEYS, scheduler=scheduler)
    learner.begin(whole, None, text)
    got = [learner.step(number)["learning_rate"] for number in range(4)]  # of the last batch of each epoch
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    made_for = 4 * 3 if scheduler == "paper" else 4 * 5
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, made_for)
    rates = []
    for _ in range(4 * 5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        expected.step()
    assert got == pytest.approx(rates[4::5], abs=1e-9)
    assert learner.module.values[0].shape == (C, 4 + 2, D) and learner.module.values[1].shape == (C, 4 + 2, D2)


def test_published_schedules_of_cafo():
    """16 shots of ImageNet: 63 real and 8 generated batches; the rate is 0 at batch 1260 and rises to 3.9e-5."""
    plan = Plan("adamw", 20, 256, 1e-3, 0.01)
    assert plan.rate(0, 0, 1260) == 1e-3 and plan.rate(0, 1260, 1260) == pytest.approx(0, abs=1e-12)
    assert plan.rate(0, 1420 - 1, 1260) == pytest.approx(3.9e-5, abs=1e-6)
    # 1 shot: 4 real and 32 generated batches, 80 a half period
    assert [plan.rate(0, n, 80) for n in (0, 80, 160, 720)] == pytest.approx(
        [1e-3, 0, 1e-3, 0 if (720 // 80) % 2 else 1e-3]
    )


def test_the_best_epoch_and_the_searched_pair_are_chosen_by_the_judges(world):
    train, val, text, test = world
    by_val, by_test = LEARNERS["tip_adapter_f"](), LEARNERS["tip_adapter_f"]()
    seen = []
    by_val.begin(train, val, text)
    for number in range(by_val.steps):
        seen.append(by_val.step(number)["selection/accuracy"])
    facts = by_val.end()
    assert facts["epoch"] == int(np.argmax(seen)) + 1 and facts["selection_accuracy"] == max(seen)
    assert accuracy(by_val, val, text) >= max(seen), "the search is kept only if it is better"
    fit(by_test, train, val, text, test)
    assert accuracy(by_test, test, text) >= accuracy(by_val, test, text), "chosen by the test pictures themselves"


def test_the_first_best_epoch_is_kept_with_its_weights(world, monkeypatch):
    train, val, text, test = world
    learner, accuracies, seen = LEARNERS["tip_adapter_f"](), iter([0.2, 0.5, 0.5, 0.3]), []
    monkeypatch.setattr("common.few_shot.heads.base.accuracy", lambda *_: next(accuracies))
    learner.begin(train, val, text)
    for number in range(4):
        learner.step(number)
        seen.append(all_logits(learner, test, text))
    facts = GradientHead.end(learner)
    assert facts == {"epoch": 2, "selection_accuracy": 0.5}
    assert torch.equal(all_logits(learner, test, text), seen[1]) and not torch.equal(seen[1], seen[3])


def test_only_what_the_test_pictures_decide_is_said_to_be_decided_by_them(world):
    """Tip-Adapter's and the probe's search is on validation pictures where there are some; last epochs never ask them."""
    train, val, text, test = world
    said = {}
    for name, make in LEARNERS.items():
        for there in (val, None):
            learner = make()
            learner.begin(train, there, text, test)
            said[name, there is not None] = learner.chosen_by_test
            learner.begin(train, there, text)
            assert not learner.chosen_by_test
    by_test = {
        (name, False) for name in ("tip_adapter", "linear_probe", "ape", "ape_t", "timo", "timo_s", "proker")
    } | {(name, there) for name in ("tip_adapter_f", "cafo", "lp_plus_plus", "cross_modal") for there in (True, False)}
    assert {key for key, value in said.items() if value} == by_test
    on_val, by_paper = (LEARNERS["tip_adapter"]() for _ in range(2))
    assert fit(on_val, train, val, text) == fit(by_paper, train, val, text, test)


def test_without_pictures_to_choose_by_nothing_is_chosen(world):
    train, _, text, _ = world
    learner = LEARNERS["tip_adapter_f"]()
    assert fit(learner, train, None, text) == {"alpha": 2.0, "beta": 1.5, "searched": False}
    with pytest.raises(UserError, match=r"validation=held_out \(with fewer .*\), or few_shot.strength"):
        fit(LEARNERS["linear_probe"](), train, None, text)


def test_visual_learners_need_no_text(world):
    train, val, _, test = world
    alone = Text(NAMES)
    for name in ("nearest_mean", "linear_probe", "tip_adapter", "tip_adapter_f", "cafo"):
        learner = LEARNERS[name]()
        assert not learner.needs & {"text", "maps"}
        fit(learner, train, val, alone)
        assert accuracy(learner, test, alone) > 0.5, name
    tip = LEARNERS["tip_adapter"]()
    tip.begin(train, None, alone)
    tip.step(0)
    near = keys_.affinity(test.images, tip.keys)
    torch.testing.assert_close(tip.logits(test, alone), 2.0 * keys_.votes(near, 1.5))


def test_coop_trains_its_context_and_reads_other_names_with_it():
    clip, generator = encoders.clip(), torch.Generator().manual_seed(2)
    text = Text(NAMES, None, clip)
    images = torch.randn(9, clip.width, generator=generator)
    seen = Pictures(images, torch.arange(3).repeat(3))
    train = Support(seen, lambda number: seen, 1)
    plan = {"epochs": 6, "batch": 4, "learning_rate": 0.05, "weight_decay": 0.0}
    learner = coop.CoOp(seed=1, **plan, length=4)
    learner.begin(train, None, text)
    losses = [learner.step(number)["loss"] for number in range(6)]
    assert losses[-1] < losses[0] and [n for n, p in learner.module.named_parameters()] == ["context"]
    # by hand: start, context, the name's tokens, full stop, end
    ids = tiny.tokenize(["X X X X green."])
    embedded = clip.model.token_embedding(ids).clone()
    embedded[0, 1:5] = learner.module.context.detach()
    with torch.no_grad():
        expected = normalize(clip.read(embedded, ids.argmax(1)), dim=1)[0]
        logits = learner.logits(seen, text)[:, 1]
        torch.testing.assert_close(logits, 100 * normalize(images, dim=1) @ expected, atol=1e-3, rtol=1e-4)
        others = Text(("green", "ox"), None, clip)
        torch.testing.assert_close(learner.logits(seen, others)[:, 0], logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("position", "before"), [("front", 0), ("middle", 2)])
def test_the_name_may_stand_before_or_amid_the_context(position, before):
    clip, images = encoders.clip(), torch.randn(2, tiny.EMBEDDING, generator=torch.Generator().manual_seed(2))
    text, seen = Text(("ox", "green"), None, clip), Pictures(images, torch.tensor([0, 1]))
    plan = {"epochs": 1, "batch": 2, "learning_rate": 0.05, "weight_decay": 0.0}
    learner = coop.CoOp(seed=1, **plan, length=4, position=position)
    learner.begin(Support(seen, lambda number: seen, 1), None, text)
    token, context = clip.model.token_embedding, learner.module.context.detach()
    for column, name in enumerate(text.names):
        name_ids, stop = torch.tensor(tiny.encode(name)), torch.tensor([*tiny.encode("."), tiny.END])
        parts = [token(torch.tensor([tiny.START])), context[:before], token(name_ids), context[before:], token(stop)]
        row = torch.cat(parts)
        padded = torch.cat([row, token(torch.zeros(tiny.CONTEXT - len(row), dtype=torch.long))])[None]
        with torch.no_grad():
            expected = normalize(clip.read(padded, torch.tensor([len(row) - 1])), dim=1)[0]
            got = learner.logits(seen, text)[:, column]
        torch.testing.assert_close(got, 100 * normalize(images, dim=1) @ expected, atol=1e-3, rtol=1e-4)


def test_an_interrupted_coop_ends_as_if_nothing_had_happened():
    clip, images = encoders.clip(), torch.randn(6, tiny.EMBEDDING, generator=torch.Generator().manual_seed(2))
    text, seen = Text(("ox", "green"), None, clip), Pictures(images, torch.arange(6) % 2)
    train, plan = Support(seen, lambda number: seen, 1), {"epochs": 4, "batch": 4, "learning_rate": 0.05}
    whole, first, second = (coop.CoOp(seed=1, **plan, weight_decay=0.0, length=2) for _ in range(3))
    fit(whole, train, None, text)
    first.begin(train, None, text)
    for number in (0, 1):
        first.step(number)
    second.begin(train, None, text)
    second.restore(first.state())
    for number in (2, 3):
        second.step(number)
    assert torch.equal(all_logits(second, seen, text), all_logits(whole, seen, text))


def test_probabilities_of_one_name_add_up():
    logits = np.log(np.array([[0.2, 0.3, 0.5]], np.float32))
    table = probabilities(logits, ("a", "b", "a"), ("a", "b"))
    assert table.names == ("a", "b") and table.classes.tolist() == [[0, 1]]
    np.testing.assert_allclose(table.values, [[0.7, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(table.logs, np.log([[0.7, 0.3]]), rtol=1e-6)


def test_logits_hundreds_apart_keep_their_order_and_their_distances():
    """Tip-Adapter's can be; in fp32, e^-104 is 0."""
    logits = np.array([[0.0, *range(-1000, -200, 100)]], np.float32)
    table = probabilities(logits, tuple("abcdefghi"), tuple("abcdefghi"))
    assert not table.values[0, 1:].any()
    np.testing.assert_allclose(table.logs, scipy.special.log_softmax(logits.astype(float), 1), rtol=1e-6)
    answers = Answers([Prediction("1", "i", 8, "a", False, False)], 0.0, table)
    assert summarize(answers, table.names).probability.top5 == 1, (
        "i is the second of nine, and all but a have the probability 0"
    )


# --- what is refused before anything is loaded


def test_a_search_without_validation_pictures_is_refused_at_once(compose, task):
    config = validate(compose("method=linear_probe"))
    with pytest.raises(UserError, match=r"validation=held_out \(with fewer .*\), or few_shot.strength=1"):
        check_fit(config, task())
    check_fit(validate(compose("method=linear_probe", "few_shot.strength=1")), task())


@pytest.fixture
def task():
    def make(other=NAMES):
        items = tuple(Item(str(n), n % 3, NAMES[n % 3]) for n in range(6))
        tested = Split((Item("t", 0, other[0]),), other, "", "")
        return Task(Split(items, NAMES, "", ""), {"test": tested}, None, "", {"x": ""})

    return make


READS = ("clip_zero_shot", "coop", "clip_adapter", "vt_clip", "calip", "calip_fs")
LOOKS = ("cafo", "tip_adapter", "tip_adapter_f", "linear_probe", "nearest_mean")


def fitted(compose, name, *words):
    """The configuration of a learner; the probe's needs no validation pictures."""
    return validate(compose(f"method={name}", *words, *(["few_shot.strength=1"] if name == "linear_probe" else [])))


def one_of(names):
    """The first of the names is tried by make test-fast, the others by make test: each composes for 0.2 s."""
    return [names[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names[1:])]


@pytest.mark.parametrize("name", one_of(LOOKS))
def test_learners_of_fixed_classes_refuse_others(compose, task, name):
    check_fit(fitted(compose, name), task())
    with pytest.raises(UserError, match=f"{name} knows only the classes.*'test' has 1 others, first: 'ox'"):
        check_fit(fitted(compose, name), task(("ox", "green", "blue")))


@pytest.mark.parametrize("name", one_of(READS))
def test_learners_that_read_take_other_classes_but_no_encoder_that_only_looks(compose, task, name):
    check_fit(fitted(compose, name), task(("ox", "green", "blue")))
    with pytest.raises(UserError, match=f"{name} compares pictures with class names.*clip=none has no text tower"):
        check_fit(fitted(compose, name, "clip=none", "visual=lite0"), task())


@pytest.mark.parametrize("name", one_of(LOOKS))
def test_learners_that_look_take_an_encoder_that_only_looks(compose, task, name):
    check_fit(fitted(compose, name, "clip=none", "visual=lite0"), task())


def test_a_learner_needs_an_encoder(compose, task):
    with pytest.raises(UserError, match="needs an encoder"):
        check_fit(validate(compose("method=cafo", "clip=none", "visual=none")), task())


def test_a_learner_and_its_method_are_of_one_name(compose):
    config = validate(compose("method=cafo", "few_shot=coop"))
    with pytest.raises(UserError, match="few_shot=coop: method=cafo fits cafo; choose method=coop"):
        check(config, None)
    with pytest.raises(UserError, match="no few-shot learner is chosen; add one"):
        check(replace(config, few_shot=None), None)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["clip=rn50", "visual=dino_rn50", "visual.options.file=/no/dino.pth"],
            "visual.options.file=/no/dino.pth does",
        ),
        (["clip=rn50", "clip.options.file=/no/clip.pt"], "clip.options.file=/no/clip.pt does not exist"),
        (["clip.prompts=/no/gpt.json"], "clip.prompts=/no/gpt.json cannot be read"),
        (["few_shot.generated=/no/drawn"], "few_shot.generated=/no/drawn is no folder"),
        (["few_shot.scheduler=x"], "few_shot.scheduler=x: choose one of paper, proper"),
        (["few_shot.search_scale=[1]"], "search_scale"),
        (["+few_shot.alhpa=1"], "alhpa"),
        (["clip.templates=[a photo]"], "must have one"),
    ],
)
def test_mistakes_cost_a_second(compose, task, overrides, said):
    with pytest.raises(UserError, match=said):
        check_fit(validate(compose("method=cafo", *overrides)), task())


def test_a_language_model_is_needed_by_who_asks(compose):
    from common.vlm.check import check_vlm

    with pytest.raises(UserError, match="model=features is no language model, and method=nothinking needs one"):
        check_vlm(validate(compose("model=features")), None)


# --- published configurations

PUBLISHED = Path(__file__).parent.parent.parent / "shared/papers/clip_published.json"
DATA = {"fgvc": "fgvc_aircraft", "oxford_flowers": "flowers102"}


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published configurations are not here")
@pytest.mark.faults
def test_the_66_published_configurations(compose):
    published = json.loads(PUBLISHED.read_text())
    compared = 0
    for key, tip in published["tip_configs"].items():

        def of(name, key=key):
            return compose(f"method={name}", f"data={DATA.get(key, key)}", "clip=rn50")

        for name in ("tip_adapter", "tip_adapter_f"):
            entry = of(name).few_shot
            assert (entry.alpha, entry.beta, list(entry.search_scale)) == (tip["init_alpha"], 1.0, tip["search_scale"])
            assert entry.key_views == tip["augment_epoch"]
        assert (entry.epochs, entry.learning_rate) == (tip["train_epoch"], tip["lr"])
        compared, cfg = compared + 1, of("cafo")
        for shots, theirs in published["cafo_configs"][key].items():
            cfg.shots = int(shots)
            entry = cfg.few_shot
            assert (entry.alpha, entry.beta) == (theirs["init_alpha"], theirs["init_beta"]), (key, shots)
            assert list(entry.search_scale) == theirs["search_scale"], (key, shots)
            assert (entry.per_class, entry.epochs) == (theirs["gen_shots"], theirs["train_epoch"]), (key, shots)
            assert (entry.learning_rate, entry.key_views) == (theirs["lr"], theirs["augment_epoch"]), (key, shots)
            compared += 1
        betas = published["calip_betas_2_3"][key]
        assert all(list(of(name).few_shot.betas) == [1, *betas] for name in ("calip", "calip_fs"))
    assert compared == 66 and tuple(tip["search_step"]) == search.STEPS
