"""Loading a vision-language model and turning prompts into tensors.

Shapes: P prompt tokens, n images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.grpo import attention
from common.grpo.packing import Encoded
from common.models.families import FAMILIES, Family
from common.models.files import messages, too_long
from common.schema import Lora, Model
from common.types import Prompt, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class VLM:
    """A loaded model with everything that is read off its checkpoint.

    eos: ids that end a completion. banned: ids that are neither sampled nor scored (image placeholders, padding).
    """

    model: Any
    processor: Any
    family: type[Family]
    eos: tuple[int, ...]
    banned: tuple[int, ...]
    pad: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load(folder: Path, config: Model, device: torch.device) -> VLM:
    """Load a checkpoint folder with its processor, adapters attached if `config.lora` asks for them.

    Raises:
        UserError: The folder does not load as an image-text-to-text model, or an adapter target matches nothing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=DTYPES[config.dtype], output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"checkpoint {folder} does not load: {error}") from error
    model, report = loaded
    if missing := sorted([*report["missing_keys"], *report["mismatched_keys"]]):
        raise UserError(f"checkpoint {folder} lacks {len(missing)} weights of its architecture, first: {missing[0]}")
    model.config.get_text_config()._attn_implementation = attention.NAME
    eos = model.generation_config.eos_token_id
    ends = tuple(eos) if isinstance(eos, list) else (eos,)
    if None in ends:
        raise UserError(f"checkpoint {folder}: generation_config.json has no eos_token_id, so no completion could end")
    family = FAMILIES[config.family]
    placeholders = family.placeholder_tokens(model.config)
    pad = processor.tokenizer.pad_token_id
    banned = tuple(sorted({*placeholders, pad} - set(ends)))  # some checkpoints also end with their padding token
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora.r > 0:
        model = add_adapters(model, config.lora)
    model.to(device)
    return VLM(model, processor, family, ends, banned, pad)


def add_adapters(model: Any, lora: Lora) -> Any:
    """Wrap the model with LoRA adapters (arXiv 2106.09685) without dropout, which shared prefixes do not allow."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, bias="none")
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"model.lora.targets={lora.targets}: {error}") from error
    if getattr(model, "is_gradient_checkpointing", False):
        wrapped.enable_input_require_grads()
    return wrapped


class Encoder:
    """Prompts to tensors, with a bounded memory (first in, first out), so that small runs decode each image once."""

    def __init__(
        self,
        vlm: VLM,
        open_image: Callable[[str], Image],
        image_size: int,
        max_tokens: int,
        cache_bytes: int = 512 * 2**20,
    ) -> None:
        """
        Args:
            vlm: Its processor is used.
            open_image: From an image's key to an RGB picture.
            image_size: Images are squashed to this side in pixels with Lanczos, as in the CLS-RL code.
            max_tokens: Limit on a prompt's length, image tokens included.
            cache_bytes: Bound on the remembered pixels.
        """
        self.vlm, self.open_image, self.image_size, self.max_tokens = vlm, open_image, image_size, max_tokens
        self.cache_bytes, self.used = cache_bytes, 0
        self.memory: OrderedDict[Prompt, Encoded] = OrderedDict()

    def __call__(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """Encode prompts on the CPU.

        Raises:
            UserError: A prompt is longer than the limit.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.memory]
        fresh = dict(zip(missing, self._encode(missing), strict=True)) if missing else {}
        found = [fresh[prompt] if prompt in fresh else self.memory[prompt] for prompt in prompts]
        for prompt, encoded in fresh.items():
            self.memory[prompt] = encoded
            self.used += _bytes(encoded)
        while self.used > self.cache_bytes and self.memory:
            self.used -= _bytes(self.memory.popitem(last=False)[1])
        return found

    def _encode(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        from PIL.Image import Resampling

        processor = self.vlm.processor
        size = (self.image_size, self.image_size)
        pictures = [self.open_image(prompt.image).convert("RGB").resize(size, Resampling.LANCZOS) for prompt in prompts]
        texts = [
            processor.apply_chat_template(messages(prompt), tokenize=False, add_generation_prompt=True)
            for prompt in prompts
        ]
        batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        keep = batch["attention_mask"].bool()
        patches = batch["pixel_values"].split(batch["image_grid_thw"].prod(1).tolist())
        encoded = []
        for row, prompt in enumerate(prompts):
            ids = batch["input_ids"][row][keep[row]]
            if len(ids) > self.max_tokens:
                raise too_long(len(ids), self.max_tokens, prompt)
            grid = batch["image_grid_thw"][row : row + 1]
            positions = self.vlm.family.positions(ids, grid, self.vlm.model.config)
            encoded.append(Encoded(ids, positions, patches[row].to(self.vlm.model.dtype), grid))
        return encoded


def _bytes(encoded: Encoded) -> int:
    pixels = 0 if encoded.pixel_values is None else encoded.pixel_values.nbytes
    return pixels + encoded.ids.nbytes + encoded.positions.nbytes
