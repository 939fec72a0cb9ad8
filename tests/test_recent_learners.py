"""Learners of 2023 to 2025 against plain numpy and scikit-learn, written from their equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

from common.few_shot.heads import ape, clap, cross_modal, lp_plus_plus, proker, timo
from common.few_shot.heads.base import Pictures, Support, Text, fit

N, C, D = 14, 4, 8
LABELS = torch.tensor([2, 0, 1, 0, 3, 2, 2, 1, 1, 0, 3, 3, 2, 1])  # uneven on purpose
EXACT = {"rtol": 1e-8, "atol": 1e-10}


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def softmax(rows):
    grown = np.exp(rows - rows.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


@pytest.fixture
def world():
    """Shots (test view and two random ones), validation images, prompts; their lengths differ."""
    rng = np.random.default_rng(3)
    views = [torch.from_numpy(5 * rng.normal(size=(N, D))) for _ in range(3)]
    val = Pictures(torch.from_numpy(rng.normal(size=(20, D))), torch.arange(20) % C)
    prompts = tuple(torch.from_numpy(rng.uniform(1, 9) * rng.normal(size=(3, D))) for _ in range(C))
    means = torch.stack([torch.from_numpy(unit(each.numpy())).mean(0) for each in prompts])
    text = Text(tuple("abcd"), torch.from_numpy(unit(means.numpy())), None, prompts)
    return Support(Pictures(views[0], LABELS), lambda n: Pictures(views[1 + n % 2], LABELS), 2), val, text


def test_lp_plus_plus_is_its_descent(world):
    """Gradients of the cross entropy by hand: (softmax - label) x features / N."""
    train, _, text = world
    learner = lp_plus_plus.LPPlusPlus(seed=1, epochs=23)
    fit(learner, train, None, text)
    x, t, y = unit(train.seen.images.numpy()), text.weights.numpy(), np.eye(C)[LABELS.numpy()]
    cosines = x @ t.T
    w, b = y.T @ x, np.zeros(C)
    alpha = np.full(C, 250 * np.mean([cosines[LABELS.numpy() == c, c].mean() for c in range(C)]))
    rate = 4 * N / np.linalg.eigvalsh(x.T @ x).max()
    alpha_rate = N / (4 * (cosines**2).sum(0).max())
    mw, mb, sums = 0, 0, 0
    for epoch in range(23):
        wrong = (softmax(x @ w.T + b + alpha * cosines) - y) / N
        mw, mb, sums = 0.9 * mw + wrong.T @ x, 0.9 * mb + wrong.sum(0), sums + (wrong * cosines).sum(0)
        w, b = w - rate * mw, b - rate * mb
        if epoch in (9, 19):
            alpha = alpha - alpha_rate * sums
    assert learner.head()["weight"].numpy() == pytest.approx(w) and learner.head()["bias"].numpy() == pytest.approx(b)
    assert learner.head()["alpha"].numpy() == pytest.approx(alpha)
    new = np.random.default_rng(9).normal(size=(5, D))
    found = learner.logits(Pictures(torch.from_numpy(new), torch.zeros(5)), text)
    np.testing.assert_allclose(found.detach(), unit(new) @ w.T + b + alpha * (unit(new) @ t.T), **EXACT)


def test_proker_is_kernel_ridge_regression_of_what_clip_lacks(world):
    """With scikit-learn; the authors' code weighs the correction by lmbda."""
    train, _, text = world
    learner = proker.ProKeR(seed=1, beta=1.3, lmbda=0.2)
    fit(learner, train, None, text)
    x, t, y = unit(train.seen.images.numpy()), text.weights.numpy(), np.eye(C)[LABELS.numpy()]
    new = np.random.default_rng(9).normal(size=(5, D))
    # exp(-beta (1 - a b)) = exp(-beta |a - b|^2 / 2) for unit vectors
    ridge = KernelRidge(alpha=0.2, kernel="rbf", gamma=1.3 / 2).fit(x, y - x @ t.T)
    expected = 100 * (unit(new) @ t.T + 0.2 * ridge.predict(unit(new)))
    np.testing.assert_allclose(learner.logits(Pictures(torch.from_numpy(new), torch.zeros(5)), text), expected, **EXACT)


def test_proker_takes_the_first_pair_that_is_right_most_often(world):
    train, val, text = world
    learner = proker.ProKeR(seed=1, beta=1.7, lmbda=0.1)
    facts = fit(learner, train, val, text)
    best = (-1, 0, 0)
    for beta in np.linspace(0.5, 3, 20):
        for lmbda in np.linspace(0.001, 1, 10):
            other = proker.ProKeR(seed=1, beta=float(beta), lmbda=float(lmbda))
            fit(other, train, None, text)
            right = int((other.logits(val, text).argmax(1) == val.labels).sum())
            best = max(best, (right, beta, lmbda), key=lambda each: each[0])
    assert (facts["beta"], facts["lmbda"]) == pytest.approx(best[1:]) and facts["searched"]


def test_clap_descends_on_cross_entropy_and_distance_to_the_texts(world):
    """One epoch in one batch, at Dassl's first rate of 1e-5, by autograd on the sum written out."""
    train, _, text = world
    learner = clap.CLAP(seed=1, epochs=3, batch=N, learning_rate=0.1, weight_decay=0.0)
    learner.begin(train, None, text)
    raw = torch.stack([each.mean(0) for each in text.prompts])
    assert torch.equal(learner.module.values, raw)
    with torch.no_grad():
        learner.module.values += 0.3  # away from the texts, where the distance has a gradient
    p = learner.module.values.detach().clone().requires_grad_()
    x, view = train.seen.images, train.view(0).images
    zero_shot = softmax(100 * unit(x.numpy()) @ text.weights.numpy().T)
    held = [zero_shot[LABELS.numpy() == c, c].mean() for c in range(C)]
    logits = 100 * (view / view.norm(dim=1, keepdim=True)) @ (p / p.norm(dim=1, keepdim=True)).T
    loss = torch.nn.functional.cross_entropy(logits, LABELS)
    loss = loss + sum(h * ((p[c] - raw[c]) ** 2).sum() for c, h in enumerate(held)) / C
    loss.backward()
    metrics = learner.step(0)
    assert metrics["loss"] == pytest.approx(float(loss.detach()))
    np.testing.assert_allclose(learner.module.values.detach(), (p - 1e-5 * p.grad).detach(), **EXACT)
    without = clap.CLAP(seed=1, epochs=3, batch=N, learning_rate=0.1, weight_decay=0.0, constraint=False)
    without.begin(train, None, text)
    assert without.penalty() == 0.0


def test_cross_modal_trains_on_images_and_prompts_half_and_half(world):
    """A plain loop with torch's AdamW over the same draws."""
    train, _, text = world
    learner = cross_modal.CrossModal(
        seed=2, iterations=150, batch=6, learning_rate=1e-2, weight_decay=0.01, wise_ft=0.25
    )
    fit(learner, train, None, text)
    assert learner.steps == 2
    w = text.weights.clone().requires_grad_()
    optimizer = torch.optim.AdamW([w], 1e-2, eps=1e-4, weight_decay=0.01)
    prompts, named = torch.cat(text.prompts), torch.arange(C).repeat_interleave(3)
    for step in range(2):
        generator = torch.Generator().manual_seed(2 * 1_000_003 + step)
        seen = train.view(step).images
        for iteration in range(100 * step, 100 * step + 100):
            images = torch.randint(N, (3,), generator=generator)
            texts = torch.randint(3 * C, (3,), generator=generator)
            features = torch.cat([seen[images], prompts[texts]])
            logits = 100 * (features / features.norm(dim=1, keepdim=True)) @ w.T
            loss = torch.nn.functional.cross_entropy(logits, torch.cat([LABELS[images], named[texts]]))
            warm = 1e-5 + (1e-2 - 1e-5) * iteration / 50
            rate = warm if iteration < 50 else 1e-2 * (1 + np.cos(np.pi * iteration / 200)) / 2
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    expected = (0.75 * w + 0.25 * text.weights).detach()
    np.testing.assert_allclose(learner.head()["module"]["weight"], expected, rtol=1e-5)


def test_ape_keeps_channels_in_which_classes_differ(world):
    """Over all pairs of examples of different classes, one by one; a class's text is one of its examples."""
    train, _, text = world
    x, t = unit(train.seen.images.numpy()), text.weights.numpy()
    examples = np.concatenate([t, x])
    of = np.concatenate([np.arange(C), LABELS.numpy()])
    products = [examples[a] * examples[b] for a in range(len(of)) for b in range(len(of)) if of[a] != of[b]]
    criterion = -0.3 * np.mean(products, 0) + 0.7 * t.var(0, ddof=1)
    found = ape.channels(torch.from_numpy(x), LABELS, text.weights, 0.3, 5)
    assert found.tolist() == np.argsort(-criterion)[:5].tolist()


def test_ape_is_its_equation(world):
    train, _, text = world
    learner = ape.APE(
        seed=1, alpha=1.3, beta=2.1, gamma=0.4, search_scale=[7, 7, 1], share=0.6, similarity=0.3, key_views=2
    )
    facts = fit(learner, train, None, text)
    assert facts == {"alpha": 1.3, "beta": 2.1, "gamma": 0.4, "searched": False}
    keys, t = unit((train.view(0).images + train.view(1).images).numpy() / 2), text.weights.numpy()
    kept = ape.channels(torch.from_numpy(keys), LABELS, text.weights, 0.3, 5).numpy()
    new = np.random.default_rng(9).normal(size=(6, D))
    keys_kept, new_kept = unit(keys[:, kept]), unit(unit(new)[:, kept])
    read = softmax(keys_kept @ unit(t[:, kept]).T)
    expected = 100 * unit(new) @ t.T
    for key, label, said in zip(keys_kept, LABELS.tolist(), read, strict=True):
        label_row = np.eye(C)[label]
        divergence = sum(v * np.log2((v + 1e-6) / (s + 1e-6)) for v, s in zip(label_row, said, strict=True))
        expected[:, label] += 1.3 * np.exp(-2.1 * (1 - new_kept @ key)) * np.exp(0.4 * divergence)
    found = learner.logits(Pictures(torch.from_numpy(new), torch.zeros(6)), text)
    np.testing.assert_allclose(found, expected, **EXACT)


def test_ape_searches_three_values(world):
    train, val, text = world
    given = {"search_scale": [4, 3, 1], "share": 0.6, "similarity": 0.3, "key_views": 2}
    learner = ape.APE(seed=1, alpha=1.0, beta=1.0, gamma=0.1, **given)
    facts = fit(learner, train, val, text)
    right = float((learner.logits(val, text).argmax(1) == val.labels).double().mean())
    for gamma in (0.0, 0.2, 0.4, 0.6, 0.8):
        for beta in (0.1, 1.27, 2.44, 3.61):
            for alpha in (0.1, 0.97, 1.84):
                other = ape.APE(seed=1, alpha=alpha, beta=beta, gamma=gamma, **given)
                fit(other, train, None, text)
                assert float((other.logits(val, text).argmax(1) == val.labels).double().mean()) <= right + 1e-12
    assert facts["searched"]


APE_T = {"batch": N, "learning_rate": 0.05, "weight_decay": 0.1, "eps": 1e-3, "search_scale": [7, 7], "key_views": 2}


def test_ape_t_trains_residuals_that_texts_and_keys_share(world):
    """A plain loop with torch's AdamW over every key by itself; channels by the texts alone."""
    train, _, text = world
    learner = ape.APET(seed=1, epochs=3, alpha=1.3, beta=2.1, share=0.4, similarity=0.8, **APE_T)
    facts = fit(learner, train, None, text)
    assert facts == {"alpha": 1.3, "beta": 2.1, "searched": False}
    t = text.weights
    products = [t[a] * t[b] for a in range(C) for b in range(C) if a != b]
    criterion = -0.8 * torch.stack(products).mean(0) + 0.2 * t.var(0)
    kept = criterion.argsort(descending=True)[:3]
    keys = torch.from_numpy(unit((train.view(0).images + train.view(1).images).numpy() / 2))
    residual, weight = torch.zeros(C, 3, requires_grad=True), torch.ones(N, requires_grad=True)
    optimizer = torch.optim.AdamW([residual, weight], eps=1e-3, weight_decay=0.1)

    def logits(rows):
        moved = torch.zeros(C, D)
        moved[:, kept] = residual
        x, found = torch.from_numpy(unit(rows.numpy())), []
        for c in range(C):
            mine = [i for i in range(N) if LABELS[i] == c]
            votes = sum(weight[i] * torch.exp(-2.1 * (1 - x @ (keys[i] + moved[c]))) for i in mine)
            found.append(100 * x @ (t[c] + moved[c]) + 1.3 * votes)
        return torch.stack(found, 1)

    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + np.cos(np.pi * epoch / 3)) / 2
        loss = torch.nn.functional.cross_entropy(logits(train.view(2 + epoch % 2).images), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(residual.detach().abs().min()) > 1e-3 and float((weight.detach() - 1).abs().min()) > 1e-4, (
        "all have moved"
    )
    np.testing.assert_allclose(learner.module.residual.detach(), residual.detach(), rtol=1e-6)
    new = torch.from_numpy(np.random.default_rng(9).normal(size=(6, D)))
    found = learner.logits(Pictures(new, torch.zeros(6)), text).detach()
    np.testing.assert_allclose(found, logits(new).detach(), rtol=1e-6)


def test_ape_t_searches_with_what_it_has_trained(world):
    train, val, text = world
    learner = ape.APET(seed=1, epochs=4, alpha=1.0, beta=1.0, share=0.6, similarity=0.3, **APE_T)
    facts = fit(learner, train, val, text)
    right = float((learner.logits(val, text).argmax(1) == val.labels).double().mean())
    assert right >= facts["selection_accuracy"] and (facts["searched"] or (facts["alpha"], facts["beta"]) == (1, 1))
    by_paper = ape.APET(seed=1, epochs=4, alpha=1.0, beta=1.0, share=0.6, similarity=0.3, **APE_T)
    assert fit(by_paper, train, None, text, val) == facts, "without validation images the test images choose, with both"
    other = ape.APET(seed=1, epochs=4, alpha=1.0, beta=1.0, share=0.6, similarity=0.3, **APE_T)
    other.ready(learner.head(), text)
    for beta in np.linspace(0.1, 7, 9):
        for alpha in np.linspace(0.1, 7, 9):
            other.mix.alpha, other.mix.beta = alpha, beta
            found = float((other.logits(val, text).argmax(1) == val.labels).double().mean())
            assert found <= right + 1 / len(val) + 1e-12, "the search has a finer grid"


def plain_timo(train, text, gamma, count):
    """Text weights, and weights and biases of the discriminant analysis, with so many prompts; None: each once."""
    views = [unit(train.view(n).images.numpy()) for n in range(2)]
    mean = unit((train.view(0).images + train.view(1).images).numpy() / 2)
    y = LABELS.numpy()
    weights, rows, labels = [], [], []
    for c in range(C):
        prompts = unit(text.prompts[c].numpy())
        near = prompts @ unit(mean[y == c].mean(0))
        weights.append(unit(softmax(gamma * near / np.linalg.norm(near)) @ prompts))
        order = [*np.argsort(-near), *np.argsort(-near)]
        joined = range(len(near)) if count is None else order[:count]
        rows += [prompts[j] * near[j] for j in joined]
        labels += [c for _ in joined]
    rows, labels = np.concatenate([np.array(rows), *views]), np.array([*labels, *y, *y])
    means = np.array([rows[labels == c].mean(0) for c in range(C)])
    spread = np.cov((rows - means[labels]).T)
    precision = D * np.linalg.inv((len(rows) - 1) * spread + np.trace(spread) * np.eye(D))
    biases = np.log(1 / C) - np.array([mean @ precision @ mean / 2 for mean in means])
    return np.array(weights), precision @ means.T, biases


def test_timo_s_searches_the_choice_of_prompts_too(world):
    """Its three loops, one in the other: gamma by the text weights alone, then the number of prompts and alpha."""
    train, _, text = world
    draws = np.random.default_rng(6)  # prompts that are alike, and a class with fewer of them
    alike = [draws.normal(size=D) + 0.1 * draws.normal(size=(2 + (c > 0), D)) for c in range(C)]
    text = Text(text.names, text.weights, None, tuple(map(torch.from_numpy, alike)))
    chosen = []
    for seed in range(12):
        x, labels = unit(np.random.default_rng(seed).normal(size=(40, D))), np.arange(40) % C
        right = [int(((x @ plain_timo(train, text, g, None)[0].T).argmax(1) == labels).sum()) for g in range(5, 101, 5)]
        gamma = 5 + 5 * right.index(max(right))
        best = (-1, None, None, None)
        for count in (1, 2, 3, 4, 5, 6):
            weights, matrix, biases = plain_timo(train, text, gamma, count)
            for power in range(-4, 5):
                logits = 10.0**power * x @ weights.T + x @ matrix + biases
                hits = int((logits.argmax(1) == labels).sum())
                best = max(best, (hits, count, 10.0**power, logits), key=lambda each: each[0])
        learner = timo.TIMO(seed=1, alpha=3.0, gamma=50.0, key_views=2, search_prompts=True)
        seen = Pictures(torch.from_numpy(x), torch.from_numpy(labels))
        facts = fit(learner, train, seen, text)
        assert facts == {"alpha": best[2], "gamma": gamma, "prompts": best[1], "searched": True}
        np.testing.assert_allclose(learner.logits(seen, text), best[3], **EXACT)
        chosen.append((gamma, best[1]))
    assert max(gamma for gamma, _ in chosen) > 50 and max(count for _, count in chosen) > 3
    alone = timo.TIMO(seed=1, alpha=3.0, gamma=50.0, key_views=2, search_prompts=True)
    assert fit(alone, train, None, text) == {"alpha": 3.0, "gamma": 50.0, "prompts": None, "searched": False}


def test_timo_is_its_equation(world):
    train, _, text = world
    learner = timo.TIMO(seed=1, alpha=3.0, gamma=50.0, key_views=2)
    fit(learner, train, None, text)
    weights, matrix, biases = plain_timo(train, text, 50, None)
    new = np.random.default_rng(9).normal(size=(5, D))
    found = learner.logits(Pictures(torch.from_numpy(new), torch.zeros(5)), text)
    np.testing.assert_allclose(found, 3.0 * unit(new) @ weights.T + unit(new) @ matrix + biases, **EXACT)


def test_what_was_searched_is_followed(world):
    train, val, text = world
    for build in (
        lambda: proker.ProKeR(seed=1, beta=1.7, lmbda=0.1),
        lambda: timo.TIMO(seed=1, alpha=1.0, gamma=50.0, key_views=1),
        lambda: timo.TIMO(seed=1, alpha=1.0, gamma=50.0, key_views=1, search_prompts=True),
        lambda: ape.APE(
            seed=1, alpha=1.0, beta=1.0, gamma=0.1, search_scale=[4, 3, 1], share=0.6, similarity=0.3, key_views=1
        ),
    ):
        fitted, follower = build(), build()
        facts = fit(fitted, train, val, text)
        follower.follow(fitted)
        other = Pictures(val.images, val.labels.flip(0))  # would choose other values
        assert fit(follower, train, other, text) == facts | {"searched": False}
