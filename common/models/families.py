"""Everything that depends on the architecture of the vision-language model: one small class per model family.

A family defines position ids, which prompt tokens attend to each other in both directions (blocks), how the processor's
output is split into images, which ids must never be sampled, and how many tokens an image takes. Adding an architecture
means adding a family.

Shapes: B rows, P prompt tokens, L tokens of a row, A position axes, n images in the prompt.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from common.config.schema import FAMILIES
from common.plugins import locate
from common.types import UserError

if TYPE_CHECKING:
    import torch


class Family(ABC):
    """Interface to one architecture. Every family defines the abstract members; the others have common defaults."""

    # `model_type` in config.json
    model_type: ClassVar[str]
    # names of the modules that turn pixels into token embeddings
    vision: ClassVar[tuple[str, ...]]
    # full name of the last of these: it maps the tower's width to that of the language model
    projector: ClassVar[str]
    # whether tokens of an image attend to each other in both directions; vLLM supports that on some devices only
    both_ways: ClassVar[bool] = False
    # names of modules that take part in nothing here (audio), which stay as they are
    unused: ClassVar[tuple[str, ...]] = ()
    # whether token ids behind the vocabulary can have embeddings of their own (ALERT)
    extends: ClassVar[bool] = True
    # whether completions may share the row of their prompt; False if a layer carries a recurrent state along the row
    shares_prefixes: ClassVar[bool] = True

    @staticmethod
    def no_mask() -> Any:
        """Return the `attention_mask` that keeps transformers from building masks of its own.

        By default a dict by kind of layer.
        """
        return {"full_attention": None, "sliding_attention": None}

    @staticmethod
    def prepare() -> None:
        """Make the classes of transformers ready for use, before any is loaded; most are."""
        return None

    @staticmethod
    def check(config: dict[str, Any]) -> None:
        """Refuse a variant of the architecture that the family does not cover; `config` is config.json.

        Raises:
            UserError: Names what the model has.
        """
        return None

    @staticmethod
    def untiled(processor: Any, image_size: int) -> None:
        """Let a processor make one image of a square picture, with the tokens of `image_tokens`; most do."""
        return None

    @staticmethod
    def cap(config: Any) -> float | None:
        """Return the soft cap c of logits, which become c tanh(logit / c) behind the head; None: they are not capped.

        `config`: configuration of the whole model.
        """
        return None

    @staticmethod
    def content(text: str) -> Any:
        """Return a message without an image as chat templates take it: a text, or a list of parts."""
        return text

    @staticmethod
    @abstractmethod
    def positions(ids: torch.Tensor, grid: torch.Tensor | None, config: Any) -> torch.Tensor:
        """Return the position ids of one unpadded prompt. Shape: [P] -> [A, P]."""

    @staticmethod
    def position_ids(positions: torch.Tensor) -> torch.Tensor:
        """Return positions [A, B, L] in the shape that the model takes; unchanged where it has several axes."""
        return positions

    @staticmethod
    def blocks(ids: torch.Tensor, config: Any) -> torch.Tensor | None:
        """Return for each token the index of its bidirectional image block, -1 elsewhere; None: causal throughout.

        Shape: [P] -> [P].
        """
        return None

    @staticmethod
    def block_inputs(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the model inputs from which transformers builds masks for the blocks [B, L]."""
        raise ValueError("this family attends causally throughout")

    @staticmethod
    @abstractmethod
    def images(batch: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return pixels and grid of each image of a processed batch, in order."""

    @staticmethod
    @abstractmethod
    def pixel_inputs(pixels: Sequence[torch.Tensor], grids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the model inputs for images from `images`; `grids` is empty for a family without grids."""

    @staticmethod
    @abstractmethod
    def placeholder_tokens(config: Any) -> tuple[int, ...]:
        """Return the image placeholder ids, the image token first; forwards expect pixels there, so none is sampled."""

    @staticmethod
    @abstractmethod
    def image_tokens(config: dict[str, Any], image_size: int) -> int:
        """Return the number of prompt tokens of a square image of `image_size` pixels; `config` is config.json."""

    @staticmethod
    def smallest(processor: dict[str, Any]) -> int:
        """Return the side of the smallest square image, in pixels, that a processor does not enlarge; 0: it makes all
        images equally large.

        `processor`: content of preprocessor_config.json.
        """
        return 0

    @staticmethod
    def bound(processor: Any, image_size: int) -> None:
        """Limit a processor to the area of a square image of `image_size` pixels.

        A processor that resizes all images to one size needs no limit.
        """
        return None

    @staticmethod
    def complete(config: Any, processor: Any) -> None:
        """Write into a configuration what vLLM reads there and transformers in the processor; mostly nothing."""
        return None

    @staticmethod
    @abstractmethod
    def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Return outputs of the vision tower as input embeddings. Shape: [n, patches, V] -> [n, m, D]."""

    @staticmethod
    def in_order(model: Any, states: torch.Tensor, grids: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return outputs of the vision tower in the order of the patches that went in, and no others.

        Most towers keep the order and have no others. Shape: all patches of all images in any arrangement -> the same.
        """
        return states

    @staticmethod
    def features(output: Any) -> torch.Tensor:
        """Return what `get_image_features` gives for one image, as one tensor to store. Shape: [m, ...]."""
        import torch

        # Qwen2-VL returns a tuple with one tensor per image, Gemma 3 one tensor [1, m, D]
        found = output.pooler_output
        return torch.cat(list(found)) if isinstance(found, tuple | list) else found.flatten(0, -2)

    @staticmethod
    def feature_inputs(features: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Return the model inputs for stored `features` of all images, in the order of their tokens.

        `image_features` [image tokens, D] is put in place of embeddings by `logprobs.spliced`.
        """
        import torch

        return {"image_features": torch.cat(list(features))}

    @staticmethod
    def image_text(text: str) -> str:
        """Return a rendered chat with the text that the processor puts around images, one image token in each."""
        return text

    @staticmethod
    def hub_name(name: str) -> str:
        """Return the name of a parameter in hub checkpoints, which vLLM loads, for its name in transformers."""
        return name


class Qwen2VL(Family):
    """Qwen2-VL (arXiv 2409.12191): 3-D rotary positions (time, height, width), one token per 2x2 patches."""

    model_type: ClassVar[str] = "qwen2_vl"
    vision: ClassVar[tuple[str, ...]] = ("visual",)
    projector: ClassVar[str] = "model.visual.merger"

    @staticmethod
    def positions(ids: torch.Tensor, grid: torch.Tensor | None, config: Any) -> torch.Tensor:
        """Return M-RoPE positions (section 2.1): text advances all three axes, an image of h x w tokens by max(h, w).

        Args:
            ids: Prompt with its image tokens expanded. Shape: [P].
            grid: Patches per image (time, height, width), or None without an image. Shape: [n, 3].
            config: `Qwen2VLConfig` of the model.

        Returns:
            Shape: [3, P], int64, on the device of `ids`.
        """
        import torch

        merge = config.vision_config.spatial_merge_size
        starts = (ids == config.vision_start_token_id).nonzero()[:, 0].tolist()
        # first token of every image; a vision_start token alone begins no image
        starts = [s + 1 for s in starts if s + 1 < len(ids) and ids[s + 1] == config.image_token_id]
        pieces, done, position = [], 0, 0
        for start, (_, high, wide) in zip(starts, [] if grid is None else grid.tolist(), strict=True):
            high, wide = high // merge, wide // merge  # the merger turns merge x merge patches into one token
            # the text before the image: all axes count on
            text = torch.arange(start - done) + position
            position += start - done
            # the image: constant time, row, column
            cells = torch.arange(high * wide)
            image = torch.stack([torch.zeros_like(cells), cells // wide, cells % wide]) + position
            pieces += [text.expand(3, -1), image]
            done, position = start + high * wide, position + max(high, wide)
        pieces.append((torch.arange(len(ids) - done) + position).expand(3, -1))
        return torch.cat(pieces, dim=1).to(ids.device)

    @staticmethod
    def images(batch: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        # pixel_values has the patches of all images in one dimension; t x h x w of them belong to each
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
    def smallest(processor: dict[str, Any]) -> int:
        # despite its name, shortest_edge is the smallest number of pixels; older files call it min_pixels
        pixels = processor.get("size", {}).get("shortest_edge") or processor.get("min_pixels", 0)
        return math.ceil(math.sqrt(pixels))

    @staticmethod
    def bound(processor: Any, image_size: int) -> None:
        images = processor.image_processor
        cell = images.patch_size * images.merge_size
        # despite its name, longest_edge is the largest number of pixels
        images.size = {**dict(images.size), "longest_edge": (round(image_size / cell) * cell) ** 2}

    @staticmethod
    def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.model.visual.merger(hidden.flatten(0, 1)).view(
            len(hidden), -1, model.config.text_config.hidden_size
        )


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL (arXiv 2502.13923): as Qwen2-VL, but most layers of the vision tower attend within windows."""

    model_type: ClassVar[str] = "qwen2_5_vl"

    @staticmethod
    def in_order(model: Any, states: torch.Tensor, grids: Sequence[torch.Tensor]) -> torch.Tensor:
        """Undo the order of windows, in which the tower leaves its states. Shape: [patches of all images, V]."""
        import torch
        from transformers.vision_utils import get_vision_window_index

        tower = model.model.visual
        # for each place in the order of windows, the cell (2x2 patches) that stands there
        cells, _ = get_vision_window_index(
            torch.cat(list(grids)), tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        by_cell = states.view(len(cells), tower.spatial_merge_unit, -1)
        return by_cell[cells.argsort().to(states.device)].view_as(states)


class Qwen3VL(Qwen2VL):
    """Qwen3-VL (arXiv 2511.21631): cells of 32 pixels, and DeepStack (arXiv 2406.04334).

    DeepStack maps the states of K layers of the vision tower to the width of the language model, too, and adds them to
    the image tokens behind its first K layers. `project` and `projector` are about the last layer's states alone.
    """

    model_type: ClassVar[str] = "qwen3_vl"

    @staticmethod
    def no_mask() -> Any:
        return None  # its text model takes no dict; without a mask it builds none for a single row

    @staticmethod
    def image_tokens(config: dict[str, Any], image_size: int) -> int:
        return Qwen2VL.image_tokens({"vision_config": {"patch_size": 16, **config["vision_config"]}}, image_size)

    @staticmethod
    def features(output: Any) -> torch.Tensor:
        """Return the token embeddings, then the states to add behind each of the first layers. Shape: [m, 1 + K, D]."""
        import torch

        parts = (output.pooler_output, *output.deepstack_features)  # each a tuple with one tensor per image
        return torch.stack([torch.cat(list(part)) for part in parts], 1)

    @staticmethod
    def feature_inputs(features: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Return them as what `get_image_features` gives, which the model takes in its place.

        Shape: [m, 1 + K, D] of each image.
        """
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        parts: list[Any] = list(zip(*(image.unbind(1) for image in features), strict=True))
        output = BaseModelOutputWithDeepstackFeatures(pooler_output=parts[0], deepstack_features=parts[1:])
        return {"mm_encoder_outputs": {"image": output}}


class OneAxis(Family):
    """What families share whose positions count tokens and whose processor makes all images equally large."""

    @staticmethod
    def positions(ids: torch.Tensor, grid: torch.Tensor | None, config: Any) -> torch.Tensor:
        """Return 0, 1, 2, ... Shape: [P] -> [1, P]."""
        import torch

        return torch.arange(len(ids), device=ids.device)[None]

    @staticmethod
    def position_ids(positions: torch.Tensor) -> torch.Tensor:
        return positions[0]  # one axis: [B, L]

    @staticmethod
    def images(batch: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        return [(pixels, None) for pixels in batch["pixel_values"].split(1)]

    @staticmethod
    def pixel_inputs(pixels: Sequence[torch.Tensor], grids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        return {"pixel_values": torch.cat(list(pixels))}


class Gemma3(OneAxis):
    """Gemma 3 (arXiv 2503.19786): 1-D positions, sliding windows in most layers, 256 bidirectional tokens per image."""

    model_type: ClassVar[str] = "gemma3"
    vision: ClassVar[tuple[str, ...]] = ("vision_tower", "multi_modal_projector")
    projector: ClassVar[str] = "model.multi_modal_projector"
    both_ways: ClassVar[bool] = True

    @staticmethod
    def blocks(ids: torch.Tensor, config: Any) -> torch.Tensor | None:
        """Return one block for every unbroken run of image tokens, as in transformers."""
        import torch

        image = ids == config.image_token_id
        starts = image & ~torch.cat([torch.zeros_like(image[:1]), image[:-1]])
        return torch.where(image, starts.cumsum(0) - 1, -1)

    @staticmethod
    def block_inputs(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_type_ids": (blocks >= 0).long()}

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
        """Insert `vision_model`, which hub checkpoints have in the names of the vision tower.

        >>> Gemma3.hub_name("model.vision_tower.embeddings.patch_embedding.bias")
        'model.vision_tower.vision_model.embeddings.patch_embedding.bias'
        """
        return re.sub(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)", r"\1vision_model.", name)

    @staticmethod
    def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.model.multi_modal_projector(hidden)


class SmolVLM(OneAxis):
    """SmolVLM2 (arXiv 2504.05299): a Llama that reads one square image per picture, between tokens that mark it."""

    model_type: ClassVar[str] = "smolvlm"
    vision: ClassVar[tuple[str, ...]] = ("vision_model", "connector")
    projector: ClassVar[str] = "model.connector"

    @staticmethod
    def no_mask() -> Any:
        """Return a tensor of four axes and no content, which Llama hands on to the attention function as it is.

        Without one it would take positions that begin anew for separate texts, and build their mask.
        """
        import torch

        return torch.empty(1, 1, 0, 0)

    @staticmethod
    def prepare() -> None:
        """Let transformers' processor work without num2words, which writes the number of a video's frames."""
        from transformers.models.smolvlm import processing_smolvlm as module

        processing_smolvlm: Any = module
        if processing_smolvlm.num2words is None:
            processing_smolvlm.num2words = _no_videos

    @staticmethod
    def untiled(processor: Any, image_size: int) -> None:
        """Make one image of the tower's size; otherwise a picture is enlarged and cut into up to 16 tiles."""
        images = processor.image_processor
        images.do_image_splitting = False
        # what is made smaller in the end is not made larger before
        images.size = {"longest_edge": images.max_image_size["longest_edge"]}

    @staticmethod
    def content(text: str) -> Any:
        return [{"type": "text", "text": text}]  # its chat template drops what is no part

    @staticmethod
    def placeholder_tokens(config: Any) -> tuple[int, ...]:
        return (config.image_token_id,)

    @staticmethod
    def image_tokens(config: dict[str, Any], image_size: int) -> int:
        """Return the tower's patches over the square of `scale_factor`, whatever the image's size."""
        vision = config["vision_config"]
        side = vision.get("image_size", 224) // vision.get("patch_size", 32)
        return int(side**2 / config.get("scale_factor", 2) ** 2)

    @staticmethod
    def image_text(text: str) -> str:
        around = "<fake_token_around_image>"
        return text.replace("<image>", f"{around}<global-img><image>{around}")

    @staticmethod
    def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.model.connector(hidden)


class InternVL(OneAxis):
    """InternVL3.5 (arXiv 2508.18265) in its form for transformers: one image per picture, one token per 2x2 patches."""

    model_type: ClassVar[str] = "internvl"
    vision: ClassVar[tuple[str, ...]] = ("vision_tower", "multi_modal_projector")
    projector: ClassVar[str] = "model.multi_modal_projector"

    @staticmethod
    def untiled(processor: Any, image_size: int) -> None:
        """Make one image of the tower's size; otherwise a large picture is cut into up to 12 tiles and added whole."""
        # the whole processor asks its image processor for tiles whatever that says, so that the number decides
        processor.image_processor.crop_to_patches, processor.image_processor.max_patches = False, 1

    @staticmethod
    def placeholder_tokens(config: Any) -> tuple[int, ...]:
        return (config.image_token_id,)

    @staticmethod
    def image_tokens(config: dict[str, Any], image_size: int) -> int:
        return int(config.get("image_seq_length", 256))  # whatever the size: the processor resizes

    @staticmethod
    def image_text(text: str) -> str:
        return text.replace("<IMG_CONTEXT>", "<img><IMG_CONTEXT></img>")

    @staticmethod
    def in_order(model: Any, states: torch.Tensor, grids: Sequence[torch.Tensor]) -> torch.Tensor:
        """Drop the state of the class token, which is first. Shape: [n, 1 + patches, V] -> [n, patches, V]."""
        return states[:, 1:]

    @staticmethod
    def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(hidden.shape[1])
        cells = model.model.pixel_shuffle(hidden.unflatten(1, (side, side)), model.config.downsample_ratio)
        return model.model.multi_modal_projector(cells.flatten(1, 2))


class Gemma4(OneAxis):
    """Gemma 4 in its small sizes (E2B, E4B): an embedding by token for every layer, capped logits, causal images.

    The last layers use keys and values of earlier ones. A picture is resized to fill a budget of tokens, which
    `model.image_size` chooses, and padded to it; where its patches stand is given beside the pixels, as their `grid`.
    """

    model_type: ClassVar[str] = "gemma4"
    vision: ClassVar[tuple[str, ...]] = ("vision_tower", "embed_vision")
    projector: ClassVar[str] = "model.embed_vision"
    unused: ClassVar[tuple[str, ...]] = ("audio_tower", "embed_audio")
    extends: ClassVar[bool] = False  # such ids would need embeddings for every layer, too

    @staticmethod
    def check(config: dict[str, Any]) -> None:
        """Refuse the large sizes, in which image tokens attend in both directions, though not in every layer."""
        if both := config.get("text_config", {}).get("use_bidirectional_attention"):
            raise UserError(
                f"the model's use_bidirectional_attention is {both}, as in Gemma 4's large sizes, which"
                " model.family=gemma4 does not cover: take E2B or E4B"
            )

    @staticmethod
    def images(batch: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        return list(zip(batch["pixel_values"].split(1), batch["image_position_ids"].split(1), strict=True))

    @staticmethod
    def pixel_inputs(pixels: Sequence[torch.Tensor], grids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        return {"pixel_values": torch.cat(list(pixels)), "image_position_ids": torch.cat(list(grids))}

    @staticmethod
    def placeholder_tokens(config: Any) -> tuple[int, ...]:
        names = ("image_token_id", "video_token_id", "audio_token_id", "boi_token_id", "eoi_token_id", "boa_token_id")
        ids = [getattr(config, name) for name in (*names, "eoa_token_index")]
        return tuple(token for token in ids if token is not None)

    @staticmethod
    def image_tokens(config: dict[str, Any], image_size: int) -> int:
        """Return the largest square number of tokens within the budget that `image_size` needs."""
        return math.isqrt(_budget(config["vision_config"], image_size)) ** 2

    @staticmethod
    def untiled(processor: Any, image_size: int) -> None:
        """Set the budget of tokens: the smallest in which a square picture of `image_size` pixels is not reduced."""
        images = processor.image_processor
        images.max_soft_tokens = _budget(
            {"patch_size": images.patch_size, "pooling_kernel_size": images.pooling_kernel_size}, image_size
        )

    @staticmethod
    def complete(config: Any, processor: Any) -> None:
        """Write the budget of tokens, by which vLLM counts those of an image."""
        config.vision_config.default_output_length = processor.image_processor.max_soft_tokens

    @staticmethod
    def cap(config: Any) -> float | None:
        found: float | None = config.get_text_config().final_logit_softcapping
        return found

    @staticmethod
    def feature_inputs(features: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Return them as what `get_image_features` gives, so that the model still sees the ids of all tokens."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        output = BaseModelOutputWithPooling(pooler_output=tuple(features))  # type: ignore[arg-type]
        return {"mm_encoder_outputs": {"image": output}}

    @staticmethod
    def image_text(text: str) -> str:
        return text.replace("<|image|>", "<|image><|image|><image|>")

    @staticmethod
    def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.model.embed_vision(hidden)


BUDGETS = (70, 140, 280, 560, 1120)  # image tokens that Gemma 4's processor may be told to fill


def _budget(vision: dict[str, Any], image_size: int) -> int:
    cell = vision.get("patch_size", 16) * vision.get("pooling_kernel_size", 3)  # side of a token, in pixels
    return next((budget for budget in BUDGETS if math.isqrt(budget) * cell >= image_size), BUDGETS[-1])


def _no_videos(frames: int) -> str:
    raise ImportError("transformers' processor of SmolVLM reads videos only with num2words: uv pip install num2words")


def family(name: str) -> type[Family]:
    """Return the class that `model.family` names: a short name for those here, a dotted path for any other.

    Raises:
        UserError: There is no such class, or it does not derive from `Family`.
    """
    found = locate(FAMILIES.get(name, name), "model.family")
    if not (isinstance(found, type) and issubclass(found, Family)):
        raise UserError(f"model.family={name} does not derive from Family (common/models/families.py)")
    return found
