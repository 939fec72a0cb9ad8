"""Zero-shot CLIP (Radford et al. 2021): the cosine of an image to the mean of its class's prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

SCALE = 100.0  # exp(logit_scale) of the trained CLIP models, and a literal in Tip-Adapter's, CaFo's and CALIP's code


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


def logits(images: Tensor, text: Tensor, scale: float = SCALE) -> Tensor:
    """
    Args:
        images: Raw features. Shape: [N, D].
        text: Of length 1. Shape: [C, D].
        scale: exp(logit_scale) of the model.

    Returns:
        Cosines times `scale`. Shape: [N, C].
    """
    return scale * normalize(images, dim=1) @ text.T
