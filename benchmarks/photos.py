"""Simulate experiment=photos: draws of garment photos in uneven classes, tested on all the others.

    python -m benchmarks.photos /usr/share/datasets/fashion-mnist --draws 100      # Debian: dataset-fashion-mnist

Every draw takes 10 to 60 photos of each of the ten classes, sets a fifth of each apart to test on, and fits
`method=best_of` on the rest, as the preset does. Then it is measured on the photos of the dataset that were not drawn
(--others of them), weighted so that classes have the draw's own shares:

    accuracy    beside scikit-learn's logistic regression (its defaults) on the same photos and features, paired
    interval    how often the 95 % interval of the tested photos holds the accuracy on the others
    ece         calibration error on the others, calibrated by the folds
    kept        how often at most 5 % (10 %) of the answers to the others are wrong, above the threshold of the folds
    unknown     share of the others, and of handwritten digits, that is called unknown where 5 % of the others may be
    left_out    share of a class that was left out that is called unknown: by the run's own measure, and of the others

The features are computed once and kept in --cache.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from common.config import composition
from common.data import task
from common.data.sampling import by_label, set_apart
from common.evaluation import calibration, metrics, novelty
from common.few_shot.check import make
from common.few_shot.heads.base import Pictures, Support, Text
from common.few_shot.heads.best_of import BestOf
from common.few_shot.heads.folds import FOLDS, stratified
from common.few_shot.learner import FeatureExtractor
from common.types import Item

Floats = NDArray[np.float64]
RISKS = (0.05, 0.1)


@dataclass(frozen=True)
class Photos:
    """Encoded photos of the dataset, which of them may be drawn, and features of digits, which belong to no class."""

    features: Pictures
    items: list[Item]
    names: tuple[str, ...]
    drawable: int
    digits: NDArray[np.float32]


def encode(folder: str, cache: str, drawable: int, others: int) -> Photos:
    """Encode so many photos to draw from and to measure on, in a random order."""
    words = ["experiment=photos", "test_share=null", f"cache_dir={cache}"]
    with hydra.initialize_config_dir(str(Path(__file__).parent.parent / "conf"), version_base="1.3"):
        config = composition.validate(hydra.compose("config", [*words, "data=fashion", f"data.folder={folder}"]))
        strange = composition.validate(hydra.compose("config", [*words, "data=digits", "shots=30"]))
    data, digits = task.build(config).task, task.build(strange).task
    items = [*data.train.items, *data.evaluation["test"].items]
    items = random.Random("photos").sample(items, drawable + others)
    extractor = FeatureExtractor(config, make(config), torch.device("cpu"))
    unknown = extractor.pictures(digits.images, digits.train.items).images.numpy()
    return Photos(extractor.pictures(data.images, items), items, data.train.names, drawable, unknown)


def draw(photos: Photos, seed: int) -> tuple[list[Item], list[Item]]:
    """Return photos to train and to test on: 10 to 60 of each class."""
    rng = random.Random(f"draw-{seed}")
    drawn = []
    for _, group in sorted(by_label(photos.items[: photos.drawable]).items()):
        drawn += rng.sample(group, rng.randint(10, 60))
    return set_apart(drawn, 0.2, seed)


def fit(photos: Photos, train: Pictures, seed: int) -> BestOf:
    """Fit the preset's learner."""
    with hydra.initialize_config_dir(str(Path(__file__).parent.parent / "conf"), version_base="1.3"):
        config = composition.validate(hydra.compose("config", ["experiment=photos", f"seed={seed}"]))
    head = make(config)
    assert isinstance(head, BestOf)
    head.begin(Support(train, lambda _: train, 1), None, Text(photos.names))
    for number in range(head.steps):
        head.step(number)
    return head


def measure(photos: Photos, seed: int) -> dict[str, float | bool]:
    """Make one draw, and return its figures."""
    place = {item.image: number for number, item in enumerate(photos.items)}
    train, tested = draw(photos, seed)
    drawn = {item.image for item in (*train, *tested)}
    others = [number for number, item in enumerate(photos.items) if item.image not in drawn]
    pick = [
        photos.features.take(torch.tensor(each))
        for each in ([place[item.image] for item in train], [place[item.image] for item in tested], others)
    ]
    began = time.perf_counter()
    head = fit(photos, pick[0], seed)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        logits = [head.logits(each, head.text).double().numpy() for each in pick[1:]]
    labels = [each.labels.numpy() for each in pick]
    # classes in the shares of the draw
    share = np.bincount(np.concatenate(labels[:2]), minlength=len(photos.names)) / (len(labels[0]) + len(labels[1]))
    weights = (share / np.bincount(labels[2], minlength=len(photos.names)))[labels[2]]
    right = logits[1].argmax(1) == labels[2]
    accuracy = float((weights * right).sum())
    plain = LogisticRegression(max_iter=1000).fit(pick[0].images.numpy(), labels[0])
    by_plain = float((weights * (plain.predict(pick[2].images.numpy()) == labels[2])).sum())
    low, high = metrics.wilson_interval(int((logits[0].argmax(1) == labels[1]).sum()), len(labels[1]))
    # confidences
    found = head.out_of_fold()
    assert found is not None
    held_out = found[1][0].double().numpy()
    temperature, slope, bias = calibration.by_images(held_out, labels[0])
    folds, new = softmax(held_out / temperature), softmax(logits[1] / temperature)
    odds = np.log(new.max(1) / (1 - new.max(1)))
    curved = 1 / (1 + np.exp(-slope * odds - bias))
    figures: dict[str, float | bool] = {
        "accuracy": accuracy,
        "logistic_regression": by_plain,
        "held": low <= accuracy <= high,
        "ece": weighted_ece(curved, right, weights),
        "seconds": seconds,
    }
    figures |= unknown_figures(photos, pick[0], head.parts[0], pick[2], weights)
    for risk in RISKS:
        threshold = calibration.threshold(folds.max(1).tolist(), (folds.argmax(1) == labels[0]).tolist(), risk)
        answered = new.max(1) >= threshold
        share_wrong = (weights * ~right)[answered].sum() / weights[answered].sum() if answered.any() else 0.0
        figures |= {f"answered_{risk:g}": float(weights[answered].sum()), f"kept_{risk:g}": bool(share_wrong <= risk)}
    return figures


def unknown_figures(
    photos: Photos, train: Pictures, parts: list[int], others: Pictures, weights: Floats
) -> dict[str, float]:
    """Return how many photos are called unknown: of the known classes, of digits, and of classes that are left out."""
    features, labels = train.images.numpy(), train.labels.numpy()
    new, truths = others.images.numpy(), others.labels.numpy()
    detector = novelty.calibrated(features, labels, parts)
    measured = novelty.measure(features, labels, photos.names, folds_of)
    found = []
    for label in range(len(photos.names)):
        kept = labels != label
        without = novelty.calibrated(features[kept], labels[kept], folds_of(labels[kept]))
        found.append(float((without.p_values(new[truths == label]) <= novelty.SHARE).mean()))
    return {
        "unknown_others": float((weights * (detector.p_values(new) <= novelty.SHARE)).sum()),
        "unknown_digits": float((detector.p_values(photos.digits) <= novelty.SHARE).mean()),
        "left_out_measured": statistics.mean(measured["found"].values()),
        "left_out": statistics.mean(found),
    }


def folds_of(labels: NDArray[np.integer]) -> list[int]:
    """Return the part of each photo."""
    return stratified(labels.tolist(), FOLDS, "1")


def softmax(logits: Floats) -> Floats:
    """Return the softmax of each row."""
    values = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(values / values.sum(1, keepdims=True))


def weighted_ece(confidences: Floats, right: NDArray[np.bool_], weights: Floats, bins: int = 15) -> float:
    """Return the expected calibration error of weighted images, as `metrics.calibration_error`."""
    place, total = np.ceil(confidences * bins), 0.0
    for number in np.unique(place):
        here = place == number
        total += abs(float((weights * (right - confidences))[here].sum()))
    return total


def main() -> None:
    """Print the figures of every draw, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--drawable", type=int, default=6000)
    parser.add_argument("--others", type=int, default=10_000)
    parser.add_argument("--cache", default="cache")
    options = parser.parse_args()
    composition.register()
    photos = encode(options.folder, options.cache, options.drawable, options.others)
    rows = []
    for seed in range(1, options.draws + 1):
        rows.append(measure(photos, seed))
        print(seed, {name: round(value, 4) for name, value in rows[-1].items()}, flush=True)
    gains = [100 * (row["accuracy"] - row["logistic_regression"]) for row in rows]
    means = {name: statistics.mean(float(row[name]) for row in rows) for name in rows[0] if name != "seconds"}
    error = statistics.stdev(gains) / len(gains) ** 0.5
    seconds = statistics.median(row["seconds"] for row in rows)
    found = {"draws": len(rows), **means, "gain_points": statistics.mean(gains), "gain_standard_error": error}
    print(json.dumps({**found, "seconds": seconds}))


if __name__ == "__main__":
    main()
