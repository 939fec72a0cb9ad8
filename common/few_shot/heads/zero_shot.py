"""Zero-shot CLIP (Radford et al. 2021): the cosine of an image to the mean of its class's prompts.

    logits = 100 x W^T

x: an image's feature of length 1. W: the text weights. All other learners begin from these logits, so they are computed
in base.py (`cosine_logits`, `base_logits`), and the class has nothing to add.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.few_shot.heads.base import FewShotHead


def text_weights(prompts: Sequence[Tensor]) -> Tensor:
    """One weight per class: its prompts' features are normalised, averaged, and normalised again.

    A prompt that occurs twice counts twice, and classes of one name get equal weights.

    Args:
        prompts: Text features of every class, raw. C tensors of shape [prompts of the class, D].

    Returns:
        Of length 1. Shape: [C, D].

    Raises:
        ValueError: A class has no prompt.
    """
    if empty := [label for label, each in enumerate(prompts) if len(each) == 0]:
        raise ValueError(f"class number {empty[0]} has no prompt")
    return normalize(torch.stack([normalize(each, dim=1).mean(0) for each in prompts]), dim=1)


class ZeroShot(FewShotHead):
    """Zero-shot CLIP: never fitted."""
