"""Convert the policy's weights for vLLM: whole tensors under the names of hub checkpoints.

Adapters are merged into copies of their weights, one tensor at a time; the policy is not changed. Embeddings beyond the
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

ROUND = 64  # vocabulary sizes are rounded up to a multiple of this, as vLLM pads them


def vocabulary(model: Any) -> int:
    """Return the number of rows of the engine's vocabulary: the policy's and those of extra embeddings, rounded up."""
    embedding = without_adapters(model).get_input_embeddings()
    if not isinstance(embedding, ExtraEmbeddings):
        return int(embedding.num_embeddings)
    rows = embedding.first + embedding.count * embedding.width
    return -(-rows // ROUND) * ROUND


def named(vlm: VLM, trained: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight, tied ones once, and every saved buffer, converted one at a time.

    Args:
        vlm: Policy, adapters and extra embeddings included.
        trained: Yield only weights that are trained and what `fused` puts beside them, for an engine that has the
            others, and no buffers. A frozen vocabulary is left out even if extra embeddings behind it are trained.

    Yields:
        Name in hub checkpoints, and the tensor with its adapters merged.
    """
    base = without_adapters(vlm.model)
    # LoRA layers by the weight that they adapt
    adapters: dict[int, list[Any]] = {}
    for module in base.modules():
        if isinstance(module, LoraLayer):
            adapters.setdefault(id(adapted(module)), []).append(module)
    extra = base.get_input_embeddings()
    # rows of extra embeddings are not pushed by themselves; `extended` appends them to the vocabulary
    own = {id(each) for each in extra.parameters(recurse=False)} if isinstance(extra, ExtraEmbeddings) else set()
    weights: dict[str, torch.nn.Parameter] = {}
    for name, parameter in base.named_parameters():
        parts = name.split(".")
        # "original_module" is PEFT's untrained copy of a module in modules_to_save
        if not (any(p.startswith("lora_") for p in parts) or "original_module" in parts or id(parameter) in own):
            weights[plain_name(name)] = parameter
    moved = {fused(name) for name, p in weights.items() if p.requires_grad or id(p) in adapters}
    for name, parameter in weights.items():
        if not trained or fused(name) in moved:
            on_top = adapters.get(id(parameter), [])
            with whole([parameter, *beside(base, parameter, on_top)]) as was_apart:
                tensor = extended(base, parameter, with_adapters(parameter.detach(), on_top))
                # the engine may read it after ZeRO-3 has partitioned the parameter again
                kept = tensor.clone() if was_apart else tensor
            yield vlm.family.hub_name(name), kept
    if not trained:
        # what a model keeps beside its parameters, such as Gemma 4's factor of every layer
        kept_names = base.state_dict().keys()
        for name, buffer in base.named_buffers():
            if name in kept_names:
                yield vlm.family.hub_name(plain_name(name)), buffer


def fused(name: str) -> str:
    """Return the block of a weight; the engine may hold its weights as one tensor, of which no part is pushed alone.

    vLLM computes the new content of a layer from what it is given and leaves the rest undefined: queries without their
    biases, or without keys and values.

    >>> fused("model.language_model.layers.0.self_attn.q_proj.bias")
    'model.language_model.layers.0.self_attn'
    """
    return name.rsplit(".", 2)[0]


def beside(base: Any, parameter: torch.nn.Parameter, layers: Sequence[Any]) -> list[torch.nn.Parameter]:
    """Return the other parameters that go into a pushed weight: its adapters, and extra embeddings behind it."""
    extra = base.get_input_embeddings()
    behind = extra.parts() if isinstance(extra, ExtraEmbeddings) and parameter is extra.embedding.weight else []
    adapters = [p for layer in layers for n, p in layer.named_parameters() if n.startswith("lora_")]
    return [*behind, *adapters]


@contextmanager
def whole(parameters: Sequence[torch.nn.Parameter]) -> Iterator[bool]:
    """Gather parameters that ZeRO-3 has partitioned. All ranks call it together.

    Yields whether any was partitioned.
    """
    apart = [p for p in parameters if getattr(getattr(p, "ds_status", None), "name", "") == "NOT_AVAILABLE"]
    if not apart:
        yield False
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(apart):
        yield True


def plain_name(name: str) -> str:
    """Return the name that a parameter has without adapters and extra embeddings.

    >>> plain_name("model.multi_modal_projector.modules_to_save.default.mm_soft_emb_norm.weight")
    'model.multi_modal_projector.mm_soft_emb_norm.weight'
    >>> plain_name("model.language_model.embed_tokens.embedding.weight")
    'model.language_model.embed_tokens.weight'
    """
    name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
    return name.replace(".embed_tokens.embedding.", ".embed_tokens.")


def adapted(module: Any) -> torch.nn.Parameter:
    """Return the weight that a LoRA layer adapts."""
    return getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))  # type: ignore[no-any-return]


def with_adapters(weight: torch.Tensor, layers: Sequence[Any]) -> torch.Tensor:
    """Return a weight with its LoRA layers merged, as a new tensor if there are any. The sum is computed in fp32."""
    if not layers:
        return weight
    total = weight.float()
    for layer in layers:
        for adapter in layer.active_adapters:
            total = total + layer.get_delta_weight(adapter).detach().float()
    return total.to(weight.dtype)


def extended(base: Any, parameter: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Append extra embeddings to the input embedding, and zeros to the output projection; keep any other weight.

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
