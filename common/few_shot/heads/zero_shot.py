"""Zero-shot CLIP (Radford et al. 2021): cosine similarity of an image to the mean of its class's prompts.

    logits = 100 x W^T

x: an image's feature of unit length. W: the text weights. All other learners start from these logits, so base.py
computes them (`cosine_logits`, `base_logits`), and the class adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.few_shot.heads.base import FewShotHead


def text_weights(prompts: Sequence[Tensor]) -> Tensor:
    """Return one weight vector per class: its prompts' features are normalised, averaged, and normalised again.

    A prompt that occurs twice counts twice, and classes of one name get equal weights.

    Args:
        prompts: Raw text features of every class. C tensors of shape [prompts of the class, D].

    Returns:
        Text weights of unit length. Shape: [C, D].

    Raises:
        ValueError: A class has no prompt.
    """
    if empty := [label for label, each in enumerate(prompts) if len(each) == 0]:
        raise ValueError(f"class number {empty[0]} has no prompt")
    return normalize(torch.stack([normalize(each, dim=1).mean(0) for each in prompts]), dim=1)


class ZeroShot(FewShotHead):
    """Zero-shot CLIP; never fitted."""
