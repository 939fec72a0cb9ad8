"""Noisy pictures: the same everywhere, as noisy as they say, of the same labels as the clean ones."""

from __future__ import annotations

import numpy as np
import pytest

from common.data import digits, noisy
from common.data.sampling import Sampling, draw
from common.types import UserError

READER = "common.data.digits.read"


def read(severity=3):
    return noisy.read(None, reader=READER, severity=severity)


def test_the_pictures_of_the_same_images_with_the_noise_that_it_says():
    clean, found = digits.read(None), read(5)
    assert [(i.image, i.label) for i in found.train] == [(f"noisy/{i.image}", i.label) for i in clean.train]
    # where clean pixels are half grey nothing is clipped: 0.38 x 255 = 96.9
    differences = []
    for item in found.train[:200]:
        before = np.asarray(clean.images.open(item.image.removeprefix("noisy/")), float)
        after = np.asarray(found.images.open(item.image), float)
        differences += (after - before)[(before > 110) & (before < 145) & (after > 0) & (after < 255)].tolist()
    assert np.std(differences) == pytest.approx(65.4, abs=4), (
        "a normal distribution of 96.9 cut off at 127.5 on both sides"
    )
    assert np.mean(differences) == pytest.approx(0, abs=4)


def test_a_picture_is_the_same_every_time_and_unlike_its_neighbour():
    found = read()
    first, again = (np.asarray(read().images.open("noisy/3")) for _ in range(2))
    assert (first == again).all()
    noise = [
        np.asarray(found.images.open(f"noisy/{k}"), int) - np.asarray(digits.read(None).images.open(k), int)
        for k in "34"
    ]
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.3
    assert read(1).fingerprint != read(2).fingerprint and read(1).images.stamp("noisy/3") != read(2).images.stamp(
        "noisy/3"
    )


def test_the_same_images_are_picked_as_without_noise():
    picks = [draw(source, Sampling(4, 1)) for source in (digits.read(None), read())]
    assert [f"noisy/{i.image}" for i in picks[0].test] == [i.image for i in picks[1].test]


def test_a_severity_that_does_not_exist():
    with pytest.raises(UserError, match=r"data\.reader\.severity=6: give 1 to 5"):
        read(6)
