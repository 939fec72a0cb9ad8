"""Encode prompts as tensors: token ids, pixels (or image features) and position ids.

Shapes: P prompt tokens, A position axes, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.models.adapters import without_adapters
from common.models.extra_embeddings import expand_placeholders
from common.models.meter import messages, too_long
from common.models.vision import FeatureStore
from common.models.vlm import VLM, rendered
from common.types import CATEGORY, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class EncodedPrompt:
    """Prompt as tensors: ids [P] with expanded image tokens, position ids [A, P], and its image.

    The image is given as `pixel_values` (with `grid` if the family has one), or as `features` [image tokens, D] of
        a frozen vision tower (or more of them, see `Family.features`), or not at all.
    blocks: [P], see `Family.blocks`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    pixel_values: torch.Tensor | None = None
    grid: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    features: torch.Tensor | None = None


class PromptEncoder:
    """Encoder of prompts with a bounded cache (first in, first out), so that small runs decode each image once."""

    def __init__(
        self,
        vlm: VLM,
        load_images: Callable[[Sequence[str]], list[Image]],
        max_tokens: int | None,
        store: FeatureStore | None = None,
        cache_bytes: int = 512 * 2**20,
    ) -> None:
        """
        Args:
            vlm: Model whose processor is used, and whose vision tower if there is a store.
            load_images: Function from keys to RGB images of the model's size (see `common.data.loading.Loader`).
            max_tokens: Limit on a prompt's length, image tokens included; None: no limit.
            store: Store for features of the frozen vision tower, which replace pixels; None: return pixels.
            cache_bytes: Largest size of the cache.
        """
        self.vlm, self.load_images, self.max_tokens = vlm, load_images, max_tokens
        self.store, self.cache_bytes, self.used = store, cache_bytes, 0
        self.memory: OrderedDict[Prompt, EncodedPrompt] = OrderedDict()

    def __call__(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Encode prompts on the CPU.

        Raises:
            UserError: A prompt is longer than the limit.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.memory]
        fresh = dict(zip(missing, self._encode(missing), strict=True)) if missing else {}
        # collected before the cache is trimmed, which may drop any of them
        encodings = [fresh[prompt] if prompt in fresh else self.memory[prompt] for prompt in prompts]
        for prompt, encoded in fresh.items():
            self.memory[prompt] = encoded
            self.used += _bytes(encoded)
        while self.used > self.cache_bytes and self.memory:
            self.used -= _bytes(self.memory.popitem(last=False)[1])
        return encodings

    def set_images(self, load_images: Callable[[Sequence[str]], list[Image]]) -> None:
        """Replace the source of images and clear the cache, since a key may stand for another image now."""
        self.load_images = load_images
        self.memory.clear()
        self.used = 0

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        processor, family, config = self.vlm.processor, self.vlm.family, self.vlm.model.config
        pictures = [[picture] for picture in self.load_images([p.image for p in prompts])]
        texts = [self._render(prompt) for prompt in prompts]
        # add_special_tokens=False, because the template has already written what begins a sequence (Gemma: <bos>)
        batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt", add_special_tokens=False)
        keep = batch["attention_mask"].bool()  # the padding that made one batch is removed again
        encoded = []
        for row, (prompt, (pixels, grid)) in enumerate(zip(prompts, family.images(batch), strict=True)):
            ids = self._with_categories(prompt, batch["input_ids"][row][keep[row]])
            if self.max_tokens is not None and len(ids) > self.max_tokens:
                raise too_long(len(ids), self.max_tokens, prompt)
            positions = family.positions(ids, grid, config)
            blocks = None if self.vlm.causal_images else family.blocks(ids, config)
            pixels = pixels.to(self.vlm.model.dtype)
            if self.store is None:
                encoded.append(EncodedPrompt(ids, positions, pixels, grid, blocks))
            else:
                encoded.append(EncodedPrompt(ids, positions, None, None, blocks, self._features(pixels, grid)))
        return encoded

    def unexpanded(self, prompt: Prompt) -> torch.Tensor:
        """Return the ids of a prompt with a single placeholder for its image, as vLLM takes them. Shape: [U].

        In the ids of the processor, the placeholder is repeated for every image token.
        """
        ids = self.vlm.processor.tokenizer(self._render(prompt), add_special_tokens=False)["input_ids"]
        return self._with_categories(prompt, torch.tensor(ids))

    def pictures(self, prompt: Prompt) -> list[Image]:
        """Return the image of a prompt at the model's size."""
        return self.load_images([prompt.image])

    def _render(self, prompt: Prompt) -> str:
        """Return the rendered chat; a padding token marks every place of a category's embeddings."""
        processor = self.vlm.processor
        text = rendered(processor, messages(prompt, self.vlm.family))
        return text.replace(CATEGORY, processor.tokenizer.pad_token) + prompt.begun

    def _with_categories(self, prompt: Prompt, ids: torch.Tensor) -> torch.Tensor:
        if not prompt.categories:
            return ids
        extra = self.vlm.extra_embeddings
        assert extra is not None, "a method with category embeddings attaches them to the model"
        return expand_placeholders(ids, self.vlm.pad, prompt.categories, extra.first, extra.width)

    @torch.no_grad()
    def _features(self, pixels: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
        """Return the features of one image, from the store if it has them. Shape: see `EncodedPrompt`."""
        assert self.store is not None
        key = self.store.key(pixels, grid)
        features = self.store.get(key)
        if features is None:
            device = self.vlm.device
            inputs = self.vlm.family.pixel_inputs([pixels], [] if grid is None else [grid])
            base = without_adapters(self.vlm.model)
            output = base.get_image_features(**{name: x.to(device) for name, x in inputs.items()})
            features = self.vlm.family.features(output).cpu()
            self.store.put(key, features)
        return features


def _bytes(encoded: EncodedPrompt) -> int:
    tensors = (encoded.ids, encoded.positions, encoded.pixel_values, encoded.blocks, encoded.features)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
