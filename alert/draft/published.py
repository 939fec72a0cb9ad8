"""Published accuracies of ALERT over two candidates, which recall@2 of the candidates bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

K = 2
ACCURACY: dict[str, dict[int | str, float]] = {
    "imagenet": {1: 76.95, 2: 77.80, 4: 78.63, 8: 78.69, 16: 78.74},  # Table 1
    "imagenet_v2": {16: 76.70},  # Table 2
    "imagenet_sketch": {16: 69.12},
    "oxford_pets": {16: 92.3},  # figure 4
    "caltech101": {16: 96.8},
    "dtd": {16: 75.5},
    "food101": {16: 89.7},
    "eurosat": {16: 85.6},
}


def above(dataset: str, shots: int | str, recall: Mapping[str, float]) -> dict[str, Any]:
    """A sentence if ALERT's published accuracy lies above what these candidates could ever give; else nothing.

    Args:
        dataset: That was tested.
        shots: Of the training.
        recall: `recall@2` of the candidates, a share of 1.

    >>> above("imagenet_sketch", 16, {"recall@2": 0.53})["published_above_bound"]
    "ALERT's published 69.12 % lies above recall@2 of these candidates, 53.00 %: it was not reached over such ones"
    >>> above("imagenet_sketch", 16, {"recall@2": 0.7}), above("dtd", 4, {"recall@2": 0.1})
    ({}, {})
    """
    bound, accuracy = recall.get(f"recall@{K}"), ACCURACY.get(dataset, {}).get(shots)
    if bound is None or accuracy is None or accuracy <= 100 * bound:
        return {}
    said = (
        f"ALERT's published {accuracy:.2f} % lies above recall@{K} of these candidates, {100 * bound:.2f} %: it was not"
        " reached over such ones"
    )
    return {"published_above_bound": said}
