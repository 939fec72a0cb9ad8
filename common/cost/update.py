"""Count memory and operations of one update, phase by phase, from the shapes of its tensors; nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from transformers.cache_utils import DynamicCache

from common.config.schema import GRPOConfig, TrainerConfig
from common.forward.logprobs import PolicyScorer, head_rows
from common.forward.packing import Packed, images, pad_blocks
from common.models.adapters import without_adapters
from common.models.encoder import EncodedPrompt
from common.models.vlm import VLM
from common.training.engine import bucket_size, zero_stage

# Counting by shapes. Weights and activations are tensors of the `meta` device, which have a shape and no content. Token
# ids, positions and masks stay real, since the layout depends on their values. So the model's own code runs forward and
# backward at any size, on any machine, in seconds.

META = torch.device("meta")
INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class ShapeCounter(TorchDispatchMode):
    """Context that counts operations on meta tensors as a GPU would run them.

    torch.utils.flop_counter.FlopCounterMode is not used because it keeps the activations of all modules alive.

    Attributes:
        live: Bytes of the meta tensors that exist now.
        peak: Largest `live` so far.
        flops: Multiplications and additions of matrix products, convolutions and attention; a pair counts two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        # numbers of places that masks choose, which a mask without content cannot tell
        self.chosen: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __enter__(self) -> ShapeCounter:
        # Patched by hand: a TorchFunctionMode would miss what checkpoints recompute in the backward pass.
        self.attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, self._attention
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        F.scaled_dot_product_attention = self.attention

    def _attention(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run attention by the kernels that a GPU would use.

        PyTorch has no rule for the meta device and would use plain operations, with all scores in fp32.
        """
        attention = _fused_attention if query.device == META else self.attention
        return attention(query, *args, **kwargs)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor until it is freed; another view of the same memory adds nothing."""
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = self.known[storage] = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            # called when the last view of the storage is garbage-collected
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and _is_meta(args[0]):
            kwargs.pop("device", None)  # to where the token ids are, which are real (SmolVLM)
        if func is torch.ops.aten._local_scalar_dense.default and _is_meta(args[0]) and args[0].dtype == torch.bool:
            return True  # whether a mask without content hides nothing, see `_places`
        if func._overloadpacket in INDEXED:
            args = (args[0], [place for each in args[1] for place in self._places(each)], *args[2:])
        if any(map(_is_meta, tree_leaves((args, kwargs)))):
            args, kwargs = tree_map(_shape_of, (args, kwargs))  # e.g. a real mask beside meta tensors
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and out.device == META and args[0].dtype == torch.bool:
            # only masks that choose places matter, and those were real once; one computed from shapes has no number
            source = args[0]
            count = self.chosen.get(source.untyped_storage()) if source.device == META else int(source.sum())
            if count is not None:
                self.chosen[out.untyped_storage()] = count
        made = [value for value in tree_leaves(out) if _is_meta(value)]
        for tensor in made:
            self.add(tensor)
        count = flop_registry.get(func._overloadpacket)
        if made and count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out

    def _places(self, index: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Return a mask of chosen places as one index per dimension, anything else as it is.

        A mask that was computed from shapes is taken to choose all places.
        """
        if index is None or index.dtype != torch.bool:
            return [index]
        if index.device != META:
            return [*index.nonzero().unbind(1)]
        count = self.chosen.get(index.untyped_storage(), index.numel())
        return [torch.empty(count, dtype=torch.long, device=META) for _ in range(index.ndim)]


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute attention by a fused kernel; the signature is that of `scaled_dot_product_attention`.

    The flash kernel takes no mask but fewer key heads; the memory-efficient one takes a mask, as numbers to add, and
    needs as many key heads as query heads.
    """
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
    if enable_gqa:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    shape = (*query.shape[:-1], key.shape[-2])
    added = attn_mask.to(META).to(query.dtype).expand(shape)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, added, True, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device == META


def _shape_of(value: Any) -> Any:
    return value.to(META) if isinstance(value, torch.Tensor) and value.device != META else value


# One update, for any model on any number of GPUs. The largest forward of the run and its backward are counted by
# `ShapeCounter` through the code that trains. What DeepSpeed, the sampler and CUDA hold beside it is added by formula;
# tests/test_cost.py compares both with measured peaks. A caching allocator needs some per cent more than is allocated.
#
# Shapes: N prompts of one forward, G completions each, P and R tokens of prompt and completion.

GIB = 2**30
GATHERED = 1_000_000_000  # elements of DeepSpeed's default stage3_max_live_parameters
CONTEXT = 0.6 * GIB  # bytes of a CUDA context and its kernels; our choice, 0.4 to 0.8 GiB are usual
NCCL = 0.6 * GIB  # bytes of NCCL's buffers; our choice
DRAWING = 24  # bytes per logit while a token is drawn: fp64 probabilities, the truncated ones and their sums


@dataclass(frozen=True)
class Pass:
    """Counts of one forward in a training, with and without its backward.

    Attributes:
        forward: Floating-point operations of the forward.
        backward: Operations of the backward, recomputed activations included; 0 if nothing is trained.
        scored: Peak bytes beside weights, without a gradient.
        trained: Peak bytes beside weights and gradients, with a gradient.
    """

    forward: int
    backward: int
    scored: int
    trained: int


def measure(vlm: VLM, packed: Packed, chunk: int | None = None) -> Pass:
    """Count one forward and its backward.

    Args:
        vlm: Model from `vlm.on_meta`.
        packed: Prompts and completions on the CPU.
        chunk: Rows per vocabulary projection; None: result of `head_rows`.
    """
    scorer = PolicyScorer(vlm, 1.0, chunk or head_rows(vlm.model)).train()
    packed = replace(packed, inputs=_shapes(packed.inputs))
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    # Gradients are dropped here and added by formula in `memory`, since ZeRO may partition them.
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained]
    with ShapeCounter() as counter:
        for tensor in [*scorer.parameters(), *scorer.buffers()]:
            if tensor.device == META:
                counter.add(tensor)
        weights = counter.live
        with torch.no_grad():
            scorer(packed, entropy=False)
        scored, forward, backward = counter.peak - weights, counter.flops, 0
        if trained:
            logps, _ = scorer(packed)
            logps.sum().backward()
            del logps
            # the forward has run twice: without and with a gradient
            backward = counter.flops - 2 * forward
        peak = counter.peak - weights
    for hook in hooks:
        hook.remove()
    return Pass(forward, backward, scored, peak if trained else 0)


def prefill_bytes(vlm: VLM, prompts: Sequence[EncodedPrompt]) -> int:
    """Return the peak bytes, beside weights, of the forward that reads prompts before sampling, its cache included.

    Args:
        vlm: Model from `vlm.on_meta`.
        prompts: Encoded prompts of equal length, N of them.
    """
    ids = torch.stack([prompt.ids for prompt in prompts])
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": None,
        "position_ids": vlm.family.position_ids(torch.stack([prompt.positions for prompt in prompts], 1)),
        **images(prompts, vlm.family, torch.device("cpu")),
    }
    if (blocks := pad_blocks(prompts)) is not None:
        inputs |= vlm.family.block_inputs(blocks)
    model = vlm.model.eval()
    cache = DynamicCache(config=model.config.get_text_config())
    with ShapeCounter() as counter, torch.no_grad():
        for parameter in model.parameters():
            counter.add(parameter)
        weights = counter.live
        model(**_shapes(inputs), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return counter.peak - weights


def _shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.to(META) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _drop_gradient(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None


def cache_bytes(vlm: VLM, rows: int, tokens: int) -> int:
    """Return the bytes of keys and values of `rows` sequences of `tokens` tokens; windows limit their layers."""
    text = vlm.model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)  # the others use those of these
    window = getattr(text, "sliding_window", None) or tokens
    numbers = 0
    for layer, kind in list(zip(text.per_layer_config, kinds, strict=True))[:own]:
        size = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        numbers += layer.num_key_value_heads * size * (min(tokens, window) if kind == "sliding_attention" else tokens)
    return 2 * rows * numbers * without_adapters(vlm.model).dtype.itemsize


@dataclass(frozen=True)
class Batch:
    """Prompts that are completed together, all as long as the longest one.

    Attributes:
        prompt: Longest prompt, P tokens.
        count: N.
        group_size: G completions of each prompt.
        completion: R, the largest number of tokens of a completion.
    """

    prompt: EncodedPrompt
    count: int
    group_size: int
    completion: int


def memory(
    vlm: VLM,
    one: Pass,
    sampled: Batch | None,
    evaluated: Batch,
    config: TrainerConfig,
    deepspeed: dict[str, Any],
    ranks: int,
    weights: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return the bytes of one GPU in every phase of a training, by what holds them.

    A judge that is a model of its own is not counted, nor an engine that samples beside the policy.

    Args:
        vlm: Model from `vlm.on_meta`.
        one: Largest forward of a rank.
        sampled: Batch that a rank samples for an update; None where the training samples nothing.
        evaluated: Batch of an evaluation.
        config: Configuration of the trainer.
        deepspeed: DeepSpeed configuration, of which ZeRO stage, offload and bucket size are read.
        ranks: Number of GPUs.
        weights: Bytes of the weights where they are stored in another format than they compute in (8 bits).
    """
    stage = zero_stage(deepspeed)
    offloaded = "offload_optimizer" in deepspeed.get("zero_optimization", {})
    parameters = list(vlm.model.parameters())
    own = sum(p.nbytes for p in parameters) if weights is None else weights
    learning = [p for p in parameters if p.requires_grad]
    count, size = sum(p.numel() for p in learning), max((p.element_size() for p in learning), default=0)
    # AdamW's two moments in fp32 (8 bytes), plus an fp32 copy of 16-bit weights, or of all weights where ZeRO flattens
    # them (4 bytes).
    states = count * (12 if size == 2 or stage > 0 else 8)
    split = ranks if stage >= 1 else 1
    gradients = count * size / (ranks if stage >= 2 else 1)
    # During the step: AdamW's temporaries (4 bytes per weight), and the gradients again, flat and in fp32, except where
    # neither ZeRO nor 16-bit weights need that; together 12 bytes per weight with the gradients, or 8.
    step = max(0.0, (12 if size == 2 or stage > 0 else 8) * count / split - gradients)
    references = isinstance(config, GRPOConfig) and config.beta > 0 and not hasattr(vlm.model, "disable_adapter")
    always = {
        "weights": own / (ranks if stage == 3 else 1),
        "reference": own if references else 0.0,
        "optimizer states": 0.0 if offloaded else states / split,
        "CUDA": CONTEXT + NCCL * (ranks > 1),
    }
    whole = always | {"weights": own}  # ZeRO-3 gathers all weights to sample
    phases = {"evaluation": whole | _sampling(vlm, evaluated)}
    if not learning:
        return phases
    gathered = min(own, GATHERED * own / sum(p.numel() for p in parameters)) if stage == 3 and ranks > 1 else 0.0
    phases |= {
        "backward": always
        | {
            "gradients": gradients,
            "activations": one.trained,
            "gathered weights": gathered,
            "reduction bucket": bucket_size(deepspeed, count) * size if stage > 0 else 0.0,
        },
        "optimizer step": always | {"gradients": gradients, "optimizer step": 0.0 if offloaded else step},
    }
    if sampled is not None:
        phases["sampling"] = whole | _sampling(vlm, sampled)
    return phases


def _sampling(vlm: VLM, batch: Batch) -> dict[str, float]:
    """Return the bytes beside the weights: the larger of reading the prompts and continuing all of them together."""
    rows, text = batch.count * batch.group_size, vlm.model.config.get_text_config()
    cache = cache_bytes(vlm, rows, len(batch.prompt.ids) + batch.completion)
    # Appending a token copies the cache of a layer, one layer at a time.
    continuing = cache * (1 + 1 / text.num_hidden_layers) + rows * text.vocab_size * DRAWING
    return {"caches and logits": max(continuing, prefill_bytes(vlm, [batch.prompt] * batch.count))}
