"""Compute log-probabilities of given tokens under the policy in one forward, projecting only the rows that are needed.

The vocabulary projection runs only over rows that predict a target, in chunks that are recomputed in the backward pass,
so the T x V logits never exist at once. Banned ids and temperature are those of sampling, so the numbers belong to the
distribution that was sampled from.

Shapes: T tokens to score, V vocabulary, D width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from common.forward import attention
from common.forward.packing import Packed
from common.models.adapters import without_adapters
from common.models.vlm import VLM
from common.runtime.distributed import gather


class PolicyScorer(torch.nn.Module):
    """The model as a module from packed tokens to log-probabilities; DeepSpeed wraps it.

    Attributes:
        model: A `*ForConditionalGeneration`, possibly a PEFT model around one.
    """

    banned: torch.Tensor

    def __init__(self, vlm: VLM, temperature: float, chunk: int, in_step: bool = False) -> None:
        """
        Args:
            vlm: Policy to score with. Its banned ids have probability zero.
            temperature: Divisor of the logits.
            chunk: Largest number of rows per vocabulary projection.
            in_step: True if all ranks call it together and must project equally often, whatever their numbers of
                tokens: ZeRO-3 gathers the projection's weights at every call.
        """
        super().__init__()
        attention.install(vlm.model)
        self.model = vlm.model
        self.register_buffer("banned", torch.tensor(sorted(vlm.banned), dtype=torch.long), persistent=False)
        self.temperature, self.chunk, self.in_step = temperature, chunk, in_step
        self.cap = vlm.family.cap(vlm.model.config)

    def forward(self, packed: Packed, entropy: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the target tokens.

        Args:
            packed: Prompts and completions.
            entropy: Compute entropies; False gives zeros (the reference policy needs none).

        Returns:
            Log-probabilities [T] with gradient, and entropies [T] of their distributions without. Both in nats.
        """
        base = without_adapters(self.model)
        # Run the model below its head, then keep the rows that predict a target.
        hidden = base.model(**spliced(base, packed.inputs), use_cache=False).last_hidden_state.flatten(
            0, 1
        )  # [rows, D]
        hidden = hidden[packed.predictors]  # [T, D]
        parts = math.ceil(len(hidden) / self.chunk)
        # Under ZeRO-3 a rank with fewer chunks would leave the others waiting in the all-gather of the head's weights.
        parts = max(gather(parts)) if self.in_step else parts
        # checkpoint: logits [chunk, V] are computed again in the backward pass instead of being kept.
        pieces = [
            checkpoint(self._score, base.lm_head, rows, targets, entropy, use_reentrant=False)
            for rows, targets in zip(hidden.tensor_split(parts), packed.targets.tensor_split(parts), strict=True)
        ]
        return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])

    def _score(
        self, head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(hidden)  # [chunk, V]
        if self.cap is not None:  # as the model's own forward does behind its head
            logits = self.cap * (logits / self.cap).tanh()
        logps = token_logps(logits, self.banned, self.temperature)
        chosen = logps.gather(-1, targets[:, None])[:, 0]
        with torch.no_grad():
            # entr(p) = -p log p with entr(0) = 0, so banned ids do not give NaN.
            return chosen, torch.special.entr(logps.exp()).sum(-1) if entropy else torch.zeros_like(chosen)


def head_rows(model: Any) -> int:
    """Return the rows per vocabulary projection whose fp32 logits take about 80 MB, at most 1024 (131 for Qwen2-VL).

    A projection in bf16 and its softmax need three to six times that for a moment.
    """
    return min(1024, max(1, 20_000_000 // int(model.get_output_embeddings().weight.shape[0])))


def spliced(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Put ready image features in place of the image tokens' embeddings.

    Args:
        model: A `*ForConditionalGeneration`.
        inputs: Keyword arguments of the model's forward; `image_features` [image tokens, D] in the order of the tokens.

    Returns:
        The same without `image_features` and `input_ids`, with `inputs_embeds`; unchanged without features.
    """
    if "image_features" not in inputs:
        return inputs
    others = {key: value for key, value in inputs.items() if key not in ("image_features", "input_ids")}
    ids = inputs["input_ids"]
    embedded = model.get_input_embeddings()(ids)  # [B, L, D]
    image = (ids == model.config.image_token_id)[..., None]
    return {**others, "inputs_embeds": embedded.masked_scatter(image, inputs["image_features"].to(embedded))}


def token_logps(logits: torch.Tensor, banned: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log-probabilities of all tokens at a temperature, without the banned ids. Shape: [..., V] -> [..., V].

    Computed in fp32, or in fp64 if the logits are.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Ban before the softmax, so that the remaining probabilities add up to 1, as in sampling.
    return (logits.index_fill(-1, banned, -torch.inf) / temperature).log_softmax(-1)


# fp32 arithmetic with 16-bit weights: the reference of the self-checks.
#
# In bf16 two correct forwards differ by as much as a wrong mask can change (0.07 to 0.1 nats in Qwen2-VL-2B), so no
# threshold separates them. With the same weights in fp32 arithmetic correct forwards differ by 1e-5, and any wrong mask
# or position by a thousand times that.

HALF = (torch.bfloat16, torch.float16)


class InFloat32(TorchDispatchMode):
    """Compute every operation on 16-bit tensors on fp32 copies of them; results stay fp32.

    Weights are copied for each use and forgotten, so no second model is held. For forwards without gradients.
    Operations of other libraries are left as they are; `exact` replaces the 8-bit products.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        # A cast to 16 bits becomes a cast to fp32; every other operation that computes gets fp32 inputs. Views keep the
        # 16-bit weights as they are.
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in HALF:
            kwargs["dtype"] = torch.float32
        elif computes(func):
            args, kwargs = tree_map(widened, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def exact(model: torch.nn.Module) -> Iterator[None]:
    """Compute without rounding: 16-bit tensors in fp32, 8- and 4-bit matrices as the matrices that they stand for.

    LLM.int8() chooses its outlier columns over all rows of a forward, so that two correct forwards in other batch
    shapes differ by as much as a wrong mask can change. The matrices themselves are the same in both.
    """
    replaced: dict[Any, Callable[[Any, torch.Tensor], torch.Tensor]] = {
        torch.nn.Conv2d: _wide_conv,
        torch.nn.Conv3d: _wide_conv,
    }
    bitsandbytes: Any = sys.modules.get("bitsandbytes")  # imported if any weight is in 8 or 4 bits
    if bitsandbytes:
        replaced |= {bitsandbytes.nn.Linear8bitLt: _linear_of_8_bits, bitsandbytes.nn.Linear4bit: _linear_of_4_bits}
    layers: list[Any] = [module for module in model.modules() if isinstance(module, tuple(replaced))]
    # a library (accelerate) may have put a forward of its own on the layer: that one comes back
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(next(way for kind, way in replaced.items() if isinstance(layer, kind)), layer)
    try:
        with InFloat32():
            yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward  # the class's own is seen again
            if own is not None:
                layer.forward = own


def _wide_conv(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The convolution in fp32: it refuses a bias of another format than its input before any operation is seen."""
    bias = None if layer.bias is None else layer.bias.float()
    return layer._conv_forward(x.float(), layer.weight.float(), bias)  # type: ignore[no-any-return]


def _linear_of_8_bits(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The product with an 8-bit matrix in fp32. Its numbers lie in the weight until the first forward."""
    held = layer.state if layer.weight.CB is None else layer.weight
    matrix = held.CB.float() * (held.SCB.float() / 127)[:, None]
    return F.linear(x.float(), matrix, None if layer.bias is None else layer.bias.float())


def _linear_of_4_bits(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The product with a 4-bit matrix in fp32."""
    from bitsandbytes.functional import dequantize_4bit

    matrix = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return F.linear(x.float(), matrix, None if layer.bias is None else layer.bias.float())


def widened(value: Any) -> Any:
    """Return a 16-bit tensor as fp32, anything else unchanged."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value


def computes(func: Any) -> bool:
    """Return whether an operation makes new values: no view of its input, nothing written in place."""
    schema = func._schema
    aliases = [each.alias_info for each in (*schema.arguments, *schema.returns)]
    return bool(func.namespace == "aten") and all(alias is None for alias in aliases)
