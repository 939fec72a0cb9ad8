"""The CLIP-based learners against plain numpy, written from their equations; and properties that must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common.few_shot.heads import base as base_module
from common.few_shot.heads import (
    cafo,
    calip,
    calip_fs,
    clip_adapter,
    coop,
    linear_probe,
    search,
    tip_adapter,
    vt_clip,
    zero_shot,
)
from common.few_shot.heads import keys as keys_
from common.few_shot.heads.base import cosine_logits

N, C, D, P = 7, 4, 8, 5
EXACT = {"rtol": 1e-6, "atol": 1e-12}


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def draw():
    """`draw(2, 3)`: random numbers of that shape, the same in every run."""
    generator = np.random.default_rng(5)
    return lambda *shape: torch.from_numpy(generator.normal(size=shape))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def softmax(values, axis):
    grown = np.exp(values - values.max(axis, keepdims=True))
    return grown / grown.sum(axis, keepdims=True)


@pytest.fixture
def text(draw):
    return torch.from_numpy(unit(draw(C, D).numpy()))


@pytest.fixture
def images(draw):
    return 3 * draw(N, D)


# --- zero-shot


def test_prompts_are_normalised_averaged_and_normalised_again():
    # by hand: directions (1, 0) and (0.6, 0.8) have the mean (0.8, 0.4), whatever their lengths
    weights = zero_shot.text_weights([torch.tensor([[2.0, 0.0], [30.0, 40.0]]), torch.tensor([[0.0, -5.0]])])
    length = math.hypot(0.8, 0.4)
    assert weights.numpy() == pytest.approx(np.array([[0.8 / length, 0.4 / length], [0.0, -1.0]]))


def test_a_prompt_twice_counts_twice_and_equal_names_weigh_the_same(draw):
    prompts = draw(3, D)
    twice = zero_shot.text_weights([prompts, prompts[[0, 1, 2, 2]], prompts])
    assert torch.equal(twice[0], twice[2]) and not torch.allclose(twice[0], twice[1])
    with pytest.raises(ValueError, match="class number 1 has no prompt"):
        zero_shot.text_weights([prompts, prompts[:0]])


def test_zero_shot_is_a_hundred_cosines(images, text):
    expected = 100 * unit(images.numpy()) @ text.numpy().T
    np.testing.assert_allclose(cosine_logits(images, text), expected, **EXACT)
    np.testing.assert_allclose(cosine_logits(images * 7, text), expected, **EXACT)


# --- Tip-Adapter

LABELS = torch.tensor([2, 0, 1, 0, 3, 2, 2])  # uneven on purpose


@pytest.fixture
def views(draw):
    return (
        draw(3, N, D) * torch.tensor([1.0, 5.0, 0.2])[:, None, None]
    )  # lengths differ: the order of mean and norm shows


def plain_votes(images, views, labels, beta):
    keys = unit(views.numpy().mean(0))
    similar = unit(images.numpy()) @ keys.T
    return np.exp(-beta * (1 - similar)) @ np.eye(C)[labels.numpy()]


def test_keys_are_means_of_raw_views_of_length_one(views):
    keys = keys_.keys_of(views, LABELS, C)
    assert keys.values.shape == (C, 3, D) and keys.missing.sum(1).tolist() == [1, 2, 0, 2]
    expected = unit(views.numpy().mean(0))
    np.testing.assert_allclose(keys.values[2], expected[[0, 5, 6]], **EXACT)
    np.testing.assert_allclose(keys.values.norm(dim=2)[~keys.missing], 1.0, **EXACT)
    with pytest.raises(ValueError, match="class number 4 has no training image"):
        keys_.keys_of(views, LABELS, 5)


@pytest.mark.parametrize(("alpha", "beta"), [(1.17, 1.0), (3.0, 5.5)])
def test_tip_adapter_is_its_equation(images, views, text, alpha, beta):
    keys, base = keys_.keys_of(views, LABELS, C), cosine_logits(images, text)
    expected = 100 * unit(images.numpy()) @ text.numpy().T + alpha * plain_votes(images, views, LABELS, beta)
    np.testing.assert_allclose(tip_adapter.logits(images, keys, base, alpha, beta), expected, **EXACT)
    assert torch.equal(tip_adapter.logits(images, keys, base, 0.0, beta), base)


def test_missing_keys_neither_vote_nor_learn(images, views, text):
    keys = keys_.keys_of(views, LABELS, C)
    values = keys.values.clone().requires_grad_()
    tip_adapter.logits(
        images, keys_.Keys(values, keys.missing), cosine_logits(images, text), 2.0, 1.5
    ).square().sum().backward()
    assert (
        torch.isfinite(values.grad).all() and not values.grad[keys.missing].any() and values.grad[~keys.missing].all()
    )


def test_the_grid_is_the_published_one():
    betas, alphas = search.grid((7.0, 3.0))
    assert len(betas) == 200 and len(alphas) == 20
    assert (betas[0], alphas[0]) == (0.1, 0.1)
    assert betas[-1] == pytest.approx(0.1 + 199 * 6.9 / 200) and alphas[-1] == pytest.approx(0.1 + 19 * 2.9 / 20)


@pytest.mark.parametrize("chunk", [3, 100])
def test_search_equals_every_pair_tried_in_order(images, views, text, chunk):
    keys, base = keys_.keys_of(views, LABELS, C), cosine_logits(images, text) / 20
    # right is what a pair in the middle of the grid says
    truth = torch.from_numpy((base.numpy() + 3.64 * plain_votes(images, views, LABELS, 3.8)).argmax(1))
    best = (0.0, 0.0, -1.0)
    for beta in (0.1 + i * (9.0 - 0.1) / 12 for i in range(12)):
        for alpha in (0.1 + i * (6.0 - 0.1) / 5 for i in range(5)):
            mixed = base.numpy() + alpha * plain_votes(images, views, LABELS, beta)
            accuracy = float((mixed.argmax(1) == truth.numpy()).mean())
            if accuracy > best[2]:
                best = (alpha, beta, accuracy)

    def vote(part):
        near = keys_.affinity(images[part], keys)
        return lambda beta: keys_.votes(near, beta)

    assert best[:2] != (0.1, 0.1), "the first pair would be found without a search"
    for found in (
        search.search(vote, base, truth, (9.0, 6.0), (12, 5), chunk),
        search.search_keys(lambda part: keys_.affinity(images[part], keys), base, truth, (9.0, 6.0), (12, 5), chunk),
    ):
        assert (found.alpha, found.beta, found.accuracy) == pytest.approx(best)


@pytest.mark.sampled
@pytest.mark.parametrize("end", [12.0, 60.0])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("classes, shots, width", [(2, 1, 2), (7, 3, 4), (150, 2, 3), (40, 5, 16)])
def test_rivals_alone_decide_as_all_classes_do(classes, shots, width, spread, end):
    # few dimensions: many classes win somewhere on the grid. Two classes are the same one, some keys are missing
    generator = torch.Generator().manual_seed(classes)
    keys = torch.nn.functional.normalize(
        torch.randn(classes, shots, width, generator=generator, dtype=torch.float64), dim=2
    )
    missing = torch.rand(classes, shots, generator=generator) < 0.3
    missing[:, 0] = False
    keys[1], missing[1] = keys[0], missing[0]
    truth = torch.arange(60) % classes
    images = keys[truth, 0] + 0.6 * torch.randn(60, width, generator=generator, dtype=torch.float64)
    near = keys_.affinity(images, keys_.Keys(keys, missing))
    base = spread * torch.randn(60, classes, generator=generator, dtype=torch.float64)
    base[:, 1] = base[:, 0]
    betas, alphas = search.grid((end, 5.0), (50, 6))
    distance = np.where(missing.numpy(), np.inf, 1 - near.numpy())[:, None]
    votes = np.exp(-np.array(betas)[None, :, None, None] * distance).sum(3)  # [images, betas, classes]
    mixed = base.numpy()[:, None, None] + np.array(alphas)[:, None] * votes[:, :, None]
    expected = mixed.argmax(3) == truth.numpy()[:, None, None]
    found = search.right(near, base, truth, betas, alphas)
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.sum() < expected.size or spread == 30.0 or classes == 2


@pytest.mark.parametrize("strange", [np.inf, np.nan])
def test_logits_without_a_value_are_counted_as_argmax_does(draw, strange):
    """Of one image a rival is infinite or no number: argmax takes it, at every pair."""
    near, base, truth = draw(8, 3, 2).tanh(), draw(8, 3), torch.arange(8) % 3
    base[4, 0] = strange  # image 4 is of class 1
    betas, alphas = search.grid((9.0, 6.0), (20, 4))
    found = search.right(near, base, truth, betas, alphas)
    votes = torch.stack([((near - 1) * beta).exp().sum(2) for beta in betas], 1)
    mixed = base[:, None, None] + torch.tensor(alphas, dtype=base.dtype)[:, None] * votes[:, :, None]
    assert torch.equal(found, mixed.argmax(3) == truth[:, None, None]) and not found[4].any() and found.any()


# --- CaFo


def plain_fused(votes, base):
    def z(rows):
        return (rows - rows.mean(1, keepdims=True)) / rows.std(1, ddof=1, keepdims=True)

    score = np.stack([(z(each) * z(base)).sum(1) for each in votes])
    weight = softmax(score, 0)
    return sum(weight[i][:, None] * z(votes[i]) for i in range(len(votes))), weight


def test_cafo_is_its_equation(draw):
    votes, base = draw(2, N, C).exp(), 20 * draw(N, C)
    expected, weight = plain_fused(votes.numpy(), base.numpy())
    np.testing.assert_allclose(cafo.weights(cafo.standardized(votes), base), weight, **EXACT)
    np.testing.assert_allclose(cafo.logits(votes, base, 0.6), base.numpy() + 0.6 * expected, **EXACT)
    assert torch.equal(cafo.logits(votes, base, 0.0), base)


def test_cafos_weights_add_up_and_ignore_scale_and_shift(draw):
    votes, base = draw(2, N, C).exp(), 20 * draw(N, C)
    weight = cafo.weights(cafo.standardized(votes), base)
    np.testing.assert_allclose(weight.sum(0), 1.0, **EXACT)
    moved = torch.stack([3.0 * votes[0] + 2.0, 0.1 * votes[1] - 5.0])
    np.testing.assert_allclose(cafo.weights(cafo.standardized(moved), 4 * base - 1), weight, **EXACT)
    np.testing.assert_allclose(cafo.fused(moved, base), cafo.fused(votes, base), **EXACT)


def test_gradients_flow_through_cafos_weights(draw):
    votes, base = draw(2, N, C).exp(), 20 * draw(N, C)
    assert torch.autograd.gradcheck(lambda v: cafo.logits(v, base, 0.6), votes.requires_grad_())


# --- CLIP-Adapter


def test_clip_adapter_is_its_equation(images, text):
    torch.manual_seed(0)
    adapter = clip_adapter.Adapter(D)
    first, second = (layer.weight.detach().numpy() for layer in (adapter.layers[0], adapter.layers[2]))
    assert first.shape == (D // 4, D) and [p.shape for p in adapter.parameters()] == [first.shape, second.shape]
    inner = np.maximum(0, np.maximum(0, images.numpy() @ first.T) @ second.T)
    expected = 100 * unit(0.2 * inner + 0.8 * images.numpy()) @ text.numpy().T
    np.testing.assert_allclose(clip_adapter.logits(adapter, images, text, 0.2).detach(), expected, **EXACT)
    np.testing.assert_allclose(
        clip_adapter.logits(adapter, images, text, 0.0).detach(), cosine_logits(images, text), **EXACT
    )


# --- CALIP and its trained reconstruction


def test_calip_is_its_equation(draw, images, text):
    maps = draw(N, P, D)
    f, w, x = unit(maps.numpy()), text.numpy(), unit(images.numpy())
    expected = np.empty((N, C))
    for i in range(N):
        a = 2 * f[i] @ w.T
        text_side = softmax(a, 0).T @ f[i]
        image_side = softmax(a, 1) @ w
        pooled = image_side.mean(0) + image_side.max(0)
        expected[i] = 100 * (x[i] @ w.T + 1.12 * text_side @ x[i] + 0.02 * w @ pooled)
    np.testing.assert_allclose(calip.logits(images, maps, text), expected, **EXACT)
    np.testing.assert_allclose(calip.logits(images, maps, text, (1.0, 0.0, 0.0)), cosine_logits(images, text), **EXACT)


def test_calip_fs_is_its_equation(draw, images, text):
    torch.manual_seed(0)
    maps, attention = draw(N, P, D), calip_fs.CrossAttention(D, hidden=6)
    layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in attention.before[::2]]
    after = attention.after.weight.detach().numpy(), attention.after.bias.detach().numpy()

    def split(rows):
        for number, (weight, bias) in enumerate(layers):
            rows = rows @ weight.T + bias
            rows = np.maximum(rows, 0) if number < 2 else rows
        return rows[:, :D], rows[:, D : 2 * D], rows[:, 2 * D :]

    def read(query, key, value):
        return softmax(query @ key.T / np.sqrt(D), 1) @ value @ after[0].T + after[1]

    w, x, f = text.numpy(), unit(images.numpy()), unit(maps.numpy())
    expected = np.empty((N, C))
    for i in range(N):
        (qs, ks, vs), (qt, kt, vt) = split(f[i]), split(w)
        by_text, by_map = read(qt, ks, vs), read(qs, kt, vt)
        expected[i] = 100 * (x[i] @ w.T + 1.12 * by_text @ x[i] + 0.02 * w @ (by_map.mean(0) + by_map.max(0)))
    np.testing.assert_allclose(calip_fs.logits(attention, images, maps, text).detach(), expected, **EXACT)
    begun = calip_fs.logits(attention, images, maps, text, (1.0, 0.0, 0.0)).detach()
    np.testing.assert_allclose(begun, cosine_logits(images, text), **EXACT)


# --- VT-CLIP


def test_vt_clip_begins_at_zero_shot_and_is_its_equation(draw, images, text):
    torch.manual_seed(0)
    maps, attention = draw(N, P, D), vt_clip.TextAttention(D, heads=2)
    begun = vt_clip.logits(attention, images, maps, text).detach()
    np.testing.assert_allclose(begun, cosine_logits(images, text), **EXACT)
    inner = attention.attention
    torch.nn.init.normal_(inner.out_proj.weight)
    torch.nn.init.normal_(inner.in_proj_bias)
    wq, wk, wv = np.split(inner.in_proj_weight.detach().numpy(), 3)
    bq, bk, bv = np.split(inner.in_proj_bias.detach().numpy(), 3)
    out, w, half = inner.out_proj.weight.detach().numpy(), text.numpy(), D // 2
    expected = np.empty((N, C))
    for i, s in enumerate(maps.numpy()):
        q, k, v = w @ wq.T + bq, s @ wk.T + bk, s @ wv.T + bv
        heads = [
            softmax(q[:, h : h + half] @ k[:, h : h + half].T / np.sqrt(half), 1) @ v[:, h : h + half]
            for h in (0, half)
        ]
        guided = unit(w + np.concatenate(heads, 1) @ out.T)
        expected[i] = 100 * guided @ unit(images.numpy()[i])
    np.testing.assert_allclose(vt_clip.logits(attention, images, maps, text).detach(), expected, **EXACT)


# --- CoOp


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("end", ["S c1 c2 c3 c4 a1 . E _", "S c1 c2 c3 c4 b1 b2 . E"]),
        ("middle", ["S c1 c2 a1 c3 c4 . E _", "S c1 c2 b1 b2 c3 c4 . E"]),
        ("front", ["S a1 c1 c2 c3 c4 . E _", "S b1 b2 c1 c2 c3 c4 . E"]),
    ],
)
def test_context_stands_where_coop_puts_it(position, expected):
    written = ["S x x x x a1 . E _", "S x x x x b1 b2 . E"]
    numbers = {
        word: float(number)
        for number, word in enumerate(["S", "c1", "c2", "c3", "c4", "a1", "b1", "b2", ".", "E", "_", "x"])
    }
    embedded = torch.tensor([[[numbers[word]] * 2 for word in line.split()] for line in written])
    context = coop.Context(embedded, torch.tensor([1, 2]), length=4, position=position)
    with torch.no_grad():
        context.context.copy_(torch.tensor([[numbers[f"c{i}"]] * 2 for i in range(1, 5)]))
    words = {number: word for word, number in numbers.items()}
    assert [" ".join(words[float(value)] for value in row[:, 0]) for row in context().detach()] == expected
    assert [name for name, _ in context.named_parameters()] == ["context"]


def test_context_begins_small_and_is_shared_or_not():
    embedded = torch.zeros(3, 9, 400)
    shared = coop.Context(embedded, torch.tensor([1, 1, 1]), 4, generator=torch.Generator().manual_seed(1))
    assert shared.context.shape == (4, 400) and float(shared.context.detach().std()) == pytest.approx(0.02, rel=0.1)
    own = coop.Context(embedded, torch.tensor([1, 1, 1]), 4, per_class=True)
    assert own.context.shape == (3, 4, 400) and own().shape == embedded.shape


def test_coops_learning_rate_is_the_published_trace():
    found = [base_module.dassl_rate(epoch, 50) for epoch in range(50)]
    assert found[:3] == pytest.approx([1e-5, 2e-3, 1.998e-3], rel=1e-4) and found[-1] == pytest.approx(
        7.89e-6, rel=1e-3
    )


# --- linear probe


def clusters(draw, classes):
    labels = torch.arange(classes).repeat(6)
    return draw(len(labels), D) + 2 * torch.eye(classes, D)[labels], labels


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("strength", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_both_fits_reach_scikit_learns_optimum(draw, classes, strength, class_weight):
    from sklearn.linear_model import LogisticRegression

    images, labels = (rows[classes:] for rows in clusters(draw, classes))
    images, labels = images[labels.argsort()][2:], labels.sort().values[2:]  # uneven classes
    model = LogisticRegression(C=strength, max_iter=10_000, tol=1e-10, class_weight=class_weight)
    model.fit(images.numpy(), labels.numpy())
    odds = model.decision_function(images.numpy())
    expected = np.stack([-odds, odds], 1) / 2 if classes == 2 else odds
    for probe in (
        linear_probe.fit_torch(images, labels, classes, strength, class_weight),
        linear_probe.fit_sklearn(images, labels, classes, strength, tolerance=1e-10, class_weight=class_weight),
    ):
        found = probe.logits(images).numpy()
        relative = [rows - rows.mean(1, keepdims=True) for rows in (found, expected)]  # the rest decides nothing
        np.testing.assert_allclose(*relative, atol=1e-4)


@pytest.mark.parametrize("fit", [linear_probe.fit_torch, linear_probe.fit_sklearn])
def test_a_solver_that_stopped_at_its_limit_says_so(fit, draw, recwarn, monkeypatch):
    """And nobody is warned of strengths that a search only tries."""
    images, labels = clusters(draw, 4)
    assert fit(images, labels, 4, 1.0).converged
    monkeypatch.setattr(linear_probe, "ITERATIONS", 3)
    assert not fit(images, labels, 4, 1.0).converged
    assert not [each for each in recwarn if "converge" in str(each.message)]


def test_the_strength_is_searched_as_published():
    # accuracies by hand: the peak of the coarse list is 1 (1 and 100 are equal, and 1e2 comes first: so it is 1e2)
    asked = []

    def accuracy(strength):
        asked.append(strength)
        return 0.5 if 0.3 < strength < 3e3 else 0.1

    trace = linear_probe.search(accuracy)
    tried = [strength for strength, _ in trace.tried]
    assert tried[:7] == [1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6]
    # ends 10 and 1000 are equal: the left stays, the right moves to the middle of the logarithms, and so on
    assert tried[7:13] == pytest.approx([10, 1000, 10, 100, 10, 10**1.5])
    assert trace.chosen == pytest.approx(10) and len(tried) == 7 + 16
    assert sorted(asked) == sorted(set(tried)), "none is fitted twice"

    rising = linear_probe.search(lambda strength: math.log10(strength) if strength < 2e5 else 0.0)
    # the coarse peak is 1e4, the ends 1e3 and 1e5: the right is better, so the left moves: 1e4, 10^4.5, ...
    assert [round(math.log10(s), 3) for s, _ in rising.tried[7:13]] == [3, 5, 4, 5, 4.5, 5]
    assert rising.chosen == pytest.approx(1e5)


# --- what holds for all


def test_classes_in_another_order_give_the_same_logits_in_that_order(draw, images, views, text):
    order = torch.tensor([2, 0, 3, 1])
    other = torch.argsort(order)[LABELS]  # the new number of every image's class
    maps = draw(N, P, D)
    torch.manual_seed(0)
    guided, trained = vt_clip.TextAttention(D, heads=2), calip_fs.CrossAttention(D, hidden=6)
    torch.nn.init.normal_(guided.attention.out_proj.weight)

    def everything(text, labels):
        base = cosine_logits(images, text)
        keys = [keys_.keys_of(each, labels, C) for each in (views, views.roll(1, 2))]
        votes = torch.stack([keys_.votes(keys_.affinity(images, each), 1.5) for each in keys])
        return {
            "tip_adapter": tip_adapter.logits(images, keys[0], base, 2.0, 1.5),
            "cafo": cafo.logits(votes, base, 0.7),
            "calip": calip.logits(images, maps, text),
            "vt_clip": vt_clip.logits(guided, images, maps, text).detach(),
            "calip_fs": calip_fs.logits(trained, images, maps, text).detach(),
        }

    first, second = everything(text, LABELS), everything(text[order], other)
    for name in first:
        np.testing.assert_allclose(second[name], first[name][:, order], rtol=1e-9, err_msg=name)
