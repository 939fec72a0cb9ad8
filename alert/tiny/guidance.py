"""How a model of three layers is taught to compare. By next-token prediction alone it did not learn that in minutes.

Comparing takes three steps, each of which is useless without the others: (1) a category's embeddings take up the name
before them; (2) the input image finds the embeddings that resemble it and takes up their name; (3) the reply takes the
name from the image. Here each layer is told its step: where one head of it has to look, and, for the first two, which
name its output has to hold, read with the model's own output projection ("deep supervision", Lee et al. 2015, arXiv
1409.5185). Our choice; pre-training only.

Shapes: B rows, L tokens of the longest row, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from alert.tiny.layout import NONE, Rows

NAME_BEFORE = 2  # "six ▁ <category>": a name's last token stands two before its first embedding
HEADS = (1, 0, 2)  # the head of each layer that is told where to look: any would do
SMALLEST = 1e-6  # share of attention below which the logarithm stays


@torch.no_grad()
def prefer_alike(model: Any) -> None:
    """Begin the second layer with equal keys and queries, so that alike tokens attend to each other from the start."""
    attention = model.model.language_model.layers[1].self_attn
    size = attention.head_dim
    attention.k_proj.weight.copy_(attention.q_proj.weight[HEADS[1] * size : (HEADS[1] + 1) * size])


def guidance(model: Any, rows: Rows, seen: torch.Tensor, output: Any, first: int, width: int) -> torch.Tensor:
    """Sum of the five losses, in nats.

    Args:
        model: A `Gemma3ForConditionalGeneration` of three layers, eager attention.
        rows: Episodes with categories.
        seen: Who sees whom in the second layer. Shape: [B, L, L], bool.
        output: What `tiny_layout.forward` returned.
        first: Id of the first category's first embedding.
        width: Embeddings of a category.
    """
    wanted = positions(rows, seen, first, width)
    losses = [look(layer[:, head], where) for layer, head, where in zip(output.attentions, HEADS, wanted, strict=True)]
    _, second, third, _ = output.hidden_states  # the inputs of the layers, and the output
    row, place = (rows.ids >= first).nonzero(as_tuple=True)
    own = rows.ids[row, place - (rows.ids[row, place] - first) % width - NAME_BEFORE]
    losses.append(hold(model, second[row, place], own))
    found = wanted[1].any(-1)
    losses.append(hold(model, third[found], rows.names[found]))
    return torch.stack(losses).sum()


def positions(rows: Rows, seen: torch.Tensor, first: int, width: int) -> list[torch.Tensor]:
    """Where the tokens of each layer have to look; nowhere where a layer is told nothing. Three of [B, L, L], bool."""
    category = ((rows.ids - first) // width).where(rows.ids >= first, NONE)
    begins = (rows.ids >= first) & ((rows.ids - first) % width == 0)
    name_of = torch.roll(category.where(begins, NONE), -NAME_BEFORE, dims=1)
    to_name = (category >= 0)[:, :, None] & (category[:, :, None] == name_of[:, None])
    to_alike = rows.images[:, :, None] & (rows.categories[:, :, None] == category[:, None]) & seen
    says_name = torch.roll(rows.targets & (rows.ids == rows.names), -1, dims=1)
    own = rows.parts[:, :, None] == rows.parts[:, None]
    return [to_name, to_alike, says_name[:, :, None] & rows.images[:, None] & own]


def look(attention: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean negative logarithm of the attention that goes where it is wanted.

    Args:
        attention: Of one head. Shape: [B, L, L].
        wanted: Shape: [B, L, L], bool; a token that wants nothing does not count.

    >>> round(float(look(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), torch.tensor([[[False, False], [True, False]]]))), 4)
    0.6931
    """
    share = (attention * wanted).sum(-1)[wanted.any(-1)]
    return -share.clamp(min=SMALLEST).log().mean()


def hold(model: Any, hidden: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of names, read from outputs of an inner layer. Shape: [tokens, D], [tokens] -> []."""
    return F.cross_entropy(model.lm_head(model.model.language_model.norm(hidden)), names)
