"""Everything that depends on the architecture of the vision-language model, one small adapter per family.

An adapter answers four questions: where each prompt token sits (position ids), which attention masks a mask-free
forward needs, which ids must never be sampled, and how many tokens an image takes. Adding an architecture means
adding one here.

Shapes: P prompt tokens, n images in the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Family(Protocol):
    """What the rest of the framework asks about an architecture."""

    @staticmethod
    def positions(ids: torch.Tensor, grid: torch.Tensor | None, config: Any) -> torch.Tensor:
        """Position ids of one unpadded prompt. Shape: [P] -> [axes, P]."""

    @staticmethod
    def no_mask() -> dict[str, None]:
        """`attention_mask` of a forward whose attention function builds its own mask."""

    @staticmethod
    def placeholder_tokens(config: Any) -> tuple[int, ...]:
        """Ids that stand for pixels, the image token first; a policy that emitted one would break the next forward."""

    @staticmethod
    def image_tokens(config: dict[str, Any], image_size: int) -> int:
        """Number of prompt tokens that a square image of `image_size` pixels takes; `config` is config.json."""


class Qwen2VL:
    """Qwen2-VL (arXiv 2409.12191): 3-D rotary positions (time, height, width), one token per 2x2 patches."""

    @staticmethod
    def positions(ids: torch.Tensor, grid: torch.Tensor | None, config: Any) -> torch.Tensor:
        """M-RoPE of section 2.1: text advances all three axes; an image of h x w tokens advances them by max(h, w).

        Args:
            ids: Prompt with its image tokens expanded. Shape: [P].
            grid: Patches per image (time, height, width), or None without an image. Shape: [n, 3].
            config: The model's `Qwen2VLConfig`.

        Returns:
            Shape: [3, P], int64, on the device of `ids`.
        """
        import torch

        merge = config.vision_config.spatial_merge_size
        starts = (ids == config.vision_start_token_id).nonzero()[:, 0].tolist()
        starts = [s + 1 for s in starts if s + 1 < len(ids) and ids[s + 1] == config.image_token_id]
        pieces, done, position = [], 0, 0
        for start, (_, high, wide) in zip(starts, [] if grid is None else grid.tolist(), strict=True):
            high, wide = high // merge, wide // merge
            text = torch.arange(start - done) + position
            position += start - done
            cells = torch.arange(high * wide)
            image = torch.stack([torch.zeros_like(cells), cells // wide, cells % wide]) + position
            pieces += [text.expand(3, -1), image]
            done, position = start + high * wide, position + max(high, wide)
        pieces.append((torch.arange(len(ids) - done) + position).expand(3, -1))
        return torch.cat(pieces, dim=1).to(ids.device)

    @staticmethod
    def no_mask() -> dict[str, None]:
        return {"full_attention": None, "sliding_attention": None}

    @staticmethod
    def placeholder_tokens(config: Any) -> tuple[int, ...]:
        return (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)

    @staticmethod
    def image_tokens(config: dict[str, Any], image_size: int) -> int:
        vision = config["vision_config"]
        cell = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
        return round(image_size / cell) ** 2  # the processor rounds each side to whole cells


FAMILIES: dict[str, type[Family]] = {"qwen2_vl": Qwen2VL}
