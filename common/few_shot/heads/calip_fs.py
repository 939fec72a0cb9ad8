"""CALIP-FS, the trained CALIP (Guo et al. 2023), a reconstruction: its code was announced and never published.

One small network makes queries, keys and values of both the image's map and the class texts; what each side reads from
the other goes through one linear layer. Pooling and the three terms are CALIP's. Widths and weights are our choice.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from common.few_shot.heads.base import RECONSTRUCTION, GradientHead, Pictures, Plan, Text, maps_of
from common.few_shot.heads.calip import BETAS, three, weighed

HIDDEN = 256


class CrossAttention(nn.Module):
    """Shared by both sides."""

    def __init__(self, width: int, hidden: int = HIDDEN) -> None:
        """
        Args:
            width: D.
            hidden: Width of the two hidden layers.
        """
        super().__init__()
        self.before = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3 * width)
        )
        self.after = nn.Linear(width, width)

    def forward(self, positions: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            positions: Features of the map's positions, of length 1. Shape: [N, P, D].
            text: Text weights, of length 1. Shape: [C, D].

        Returns:
            What the texts read from the map, shape [N, C, D], and the map from the texts, shape [N, P, D].
        """
        of_map = self.before(positions).chunk(3, dim=-1)
        of_text = [part.expand(len(positions), -1, -1) for part in self.before(text).chunk(3, dim=-1)]
        by_text = scaled_dot_product_attention(of_text[0], of_map[1], of_map[2])
        by_map = scaled_dot_product_attention(of_map[0], of_text[1], of_text[2])
        return self.after(by_text), self.after(by_map)


def logits(
    attention: CrossAttention, images: Tensor, maps: Tensor, text: Tensor, betas: tuple[float, float, float] = BETAS
) -> Tensor:
    """
    Args:
        attention: The trained network.
        images: Raw features. Shape: [N, D].
        maps: Features of the positions, raw. Shape: [N, P, D].
        text: Text weights, of length 1. Shape: [C, D].
        betas: Weights of the three terms, as CALIP's; (1, 0, 0) is zero-shot CLIP.

    Returns:
        Shape: [N, C].
    """
    image, positions = normalize(images, dim=1), normalize(maps, dim=2)
    by_text, by_map = attention(positions, text)
    pooled = by_map.mean(1) + by_map.amax(1)
    terms = image @ text.T, (by_text @ image[:, :, None]).squeeze(2), pooled @ text.T
    return weighed(terms, betas)


class CalipFS(GradientHead):
    """CALIP-FS."""

    needs = frozenset({"text", "maps"})
    remark = RECONSTRUCTION
    module: CrossAttention | None

    def __init__(
        self,
        *,
        seed: int,
        epochs: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        betas: list[float],
        hidden: int = HIDDEN,
        drop_last: bool = False,
    ) -> None:
        """
        Args:
            seed: Draws the start and the order of the pictures.
            epochs: Passes over the shots.
            batch: Pictures in a step.
            learning_rate: Peak of the learning rate.
            weight_decay: Weight decay of SGD.
            betas: Weights of the three terms.
            hidden: Width of the hidden layers.
            drop_last: See `Plan`.
        """
        super().__init__(seed=seed, plan=Plan("sgd", epochs, batch, learning_rate, weight_decay, drop_last))
        self.betas, self.hidden = three(betas), hidden

    def build(self) -> nn.Module:
        return CrossAttention(self.text.known.shape[1], self.hidden)

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        assert self.module is not None
        return logits(self.module, pictures.images, maps_of(pictures), text.known, self.betas)
