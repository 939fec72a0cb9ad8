"""Everything that depends on the architecture of the vision-language model, one small adapter per family.

An adapter says where each prompt token sits (position ids), which prompt tokens see each other both ways (blocks), how
the processor's output is cut into images, which ids must never be sampled, and how many tokens an image takes. Adding
an architecture means adding one here.

Shapes: B rows, P prompt tokens, L tokens of a row, A position axes, n images in the prompt.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from common.config.schema import FAMILIES
from common.plugins import locate

if TYPE_CHECKING:
    import torch


class Family(ABC):
    """What depends on the architecture. The abstract members are for every family; the others have usual answers."""

    # What config.json calls the architecture.
    model_type: ClassVar[str]
    # The modules that turn pixels into token embeddings, by their names in the model.
    vision: ClassVar[tuple[str, ...]]
    # The last of these, from the tower's width to that of the language model, by its full name.
    projector: ClassVar[str]
    # Whether the tokens of an image see each other both ways. vLLM can do that on some devices only.
    both_ways: ClassVar[bool] = False
    # Whether completions may share the row of their prompt. Not where a layer carries a state along the row.
    shares_prefixes: ClassVar[bool] = True
    # The `attention_mask` with which transformers makes no mask of its own: one entry per kind of layer.
    no_mask: ClassVar[Any] = {"full_attention": None, "sliding_attention": None}

    @staticmethod
    @abstractmethod
    def positions(ids: torch.Tensor, grid: torch.Tensor | None, config: Any) -> torch.Tensor:
        """Position ids of one unpadded prompt. Shape: [P] -> [A, P]."""

    @staticmethod
    def position_ids(positions: torch.Tensor) -> torch.Tensor:
        """Positions [A, B, L] in the shape that the model takes; this one is for several axes."""
        return positions

    @staticmethod
    def blocks(ids: torch.Tensor, config: Any) -> torch.Tensor | None:
        """Number of the image whose tokens see each other both ways, -1 elsewhere; None: causal throughout.

        Shape: [P] -> [P].
        """
        return None

    @staticmethod
    def block_inputs(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        """What tells transformers' own masks about the blocks [B, L]."""
        raise ValueError("this family attends causally throughout")

    @staticmethod
    @abstractmethod
    def images(batch: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Pixels and grid of each image of a processed batch, in order."""

    @staticmethod
    @abstractmethod
    def pixel_inputs(pixels: Sequence[torch.Tensor], grids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the model takes for some images, as `images` gave them; `grids` is empty where the family has none."""

    @staticmethod
    @abstractmethod
    def placeholder_tokens(config: Any) -> tuple[int, ...]:
        """Ids that stand for pixels, the image token first; a policy that emitted one would break the next forward."""

    @staticmethod
    @abstractmethod
    def image_tokens(config: dict[str, Any], image_size: int) -> int:
        """Number of prompt tokens that a square image of `image_size` pixels takes; `config` is config.json."""

    @staticmethod
    def bound(processor: Any, image_size: int) -> None:
        """Let a processor make no picture larger than a square one of `image_size` pixels; that one stays as it is.

        Nothing is to do where a processor makes pictures of one size.
        """
        return None

    @staticmethod
    @abstractmethod
    def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs of the vision tower as input embeddings. Shape: [n, patches, V] -> [n, m, D]."""

    @staticmethod
    def image_text(text: str) -> str:
        """A rendered chat with the text that the processor puts around its images, one image token in each."""
        return text

    @staticmethod
    def hub_name(name: str) -> str:
        """A parameter's name in transformers as checkpoints on the hub have it, which vLLM loads."""
        return name


class Qwen2VL(Family):
    """Qwen2-VL (arXiv 2409.12191): 3-D rotary positions (time, height, width), one token per 2x2 patches."""

    model_type: ClassVar[str] = "qwen2_vl"
    vision: ClassVar[tuple[str, ...]] = ("visual",)
    projector: ClassVar[str] = "model.visual.merger"

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
    def images(batch: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        grids = batch["image_grid_thw"]
        return list(zip(batch["pixel_values"].split(grids.prod(1).tolist()), grids.split(1), strict=True))

    @staticmethod
    def pixel_inputs(pixels: Sequence[torch.Tensor], grids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        return {"pixel_values": torch.cat(list(pixels)), "image_grid_thw": torch.cat(list(grids))}

    @staticmethod
    def placeholder_tokens(config: Any) -> tuple[int, ...]:
        return (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)

    @staticmethod
    def image_tokens(config: dict[str, Any], image_size: int) -> int:
        vision = config["vision_config"]
        cell = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
        return round(image_size / cell) ** 2  # the processor rounds each side to whole cells

    @staticmethod
    def bound(processor: Any, image_size: int) -> None:
        images = processor.image_processor
        cell = images.patch_size * images.merge_size
        images.size = {**dict(images.size), "longest_edge": (round(image_size / cell) * cell) ** 2}  # pixels

    @staticmethod
    def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.model.visual.merger(hidden.flatten(0, 1)).view(
            len(hidden), -1, model.config.text_config.hidden_size
        )


class Gemma3(Family):
    """Gemma 3 (arXiv 2503.19786): 1-D positions, most layers with a sliding window, and an image of 256 tokens that see
    each other both ways.
    """

    model_type: ClassVar[str] = "gemma3"
    vision: ClassVar[tuple[str, ...]] = ("vision_tower", "multi_modal_projector")
    projector: ClassVar[str] = "model.multi_modal_projector"
    both_ways: ClassVar[bool] = True

    @staticmethod
    def positions(ids: torch.Tensor, grid: torch.Tensor | None, config: Any) -> torch.Tensor:
        """Plain counting. Shape: [P] -> [1, P]."""
        import torch

        return torch.arange(len(ids), device=ids.device)[None]

    @staticmethod
    def position_ids(positions: torch.Tensor) -> torch.Tensor:
        return positions[0]

    @staticmethod
    def blocks(ids: torch.Tensor, config: Any) -> torch.Tensor | None:
        """Every unbroken run of image tokens is one block, as in transformers."""
        import torch

        image = ids == config.image_token_id
        starts = image & ~torch.cat([torch.zeros_like(image[:1]), image[:-1]])
        return torch.where(image, starts.cumsum(0) - 1, -1)

    @staticmethod
    def block_inputs(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_type_ids": (blocks >= 0).long()}

    @staticmethod
    def images(batch: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        return [(pixels, None) for pixels in batch["pixel_values"].split(1)]

    @staticmethod
    def pixel_inputs(pixels: Sequence[torch.Tensor], grids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        return {"pixel_values": torch.cat(list(pixels))}

    @staticmethod
    def placeholder_tokens(config: Any) -> tuple[int, ...]:
        return (config.image_token_id, config.boi_token_index, config.eoi_token_index)

    @staticmethod
    def image_tokens(config: dict[str, Any], image_size: int) -> int:
        return int(config["mm_tokens_per_image"])  # whatever the size: the processor resizes

    @staticmethod
    def image_text(text: str) -> str:
        return text.replace("<start_of_image>", "\n\n<start_of_image><image_soft_token><end_of_image>\n\n")

    @staticmethod
    def hub_name(name: str) -> str:
        """
        >>> Gemma3.hub_name("model.vision_tower.embeddings.patch_embedding.bias")
        'model.vision_tower.vision_model.embeddings.patch_embedding.bias'
        """
        return re.sub(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)", r"\1vision_model.", name)

    @staticmethod
    def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.model.multi_modal_projector(hidden)


def family(name: str) -> type[Family]:
    """The adapter that `model.family` names: one of ours by its short name, any other by its dotted path."""
    return cast("type[Family]", locate(FAMILIES.get(name, name), "model.family"))
