"""Checks of `rollout=vllm` before weights are loaded. Needs no torch."""

from __future__ import annotations

from importlib.util import find_spec

from common.config.schema import Config
from common.models.families import family
from common.types import UserError


def check(config: Config) -> None:
    """Check that vLLM can sample for this configuration; `rollout.check` names this function.

    Raises:
        UserError: vLLM is not installed, or cannot compute the same as the trainer.
    """
    if find_spec("vllm") is None:
        raise UserError("rollout=vllm: vLLM is not installed; install it with make setup-vllm, or use rollout=hf")
    if bits := config.model.bits:
        raise UserError(
            f"rollout=vllm takes no weights in {bits} bits: set model.load_in_{bits}bit=false, or use rollout=hf"
        )
    if config.rollout.overlap and config.gpus > 0 and config.rollout.options.get("sleep_level") != 0:
        raise UserError("rollout.overlap=true: the sampler works during updates, so set rollout.options.sleep_level=0")
    if config.gpus == 0 and family(config.model.family).both_ways and config.model.image_attention != "causal":
        raise UserError(
            f"rollout=vllm with gpus=0 lets no image token see those after it, as those of {config.model.name} do; set"
            " model.image_attention=causal, for trainer and sampler alike, or use rollout=hf"
        )
