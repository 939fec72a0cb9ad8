"""Load a vision-language model with its processor: a whole model, or LoRA adapters with their base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError

from common.config.schema import ModelConfig
from common.counted import counted
from common.models import adapters
from common.models.extra_embeddings import ExtraEmbeddings
from common.models.families import Family
from common.models.families import family as family_of
from common.models.files import lineage, on_hub
from common.types import UserError

# errors that from_pretrained raises for a damaged configuration, tokenizer or weights
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
LONGEST_REASON = 300  # characters; some errors of transformers list all of its architectures
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class VLM:
    """Loaded model with its processor and special ids.

    eos: ids that end a completion.
    end_of_turn: the one that the chat template writes after a reply.
    lead: what the chat template writes before a reply, behind the header (SmolVLM: a space); part of no reply's text.
    banned: ids that are neither sampled nor scored (image placeholders, padding).
    causal_images: image tokens attend causally even if the family's are bidirectional.
    extra_embeddings: embeddings beyond the vocabulary, if a method has attached some.
    hub: id and commit of a model from the hub.
    """

    model: Any
    processor: Any
    family: type[Family]
    eos: tuple[int, ...]
    end_of_turn: int
    banned: tuple[int, ...]
    pad: int
    lead: str = ""
    causal_images: bool = False
    extra_embeddings: ExtraEmbeddings | None = None
    hub: tuple[str, str] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load(folder: Path, config: ModelConfig, device: torch.device, train: bool = True) -> VLM:
    """Load a model folder, a whole model or adapters with their base, and its processor.

    Args:
        folder: Folder from `files.find`.
        config: Configuration of the model; new adapters are attached if its `lora` asks for them.
        device: Device for the model.
        train: Merge the folder's adapters into the weights, which in bf16 rounds them. False: keep them apart, so that
            answers are bit for bit those of the training's end, and add no new ones.

    Raises:
        UserError: The folder does not load as an image-text-to-text model, or an adapter target matches nothing.
    """
    from transformers import AutoModelForImageTextToText

    base, *earlier = lineage(folder)  # earlier: folders of adapters, oldest first
    bits = config.bits
    if earlier and bits and (train or len(earlier) > 1):
        raise UserError(
            f"model.path={folder} holds adapters, which {bits}-bit weights cannot take in; set"
            f" model.load_in_{bits}bit=false, or give a model with whole weights"
        )
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype]}
    if bits:
        options |= {"quantization_config": quantization(config), "device_map": {"": device}}
    processor = processor_of(base, config, f"model {base}")
    model = whole(AutoModelForImageTextToText, base, f"model {base}", **options)
    # older adapters are always merged: the newest were trained on the merged weights
    for each in earlier:
        model = adapters.restore(model, each, merge=train or each != folder)
    policy = assembled(model, processor, config, f"model {base}", train)
    if not bits:
        policy.model.to(device)
    if bits == 4 and device.type == "cpu":
        # on processors with AVX512-BF16 bitsandbytes repacks the weights in the first forward without gradients, and
        # a later forward that should give gradients gives none
        for layer in policy.model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
    return replace(policy, hub=on_hub(config.path, folder))


def quantization(config: ModelConfig) -> Any:
    """Return transformers' description of a base in 8 or 4 bits (bitsandbytes)."""
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[config.dtype],
    )


def on_meta(folder: Path, config: ModelConfig) -> VLM:
    """Return the model as `load` prepares it for training, but on the `meta` device, without reading weights.

    Weights in 8 or 4 bits have the number format of the computation.

    Args:
        folder: Folder from `files.find`; the weights may be missing.
        config: Configuration of the model.

    Raises:
        UserError: The folder's configuration does not describe an image-text-to-text model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    base = lineage(folder, weights=False)[0]
    processor = processor_of(base, config, f"model {base}")
    architecture = loaded(AutoConfig, base, f"model {base}")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(architecture, dtype=DTYPES[config.dtype])
        model.generation_config = loaded(GenerationConfig, base, f"model {base}")
        return assembled(model, processor, config, f"model {base}")


def assembled(model: Any, processor: Any, config: ModelConfig, name: str, train: bool = True) -> VLM:
    """Freeze modules, set up gradient checkpointing and add adapters, as the configuration asks.

    Args:
        model: A `*ForConditionalGeneration`, or the PEFT model around one.
        processor: Processor of the model.
        config: Configuration of the model.
        name: Name of the model, for errors.
        train: Add new adapters if the configuration asks for them, see `load`.
    """
    # special ids
    eos = model.generation_config.eos_token_id
    ends = tuple(eos) if isinstance(eos, list) else (eos,)
    if None in ends:
        raise UserError(f"{name}: generation_config.json has no eos_token_id, so no completion could end")
    family = family_of(config.family)
    placeholders = family.placeholder_tokens(model.config)
    pad = processor.tokenizer.pad_token_id
    suppressed = model.generation_config.suppress_tokens or ()
    banned = tuple(
        sorted({*placeholders, pad, *suppressed} - set(ends))
    )  # some models also end with their padding token
    # which parameters are trained
    freeze(model, (*family.unused, *(family.vision if config.freeze_vision else ())))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers makes the outputs of all input embeddings require gradients, which only reentrant checkpoints
        # need; gradients would then be computed through the whole frozen vision tower
        model.disable_input_require_grads()
    if config.lora.wraps and train:
        model = adapters.add(model, config.lora, family)
    # lora.targets may match modules of the vision tower; adapters there contradict freeze_vision
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    inside = [name for name in trained if set(name.split(".")) & set(family.vision)]
    if config.lora.projector != "none":
        inside = [name for name in inside if f".{family.projector}." not in name]
    if config.freeze_vision and inside:
        raise UserError(
            f"model.freeze_vision=true, but model.lora.targets={config.lora.targets} puts an adapter on {inside[0]}"
        )
    turn = end_of_turn(processor, ends)
    causal = config.image_attention == "causal"
    return VLM(model, processor, family, ends, turn, banned, pad, before_reply(processor), causal)


def processor_of(folder: Path, config: ModelConfig, name: str) -> Any:
    """Load the processor of a model so that it makes one image of a picture; `name`: name of the model, for errors."""
    from transformers import AutoProcessor

    family = family_of(config.family)
    family.prepare()
    processor = loaded(AutoProcessor, folder, name)
    family.untiled(processor, config.image_size)
    return processor


def loaded(kind: Any, folder: Path, name: str, **options: Any) -> Any:
    """Call `from_pretrained`, never running Python files of the folder; `name`: name of the model, for errors.

    Raises:
        UserError: It does not load.
    """
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except DAMAGED as error:
        reason = shorten(f"{type(error).__name__}: {error}", LONGEST_REASON)
        raise UserError(f"{name} does not load: {reason}") from error


def whole(kind: Any, folder: Path, name: str, **options: Any) -> Any:
    """Load a model and check that no weight is missing; transformers would initialise missing ones at random.

    Raises:
        UserError: It does not load, or weights are missing or of another shape; names the first.
    """
    # with ignore_mismatched_sizes the report lists wrong shapes; without it they are only printed as a table
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    model, report = loaded(kind, folder, name, **options)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name} lacks {counted(len(missing), 'weight')} of its architecture, first: {missing[0]}")
    if differing := sorted(report["mismatched_keys"]):
        weight, shape, expected = differing[0]
        raise UserError(
            f"{name} has {counted(len(differing), 'weight')} of another shape than its config.json asks for, first:"
            f" {weight}"
            f" ({list(shape)} instead of {list(expected)})"
        )
    return model


def end_of_turn(processor: Any, ends: Sequence[int]) -> int:
    """Return the end-of-sequence id that the chat template writes after a reply.

    It need not be the first one: that of Gemma ends a text, not a turn.
    """
    after = after_reply(processor)
    texts = {end: after.find(processor.tokenizer.convert_ids_to_tokens(end)) for end in ends}
    written = {end: position for end, position in texts.items() if position >= 0}
    return min(written, key=lambda end: written[end]) if written else ends[0]


def after_reply(processor: Any, header: bool = False) -> str:
    """Return the text that the chat template writes after a reply; with `header` also the start of the next one.

    Raises:
        UserError: The template has a mistake, or uses something that the sandbox forbids.
    """
    return rendered(processor, turns("?", "reply"), header).rpartition("reply")[2]


def before_reply(processor: Any) -> str:
    """Return the text that the chat template writes between the header of a reply and the reply.

    Raises:
        UserError: See `after_reply`.
    """
    asked, answered = rendered(processor, turns("?"), True), rendered(processor, turns("?", "reply"), False)
    # a template may write more behind its header than before a reply that is there, such as the start of thoughts
    return answered.removeprefix(asked).partition("reply")[0] if answered.startswith(asked) else ""


def turns(*texts: str) -> list[dict[str, Any]]:
    """Return a conversation without an image, the user's text first."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": [{"type": "text", "text": text}]} for n, text in enumerate(texts)]


def rendered(processor: Any, conversation: Sequence[dict[str, Any]], header: bool = True) -> str:
    """Return a conversation as the chat template writes it; with `header` also the start of the next reply.

    Raises:
        UserError: See `after_reply`.
    """
    # with options of its own, which a text needs none of, SmolVLM's processor adds none and warns of none
    options = {"tokenize": False, "processor_kwargs": {"padding": False}}
    try:
        return str(processor.apply_chat_template(conversation, add_generation_prompt=header, **options))
    except TemplateError as error:
        raise UserError(f"the model's chat template cannot be used: {error}") from error


def complete(config: Any, policy: VLM) -> None:
    """Write into a configuration of a model what vLLM reads there and transformers elsewhere."""
    base = adapters.without_adapters(policy.model)
    embedding = base.get_input_embeddings()
    matrix = embedding.embedding if isinstance(embedding, ExtraEmbeddings) else embedding
    # transformers may say it of the whole model alone
    config.get_text_config().tie_word_embeddings = base.get_output_embeddings().weight is matrix.weight
    policy.family.complete(config, policy.processor)


def freeze(model: Any, modules: tuple[str, ...]) -> None:
    """Switch off gradients for the parameters of the named modules."""
    for name, parameter in model.named_parameters():
        if set(name.split(".")) & set(modules):
            parameter.requires_grad_(False)
