"""Log-probabilities of given tokens under the policy: one forward, vocabulary projection only where it is needed.

The projection runs over the predictor rows alone and in chunks that are recomputed in the backward pass, so the T x V
logits never exist at once. The same ids are banned and the same temperature is applied as in sampling, so the numbers
are those of the distribution that was sampled from.

Shapes: T tokens to score, V vocabulary, D width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
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
from common.runtime.distributed import gather


class PolicyScorer(torch.nn.Module):
    """The model as a function from packed tokens to log-probabilities. DeepSpeed wraps this module.

    Attributes:
        model: A `*ForConditionalGeneration`, possibly a PEFT model around one.
    """

    banned: torch.Tensor

    def __init__(
        self, model: Any, banned: Sequence[int], temperature: float, chunk: int, in_step: bool = False
    ) -> None:
        """
        Args:
            model: The policy.
            banned: Ids with probability zero.
            temperature: Divides the logits.
            chunk: Most rows per vocabulary projection.
            in_step: All ranks call it together and project equally often, whatever their numbers of tokens: ZeRO-3
                gathers the projection's weights at every call.
        """
        super().__init__()
        attention.install(model)
        self.model = model
        self.register_buffer("banned", torch.tensor(sorted(banned), dtype=torch.long), persistent=False)
        self.temperature, self.chunk, self.in_step = temperature, chunk, in_step

    def forward(self, packed: Packed, entropy: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the target tokens.

        Args:
            packed: Prompts and completions.
            entropy: False leaves the entropies at 0; nobody reads those of a reference.

        Returns:
            Log-probabilities [T] with gradient, and the entropies [T] of their distributions without. Both in nats.
        """
        base = without_adapters(self.model)
        hidden = base.model(**spliced(base, packed.inputs), use_cache=False).last_hidden_state.flatten(
            0, 1
        )  # [rows, D]
        hidden = hidden[packed.predictors]  # [T, D]
        parts = math.ceil(len(hidden) / self.chunk)
        parts = max(gather(parts)) if self.in_step else parts
        pieces = [
            checkpoint(self._score, base.lm_head, rows, targets, entropy, use_reentrant=False)
            for rows, targets in zip(hidden.tensor_split(parts), packed.targets.tensor_split(parts), strict=True)
        ]
        return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])

    def _score(
        self, head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logps = token_logps(head(hidden), self.banned, self.temperature)  # [chunk, V]
        chosen = logps.gather(-1, targets[:, None])[:, 0]
        with torch.no_grad():
            return chosen, torch.special.entr(logps.exp()).sum(-1) if entropy else torch.zeros_like(chosen)


def head_rows(model: Any) -> int:
    """Rows per vocabulary projection whose logits in fp32 take about 80 MB, and no more than 1024: 131 for Qwen2-VL.

    A projection in bf16 and its softmax hold three to six times that for a moment.
    """
    return min(1024, max(1, 20_000_000 // int(model.get_output_embeddings().weight.shape[0])))


def spliced(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Model inputs in which ready image features take the place of their image tokens.

    Args:
        model: A `*ForConditionalGeneration`.
        inputs: Keyword arguments of its forward; `image_features` [image tokens, D] in the order of the tokens.

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
    """Log-probabilities of all tokens at a temperature, without the banned ids. Shape: [..., V] -> [..., V].

    At least fp32; in fp64 where the logits are.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits.index_fill(-1, banned, -torch.inf) / temperature).log_softmax(-1)


# Compute with the weights as they are, but without rounding to them: the oracle of the self-checks.
#
# In bf16 two correct forwards differ by as much as a wrong mask can change (0.07 to 0.1 nats in Qwen2-VL-2B), so that
# no limit on their difference separates the two. With the same weights in fp32 arithmetic correct ones differ by
# 1e-5, and every fault of a mask or a position by a thousand times that.

HALF = (torch.bfloat16, torch.float16)


class InFloat32(TorchDispatchMode):
    """Inside, every operation on 16-bit tensors is computed on fp32 copies of them, and results stay fp32.

    Weights are copied for each use and forgotten, so no second model is held. For forwards without gradients.
    Operations of other libraries are left as they are; `exact` replaces the 8-bit products.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in HALF:
            kwargs["dtype"] = torch.float32
        elif computes(func):
            args, kwargs = tree_map(widened, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def exact(model: torch.nn.Module) -> Iterator[None]:
    """Compute without rounding: 16-bit tensors in fp32, 8-bit matrices as the fp32 matrices that they stand for.

    LLM.int8() chooses its outlier columns over all rows of a forward, so that two correct forwards in other batch
    shapes differ by as much as a wrong mask can change. The matrices themselves are the same in both.
    """
    bitsandbytes: Any = sys.modules.get("bitsandbytes")  # imported if any weight is in 8 bits
    quantised = bitsandbytes.nn.Linear8bitLt if bitsandbytes else ()
    layers: list[Any] = [module for module in model.modules() if isinstance(module, quantised)]
    for layer in layers:
        layer.forward = partial(_dequantised_linear, layer)
    try:
        with InFloat32():
            yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is seen again


def _dequantised_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The product with a matrix of bitsandbytes in fp32. Its numbers lie in the weight until the first forward."""
    held = layer.state if layer.weight.CB is None else layer.weight
    matrix = held.CB.float() * (held.SCB.float() / 127)[:, None]
    return F.linear(x.float(), matrix, None if layer.bias is None else layer.bias.float())


def widened(value: Any) -> Any:
    """A 16-bit tensor as fp32, anything else as it is."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value


def computes(func: Any) -> bool:
    """Whether an operation makes new values: no view of its input, nothing written in place."""
    schema = func._schema
    aliases = [each.alias_info for each in (*schema.arguments, *schema.returns)]
    return bool(func.namespace == "aten") and all(alias is None for alias in aliases)
