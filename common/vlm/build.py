"""The parts of a vision-language learner, from the configuration: rollout options, encoder, embeddings, checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.config.schema import Config, GRPOConfig, RolloutConfig
from common.data.pictures import make_loader
from common.models import checks, files, meter, vlm
from common.models.encoder import Encoder
from common.models.features import FeatureStore
from common.rollout.base import Decoding, check_logprobs_match
from common.runtime.distributed import gather, rank
from common.types import Task, UserError
from common.vlm.prompting import TaskPrompts


def backend_options(config: Config, asked: TaskPrompts) -> dict[str, Any]:
    """Arguments of the rollout backend: those of the configuration; a backend that must know the longest prompt
    (`prompt_tokens`) and was told no limit gets room for the run's prompts. All ranks call it together.
    """
    options = config.rollout.options
    if options.get("prompt_tokens", 0) is not None:
        return options
    longest, context = 0, None
    if rank() == 0:
        measure, size = checks.check_weights(config), config.model.image_size
        prompts = [prompt for part in (asked.train, *asked.evaluation.values()) for prompt in part]
        longest, context = max(measure.tokens(prompts, size), default=0), measure.context
    longest, context = gather((longest, context))[0]
    return {**options, "prompt_tokens": meter.room(longest, config.rollout.max_completion_tokens, context)}


def check_logprobs(config: Config, backend: object) -> None:
    """See `check_logprobs_match`; before the weights are loaded `backend` is a class, then its object."""
    if isinstance(config.trainer, GRPOConfig):
        if config.rollout.overlap and not getattr(backend, "has_weight_copy", False):
            raise UserError(
                "rollout.overlap=true needs a sampler with weights of its own, but this one samples with the policy"
                " that is being updated; use rollout=vllm, or rollout.overlap=false"
            )
        check_logprobs_match(backend, sampling(config.rollout), config.trainer.importance_correction)


def shared_hash(folder: Path) -> str:
    """`files.weights_hash`, by one rank for all: it reads every weight. All ranks call it together."""
    return gather(files.weights_hash(folder) if rank() == 0 else "")[0]


def make_encoder(config: Config, policy: vlm.VLM, sha256: str, task: Task) -> Encoder:
    """Prompts to tensors; with a store of image features if the vision tower is frozen and disk space is given.

    `sha256`: of the weights; features of different ones are kept apart.
    """
    store = None
    if config.model.feature_cache_gb > 0:
        folder = Path(config.cache_dir).resolve() / "features" / weights_name(config, sha256)
        store = FeatureStore(folder, int(config.model.feature_cache_gb * 2**30))
    return Encoder(policy, make_loader(config, task), config.model.max_prompt_tokens, store)


def weights_name(config: Config, sha256: str) -> str:
    """Names the weights that a run begins from as they compute, for caches: their hash and their number format."""
    number_format = "int8" if config.model.load_in_8bit else config.model.dtype
    return f"{sha256[:16]}-{number_format}"


def sampling(config: RolloutConfig) -> Decoding:
    """How completions are drawn for training."""
    return Decoding(config.temperature, config.top_k, config.top_p, config.max_completion_tokens)
