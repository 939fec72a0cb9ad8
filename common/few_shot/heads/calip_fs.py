"""CALIP-FS, the trained CALIP (Guo et al. 2023), a reconstruction: its code was announced and never published.

One small network makes queries, keys and values of both the image's map and the class texts; both attention outputs go
through one linear layer. Pooling and the three terms are CALIP's. Widths and weights are our choice.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from common.few_shot.heads.base import RECONSTRUCTION, GradientHead, Pictures, Plan, Text, maps_of
from common.few_shot.heads.calip import BETAS, three, weighed

HIDDEN = 256


class CrossAttention(nn.Module):
    """Attention in both directions between map and texts, with shared parameters."""

    def __init__(self, width: int, hidden: int = HIDDEN) -> None:
        """
        Args:
            width: D.
            hidden: Width of the two hidden layers of the projection.
        """
        super().__init__()
        self.before = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3 * width)
        )
        self.after = nn.Linear(width, width)

    def forward(self, positions: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from the texts to the map and from the map to the texts.

        Args:
            positions: Features of the map's positions, of unit length. Shape: [N, P, D].
            text: Text weights of unit length. Shape: [C, D].

        Returns:
            Outputs of the texts' attention to the map, shape [N, C, D], and of the map's attention to the texts, shape
            [N, P, D].
        """
        # queries, keys and values of both sides, made by the same network
        of_map = self.before(positions).chunk(3, dim=-1)
        of_text = [part.expand(len(positions), -1, -1) for part in self.before(text).chunk(3, dim=-1)]
        by_text = scaled_dot_product_attention(of_text[0], of_map[1], of_map[2])
        by_map = scaled_dot_product_attention(of_map[0], of_text[1], of_text[2])
        return self.after(by_text), self.after(by_map)


def logits(
    attention: CrossAttention, images: Tensor, maps: Tensor, text: Tensor, betas: tuple[float, float, float] = BETAS
) -> Tensor:
    """Return CALIP-FS's logits.

    Args:
        attention: Trained network.
        images: Raw features. Shape: [N, D].
        maps: Features of the positions, raw. Shape: [N, P, D].
        text: Text weights of unit length. Shape: [C, D].
        betas: Weights of CALIP's three terms; (1, 0, 0) is zero-shot CLIP.

    Returns:
        Logits. Shape: [N, C].
    """
    image, positions = normalize(images, dim=1), normalize(maps, dim=2)
    by_text, by_map = attention(positions, text)
    pooled = by_map.mean(1) + by_map.amax(1)
    # CALIP's three terms: global, the texts' side, the map's side.
    terms = image @ text.T, (by_text @ image[:, :, None]).squeeze(2), pooled @ text.T
    return weighed(terms, betas)


class CalipFS(GradientHead):
    """CALIP-FS, trained by SGD; a reconstruction."""

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
            seed: Seed of initialisation and order of the images.
            epochs: Passes over the shots.
            batch: Images in a step.
            learning_rate: Peak learning rate.
            weight_decay: Weight decay of SGD.
            betas: Weights of the three terms.
            hidden: Width of the hidden layers.
            drop_last: Drop an incomplete last batch, see `Plan`.
        """
        super().__init__(seed=seed, plan=Plan("sgd", epochs, batch, learning_rate, weight_decay, drop_last))
        self.betas, self.hidden = three(betas), hidden

    def build(self) -> nn.Module:
        return CrossAttention(self.text.known.shape[1], self.hidden)

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        assert self.module is not None
        return logits(self.module, pictures.images, maps_of(pictures), text.known, self.betas)
