"""The policy's weights as an engine loads them: whole tensors under the names of the hub.

Adapters are added to the weights they stand on, a tensor at a time, without touching the policy. Embeddings beyond the
vocabulary become rows of it, so their ids are ordinary tokens for the engine.

Shapes: V vocabulary rows, E entries, m rows of an entry, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

from common.models.adapters import without_adapters
from common.models.extra_embeddings import ExtraEmbeddings, rows_of_vocabulary
from common.models.vlm import VLM

ROUND = 64  # rows of a vocabulary, a multiple of which engines want


def vocabulary(model: Any) -> int:
    """Rows of the engine's vocabulary: the policy's, and those of the embeddings beyond it."""
    embedding = without_adapters(model).get_input_embeddings()
    if not isinstance(embedding, ExtraEmbeddings):
        return int(embedding.num_embeddings)
    rows = embedding.first + embedding.count * embedding.width
    return -(-rows // ROUND) * ROUND


def named(vlm: VLM, trained: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight, tied ones once. Nothing but the tensor at hand is held.

    Args:
        vlm: The policy, adapters and extra embeddings included.
        trained: Leave out what no update has changed, for an engine that has it already. A vocabulary that is not
            trained is left out, too, although the rows behind it may be.

    Yields:
        The name on the hub, and the tensor with its adapters added.
    """
    base = without_adapters(vlm.model)
    adapters: dict[int, list[Any]] = {}
    for module in base.modules():
        if isinstance(module, LoraLayer):
            adapters.setdefault(id(adapted(module)), []).append(module)
    extra = base.get_input_embeddings()
    own = {id(each) for each in extra.parameters(recurse=False)} if isinstance(extra, ExtraEmbeddings) else set()
    for name, parameter in base.named_parameters():
        parts = name.split(".")
        if any(part.startswith("lora_") for part in parts) or "original_module" in parts or id(parameter) in own:
            continue
        on_top = adapters.get(id(parameter), [])
        if not trained or parameter.requires_grad or on_top:
            with whole([parameter, *beside(base, parameter, on_top)]) as was_apart:
                tensor = extended(base, parameter, with_adapters(parameter.detach(), on_top))
                # the engine may look at it later, when the ranks have parted it again
                kept = tensor.clone() if was_apart else tensor
            yield vlm.family.hub_name(plain_name(name)), kept


def beside(base: Any, parameter: torch.nn.Parameter, layers: Sequence[Any]) -> list[torch.nn.Parameter]:
    """The other parameters that a pushed weight is made of: adapters on it, embeddings behind it."""
    extra = base.get_input_embeddings()
    behind = extra.parts() if isinstance(extra, ExtraEmbeddings) and parameter is extra.embedding.weight else []
    adapters = [p for layer in layers for n, p in layer.named_parameters() if n.startswith("lora_")]
    return [*behind, *adapters]


@contextmanager
def whole(parameters: Sequence[torch.nn.Parameter]) -> Iterator[bool]:
    """Inside, parameters that ZeRO stage 3 has parted among the ranks are whole; all ranks come here together.

    Yields whether any was parted.
    """
    apart = [p for p in parameters if getattr(getattr(p, "ds_status", None), "name", "") == "NOT_AVAILABLE"]
    if not apart:
        yield False
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(apart):
        yield True


def plain_name(name: str) -> str:
    """Of a parameter as it would be called without adapters and extra embeddings around it.

    >>> plain_name("model.multi_modal_projector.modules_to_save.default.mm_soft_emb_norm.weight")
    'model.multi_modal_projector.mm_soft_emb_norm.weight'
    >>> plain_name("model.language_model.embed_tokens.embedding.weight")
    'model.language_model.embed_tokens.weight'
    """
    name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
    return name.replace(".embed_tokens.embedding.", ".embed_tokens.")


def adapted(module: Any) -> torch.nn.Parameter:
    """The weight that a LoRA layer stands on."""
    return getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))  # type: ignore[no-any-return]


def with_adapters(weight: torch.Tensor, layers: Sequence[Any]) -> torch.Tensor:
    """A weight and what the LoRA layers on it add, in a tensor of its own if there are any. The sum is made in fp32."""
    if not layers:
        return weight
    total = weight.float()
    for layer in layers:
        for adapter in layer.active_adapters:
            total = total + layer.get_delta_weight(adapter).detach().float()
    return total.to(weight.dtype)


def extended(base: Any, parameter: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The vocabulary's own rows and those behind it; the same number of output rows. Any other weight as it is.

    Shape: [V, D] -> [V + E m, D], rounded up.
    """
    extra = base.get_input_embeddings()
    if not isinstance(extra, ExtraEmbeddings):
        return weight
    inner = parameter is extra.embedding.weight
    if not inner and parameter is not base.get_output_embeddings().weight:
        return weight
    larger = weight.new_zeros(vocabulary(base), weight.shape[1])
    larger[: len(weight)] = weight
    if inner:
        behind = rows_of_vocabulary(extra.embedding, extra.table())
        larger[extra.first : extra.first + len(behind)] = behind
    return larger
