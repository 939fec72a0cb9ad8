"""Cross-validate: divide images into parts, and classify each part by a fit that has not seen it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.few_shot.heads.base import FewShotHead, Pictures, Text, all_logits, fit

FOLDS = 5  # parts where a configuration does not say
UNKNOWN = -1  # part of an image that is always trained on, such as the only one of its class


def divide(labels: Sequence[int], groups: Sequence[str], folds: int, repeats: int, seed: int) -> list[list[int]]:
    """Divide images into parts several times; those in no part are the same every time.

    Args:
        labels: Class indices. Length: N.
        groups: Group of each image, which stays in one part; empty: each image is on its own.
        folds: Number of parts.
        repeats: Number of times.
        seed: Seed of the parts.

    Returns:
        For each time the part of each image, UNKNOWN for one that is in none.
    """
    seeds = [f"{seed}-{repeat}" for repeat in range(repeats)]
    if not any(groups):
        return [stratified(labels, folds, each) for each in seeds]
    divided = [stratified_groups(labels, groups, folds, each) for each in seeds]
    known = [UNKNOWN not in places for places in zip(*divided, strict=True)]
    return [[part if there else UNKNOWN for part, there in zip(parts, known, strict=True)] for parts in divided]


def out_of_fold(fitted: FewShotHead, build: Callable[[], FewShotHead], parts: Sequence[int]) -> Tensor:
    """Classify the images of each part by fits on the others, which take the values that the finished fit has chosen.

    A fit on other images can have logits of another scale (an unregularised probe), and a temperature would be that of
    the scale. So each fit's logits are brought to the finished fit's spread on the validation images, if there are any.

    Args:
        fitted: The learner after its fit.
        build: Function that returns the learner, not fitted.
        parts: Part of each training image, UNKNOWN for one that is always trained on. Length: N.

    Returns:
        Logits; NaN for images in no part. Shape: [N, C].
    """
    train, val, text = fitted.train, fitted.val, fitted.text
    places = torch.tensor(parts, device=train.seen.labels.device)
    logits = train.seen.images.new_full((len(parts), len(text.names)), torch.nan, dtype=torch.float32)
    for part in sorted({*parts} - {UNKNOWN}):
        tested = places == part
        learner = build()
        learner.follow(fitted)
        fit(learner, train.take(~tested), val, text, fitted.test)
        scale = 1.0 if val is None else spread(fitted, val, text) / spread(learner, val, text)
        logits[tested] = scale * all_logits(learner, train.seen.take(tested), text).float()
    return logits


def out_of_selection(fitted: FewShotHead, build: Callable[[], FewShotHead], seed: int) -> Tensor:
    """Classify the validation images of each part by fits that chose their settings by the others.

    A fit searches strengths and epochs on the validation images, so it is right on more of them than on new ones. The
    training images are the same in all fits; logits are brought to the finished fit's spread, as in `out_of_fold`.

    Args:
        fitted: The learner after its fit, with validation images.
        build: Function that returns the learner, not fitted.
        seed: Seed of the parts.

    Returns:
        Logits of the validation images. Shape: [N, C].
    """
    val, text = fitted.val, fitted.text
    assert val is not None, "method.fusion is refused without validation images"
    known = val.labels.tolist()
    parts = torch.tensor(stratified(known, min(FOLDS, len(val)), str(seed), least=1), device=val.labels.device)
    logits = val.images.new_empty((len(val), len(text.names)), dtype=torch.float32)
    for part in parts.unique():
        tested, learner = parts == part, build()
        fit(learner, fitted.train, val.take(~tested), text, fitted.test)
        scale = spread(fitted, val, text) / spread(learner, val, text)
        logits[tested] = scale * all_logits(learner, val.take(tested), text).float()
    return logits


def spread(learner: FewShotHead, pictures: Pictures, text: Text) -> float:
    """Return the standard deviation of an image's logits over the classes, in the mean of the images."""
    return float(all_logits(learner, pictures, text).float().std(1).mean())


def stratified(labels: Sequence[int], folds: int, seed: str, least: int = 2) -> list[int]:
    """Divide images into parts in which the classes have nearly equal shares.

    The images of each class, shuffled, go to the parts in turn, and each class goes on where the one before ended, so
    that the parts are of one size, too. The only image of a class is in no part: it is always trained on.

    Args:
        labels: Class indices. Length: N.
        folds: Number of parts.
        seed: Seed of the shuffle.
        least: Images without which a class is in no part; 1 where nothing is trained on the others.

    Returns:
        The part of each image, -1 for one that is in none. Length: N.

    >>> stratified([0, 0, 0, 0, 1, 1, 2], 2, "1")
    [1, 1, 0, 0, 0, 1, -1]
    """
    rng = random.Random(f"folds-{seed}")
    by_class: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        by_class.setdefault(label, []).append(place)
    parts, turn = [UNKNOWN] * len(labels), 0
    for _, places in sorted(by_class.items()):
        if len(places) < least:
            continue
        for place in rng.sample(places, len(places)):
            parts[place] = turn % folds
            turn += 1
    return parts


def stratified_groups(labels: Sequence[int], groups: Sequence[str], folds: int, seed: str) -> list[int]:
    """Divide images into parts as `stratified` does, but keep groups whole (scikit-learn's StratifiedGroupKFold).

    A class whose images would all lie in one part is in no part, with the groups of its images: no fit would know it.

    Args:
        labels: Class indices. Length: N.
        groups: Group of each image; "": it is on its own. Length: N.
        folds: Number of parts.
        seed: Seed of the shuffle.

    Returns:
        The part of each image, -1 for one that is in none. Length: N.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    names = [group or f"\0{place}" for place, group in enumerate(groups)]  # no group begins with NUL
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    of_group = [numbers[name] for name in names]
    count = min(folds, len(numbers))
    if count < 2:
        return [UNKNOWN] * len(labels)
    shuffle = random.Random(f"folds-{seed}").getrandbits(32)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=shuffle)
    parts = [UNKNOWN] * len(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a class has fewer images than there are parts
        for part, (_, tested) in enumerate(splitter.split(labels, labels, of_group)):
            for place in tested.tolist():
                parts[place] = part
    where: dict[int, set[int]] = {}
    for label, part in zip(labels, parts, strict=True):
        where.setdefault(label, set()).add(part)
    always = {group for group, label in zip(of_group, labels, strict=True) if len(where[label]) == 1}
    return [UNKNOWN if group in always else part for group, part in zip(of_group, parts, strict=True)]
