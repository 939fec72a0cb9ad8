"""From the configuration to a vision-language model that is ready to be asked and trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.config.schema import Config, GRPOConfig, TrainerConfig
from common.data import task
from common.data.pictures import make_loader
from common.data.task import Questions
from common.forward import attention
from common.learner import Prepares
from common.method import Embeddings, Looks
from common.models import checks, files, meter, vlm
from common.models.encoder import Encoder
from common.models.features import FeatureStore
from common.models.hosted_slots import attach_hosted
from common.models.lazy_adamw import Rule
from common.models.slots import Slots, attach
from common.models.vision import VisionTower
from common.plugins import check_call, locate
from common.rollout.base import Rollout, check_comparable
from common.run import doctor
from common.run.checkpoint import Checkpoints
from common.runtime.distributed import gather, rank
from common.training.reward_mix import bind_rewards, prepare_rewards
from common.training.schedule import total_updates
from common.types import UserError
from common.vlm.learner import EMBEDDINGS, VLMLearner, sampling


def build(
    config: Config, questions: Questions, device: torch.device, folder: Path, checkpoints: Checkpoints
) -> VLMLearner:
    """See `Build` in common/learner.py.

    Raises:
        UserError: The weights do not load, have changed since the run began, or the doctor refuses the training.
    """
    options = backend_options(config, questions)
    check_call(config.rollout.backend, "rollout.backend", options, given=1)
    backend = locate(config.rollout.backend, "rollout.backend")
    check_logps(config, backend)
    state, updates = checkpoints.state, total_updates(config.trainer, len(questions.train))
    learns = isinstance(config.trainer, GRPOConfig) and updates > (0 if state is None else state.update)
    rewards = prepare_rewards(config.rewards) if learns else {}
    if isinstance(questions.method, Prepares):
        questions.method.prepare(config, questions, device, folder)
    source = files.weights_folder(config)
    torch.manual_seed(config.seed)  # adapters start alike on all ranks
    policy = vlm.load(source, config.model, device, train=config.trainer.name != "none")
    attention.install(policy.model, config.model.attention)
    weights = {"path": str(source), "sha256": shared_hash(source)}
    checkpoints.begin_from(weights["sha256"], weights["path"])
    # before anything is attached or trained, and before a training is continued
    bind_rewards(rewards, policy, config.rollout.evaluation_batch, weights_name(config, weights["sha256"]))
    if isinstance(questions.method, Looks):
        kept = None if config.trainer.name == "none" else folder / "model" / EMBEDDINGS
        tower = VisionTower(policy, make_loader(config, questions))
        embeddings = questions.method.look(tower, questions.task, kept)
        if embeddings is not None:
            policy = replace(policy, slots=with_embeddings(policy.model, embeddings, config.trainer))
            del embeddings  # ImageNet's are 2.6 GB
        questions = task.ask_again(questions)
    encoder = make_encoder(config, policy, weights["sha256"], questions)
    rollout: Rollout = backend(policy, **options)
    check_logps(config, rollout)  # again: it may say so of an object alone
    learner = VLMLearner(config, questions, policy, encoder, rollout, rewards, weights, checkpoints)
    if config.doctor is True or (state is None and config.doctor == "auto" and doctor.is_long(updates, config.trainer)):
        learner.examine()
    return learner


def backend_options(config: Config, questions: Questions) -> dict[str, Any]:
    """Those of the configuration; a backend that must know the longest prompt (`prompt_tokens`) and was told no limit
    gets room for the run's questions. All ranks call it together.
    """
    options = config.rollout.options
    if options.get("prompt_tokens", 0) is not None:
        return options
    longest, context = 0, None
    if rank() == 0:
        measure, size = checks.check_weights(config), config.model.image_size
        asked = [prompt for prompts in (questions.train, *questions.evaluation.values()) for prompt in prompts]
        longest, context = max(measure.tokens(asked, size), default=0), measure.context
    longest, context = gather((longest, context))[0]
    return {**options, "prompt_tokens": meter.room(longest, config.rollout.max_completion_tokens, context)}


def with_embeddings(model: Any, embeddings: Embeddings, trainer: TrainerConfig) -> Slots:
    """Put a method's embeddings behind the vocabulary. All ranks call it together."""
    if trainer.embeddings == "host" and embeddings.trainable and trainer.name != "none":
        rule = Rule((trainer.betas[0], trainer.betas[1]), trainer.weight_decay)
        return attach_hosted(model, embeddings.entries, True, rule)
    return attach(model, embeddings.entries, embeddings.trainable)


def check_logps(config: Config, backend: object) -> None:
    """See `check_comparable`; before the weights are loaded `backend` is a class, then its object."""
    if isinstance(config.trainer, GRPOConfig):
        if config.rollout.overlap and not getattr(backend, "own_weights", False):
            raise UserError(
                "rollout.overlap=true needs a sampler with weights of its own, but this one samples with the policy"
                " that is being updated; use rollout=vllm, or rollout.overlap=false"
            )
        check_comparable(backend, sampling(config.rollout), config.trainer.importance_correction)


def shared_hash(folder: Path) -> str:
    """`files.weights_hash`, by one rank for all: it reads every weight. All ranks call it together."""
    return gather(files.weights_hash(folder) if rank() == 0 else "")[0]


def make_encoder(config: Config, policy: vlm.VLM, sha256: str, questions: Questions) -> Encoder:
    """Prompts to tensors; with a store of image features if the vision tower is frozen and disk space is given.

    `sha256`: of the weights; features of different ones are kept apart.
    """
    store = None
    if config.model.feature_cache_gb > 0:
        folder = Path(config.cache_dir).resolve() / "features" / weights_name(config, sha256)
        store = FeatureStore(folder, int(config.model.feature_cache_gb * 2**30))
    return Encoder(policy, make_loader(config, questions), config.model.max_prompt_tokens, store)


def weights_name(config: Config, sha256: str) -> str:
    """Names the weights that a run begins from as they compute, for caches: their hash and their number format."""
    number_format = "int8" if config.model.load_in_8bit else config.model.dtype
    return f"{sha256[:16]}-{number_format}"
