"""Loading a vision-language model and turning prompts into tensors.

Shapes: P prompt tokens, n images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from common.grpo import attention
from common.grpo.logprobs import without_adapters
from common.grpo.packing import Encoded
from common.models import adapters
from common.models.families import FAMILIES, Family
from common.models.features import FeatureStore
from common.models.files import lineage, messages, on_hub, too_long
from common.models.slots import Slots, spread
from common.schema import Model
from common.types import CATEGORY, Prompt, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# what from_pretrained raises when configuration, tokenizer or weights make no sense
DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
LONGEST_REASON = 300  # characters; some of the library's errors list every architecture there is
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class VLM:
    """A loaded model with everything that is read off its checkpoint.

    eos: ids that end a completion. end_of_turn: the one that the chat template writes after a reply. banned: ids that
    are neither sampled nor scored (image placeholders, padding).
    causal_images: image tokens attend causally even where the family's own see each other both ways.
    slots: embeddings beyond the vocabulary, if a method has attached some.
    hub: id and commit of a checkpoint that came from the hub.
    """

    model: Any
    processor: Any
    family: type[Family]
    eos: tuple[int, ...]
    end_of_turn: int
    banned: tuple[int, ...]
    pad: int
    causal_images: bool = False
    slots: Slots | None = None
    hub: tuple[str, str] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load(folder: Path, config: Model, device: torch.device, train: bool = True) -> VLM:
    """Load a checkpoint folder, whole or adapters on their base, with its processor.

    Args:
        folder: From `files.find`.
        config: New adapters are attached if its `lora` asks for them.
        device: Where the model goes.
        train: The adapters that the folder holds become part of the weights, as if they had been so from the start; in
            bf16 that rounds them. False: they stay as they were when they were written, so a model gives the answers
            that it gave then to the bit; new ones, which would change nothing yet, are left out.

    Raises:
        UserError: The folder does not load as an image-text-to-text model, or an adapter target matches nothing.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base, *earlier = lineage(folder)
    if earlier and config.load_in_8bit and (train or len(earlier) > 1):
        raise UserError(
            f"model.path={folder} holds adapters, which 8-bit weights cannot take in; set model.load_in_8bit=false, or"
            " give a checkpoint with whole weights"
        )
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype]}
    if config.load_in_8bit:
        from transformers import BitsAndBytesConfig

        options |= {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
    processor = loaded(AutoProcessor, base, f"checkpoint {base}")
    model = whole(AutoModelForImageTextToText, base, f"checkpoint {base}", **options)
    for each in earlier:
        model = adapters.restore(model, each, merge=train or each != folder)
    model.config.get_text_config()._attn_implementation = attention.NAME
    eos = model.generation_config.eos_token_id
    ends = tuple(eos) if isinstance(eos, list) else (eos,)
    if None in ends:
        raise UserError(f"checkpoint {base}: generation_config.json has no eos_token_id, so no completion could end")
    family = FAMILIES[config.family]
    placeholders = family.placeholder_tokens(model.config)
    pad = processor.tokenizer.pad_token_id
    banned = tuple(sorted({*placeholders, pad} - set(ends)))  # some checkpoints also end with their padding token
    if config.freeze_vision:
        freeze(model, family.vision)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora.r > 0 and train:
        model = adapters.add(model, config.lora)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    inside = [name for name in trained if set(name.split(".")) & set(family.vision)]
    if config.freeze_vision and inside:
        raise UserError(
            f"model.freeze_vision=true, but model.lora.targets={config.lora.targets} puts an adapter on {inside[0]}"
        )
    if not config.load_in_8bit:
        model.to(device)
    turn = end_of_turn(processor, ends)
    causal = config.image_attention == "causal"
    return VLM(model, processor, family, ends, turn, banned, pad, causal, hub=on_hub(config.path, folder))


def loaded(kind: Any, folder: Path, name: str, **options: Any) -> Any:
    """What `from_pretrained` finds in a folder; `name`: of the checkpoint, for errors.

    Raises:
        UserError: It does not load.
    """
    try:
        return kind.from_pretrained(folder, **options)
    except DAMAGED as error:
        reason = shorten(f"{type(error).__name__}: {error}", LONGEST_REASON)
        raise UserError(f"{name} does not load: {reason}") from error


def whole(kind: Any, folder: Path, name: str, **options: Any) -> Any:
    """A model all of whose weights come from its checkpoint; the library would fill in random ones.

    Raises:
        UserError: It does not load, or weights are missing or of another shape; names the first.
    """
    # shapes that differ are in the report then, and not only in a table on the terminal
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = loaded(kind, folder, name, **options)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name} lacks {len(missing)} weights of its architecture, first: {missing[0]}")
    if differing := sorted(report["mismatched_keys"]):
        weight, found, expected = differing[0]
        raise UserError(
            f"{name} has {len(differing)} weights of another shape than its config.json asks for, first: {weight}"
            f" ({list(found)} instead of {list(expected)})"
        )
    return model


def end_of_turn(processor: Any, ends: Sequence[int]) -> int:
    """The end-of-sequence id that the chat template writes after a reply; Gemma's first one only ends a text."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "reply"}]
    after = processor.apply_chat_template(turns, tokenize=False).rpartition("reply")[2]
    texts = {end: after.find(processor.tokenizer.convert_ids_to_tokens(end)) for end in ends}
    written = {end: place for end, place in texts.items() if place >= 0}
    return min(written, key=lambda end: written[end]) if written else ends[0]


def freeze(model: Any, modules: tuple[str, ...]) -> None:
    """No gradient for the parameters of the named modules."""
    for name, parameter in model.named_parameters():
        if set(name.split(".")) & set(modules):
            parameter.requires_grad_(False)


class Encoder:
    """Prompts to tensors, with a bounded memory (first in, first out), so that small runs decode each image once."""

    def __init__(
        self,
        vlm: VLM,
        load_images: Callable[[Sequence[str]], list[Image]],
        max_tokens: int,
        store: FeatureStore | None = None,
        cache_bytes: int = 512 * 2**20,
    ) -> None:
        """
        Args:
            vlm: Its processor is used, and its vision tower if there is a store.
            load_images: From keys to RGB pictures of the model's size (see `common.data.images.Loader`).
            max_tokens: Limit on a prompt's length, image tokens included.
            store: Images become features of the frozen vision tower at once, kept here; None: pixels.
            cache_bytes: Bound on the remembered tensors.
        """
        self.vlm, self.load_images, self.max_tokens = vlm, load_images, max_tokens
        self.store, self.cache_bytes, self.used = store, cache_bytes, 0
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
        processor, family, config = self.vlm.processor, self.vlm.family, self.vlm.model.config
        pictures = [[picture] for picture in self.load_images([p.image for p in prompts])]
        texts = [
            processor.apply_chat_template(messages(p), tokenize=False, add_generation_prompt=True) for p in prompts
        ]
        texts = [text.replace(CATEGORY, processor.tokenizer.pad_token) for text in texts]
        # the template has already written what begins a conversation
        batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt", add_special_tokens=False)
        keep = batch["attention_mask"].bool()
        encoded = []
        for row, (prompt, (pixels, grid)) in enumerate(zip(prompts, family.images(batch), strict=True)):
            ids = batch["input_ids"][row][keep[row]]
            if prompt.categories:
                slots = self.vlm.slots
                assert slots is not None, "a method with category embeddings attaches them to the model"
                ids = spread(ids, self.vlm.pad, prompt.categories, slots.first, slots.width)
            if len(ids) > self.max_tokens:
                raise too_long(len(ids), self.max_tokens, prompt)
            positions = family.positions(ids, grid, config)
            blocks = None if self.vlm.causal_images else family.blocks(ids, config)
            pixels = pixels.to(self.vlm.model.dtype)
            if self.store is None:
                encoded.append(Encoded(ids, positions, pixels, grid, blocks))
            else:
                encoded.append(Encoded(ids, positions, None, None, blocks, self._features(pixels, grid)))
        return encoded

    @torch.no_grad()
    def _features(self, pixels: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings of one image. Shape: [image tokens, D]."""
        assert self.store is not None
        key = self.store.key(pixels, grid)
        found = self.store.get(key)
        if found is None:
            device = self.vlm.device
            grids = {} if grid is None else {"image_grid_thw": grid.to(device)}
            base = without_adapters(self.vlm.model)
            output = base.get_image_features(pixel_values=pixels.to(device), **grids).pooler_output
            parts = list(output) if isinstance(output, tuple | list) else [output.flatten(0, -2)]
            found = torch.cat(parts).cpu()
            self.store.put(key, found)
        return found


def _bytes(encoded: Encoded) -> int:
    tensors = (encoded.ids, encoded.positions, encoded.pixel_values, encoded.blocks, encoded.features)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
