"""What `rollout=vllm` refuses before any weights are loaded. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from common.config.schema import FAMILIES, Config
from common.runtime.distributed import world
from common.types import UserError

BOTH_WAYS = ("gemma3",)  # families whose image tokens see each other both ways


def check(config: Config) -> None:
    """See `rollout.check` in `RolloutConfig`.

    Raises:
        UserError: vLLM is not installed, or could not compute what the trainer computes.
    """
    if find_spec("vllm") is None:
        raise UserError("rollout=vllm: vLLM is not installed; install it with make setup-vllm, or use rollout=hf")
    if config.model.load_in_8bit:
        raise UserError("rollout=vllm takes no weights in 8 bits: set model.load_in_8bit=false, or use rollout=hf")
    if config.model.family not in FAMILIES and config.model.family not in FAMILIES.values():
        raise UserError(
            f"rollout=vllm knows the weights of {', '.join(FAMILIES)}, not of model.family={config.model.family}; use"
            " rollout=hf"
        )
    if config.rollout.overlap and config.gpus > 0 and config.rollout.options.get("sleep") != 0:
        raise UserError("rollout.overlap=true: the sampler works during updates, so set rollout.options.sleep=0")
    together = config.rollout.options.get("tensor_parallel", 1)
    ranks = max(config.gpus, world())
    if not isinstance(together, int) or together < 1 or ranks % together:
        raise UserError(
            f"rollout.options.tensor_parallel={together}: so many ranks share an engine, it must divide their number,"
            f" {ranks}"
        )
    if config.rollout.overlap and together > 1:
        raise UserError(
            "rollout.overlap=true samples with an engine of every rank's own: rollout.options.tensor_parallel=1"
        )
    if config.gpus == 0 and config.model.family in BOTH_WAYS and config.model.image_attention != "causal":
        raise UserError(
            f"rollout=vllm with gpus=0 lets no image token see those after it, as those of {config.model.name} do; set"
            " model.image_attention=causal, for trainer and sampler alike, or use rollout=hf"
        )
