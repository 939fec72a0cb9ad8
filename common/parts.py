"""What a run is made of: model, sampler, evaluation, trainer and tracker, built from the configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import task
from common.checkpoint import State
from common.distributed import barrier, gather, rank
from common.evaluate import Evaluator
from common.grpo.trainer import GRPOTrainer
from common.label_scores import LabelScorer
from common.models import files, vlm
from common.models.features import FeatureStore
from common.models.slots import attach
from common.models.vision import Vision
from common.pictures import make_loader
from common.plugins import locate
from common.rewards import Reward, build_rewards
from common.rollout.base import Decoding, Rollout
from common.rollout.text import FrozenReplies
from common.schedule import Epochs
from common.schema import GRPO, Config
from common.schema import Rollout as RolloutConfig
from common.sft import SFTTrainer
from common.task import Questions
from common.tracking import NullTracker, Tracker, WandbTracker
from common.types import Trainer


@dataclass(frozen=True)
class Parts:
    """What a run is made of before anything is trained.

    checkpoint: path and sha256 of the model's. rewards: the same for the doctor and for the training.
    """

    checkpoint: dict[str, str]
    questions: Questions
    policy: vlm.VLM
    encoder: vlm.Encoder
    rollout: Rollout
    evaluator: Evaluator
    rewards: dict[str, Reward]


def assemble(
    config: Config,
    questions: Questions,
    checkpoint: Path,
    device: torch.device,
    rewards: dict[str, Reward],
    place: Path | None = None,
) -> Parts:
    """Load the model and put sampler and evaluation around it.

    Args:
        config: Of the run.
        questions: What it asks.
        checkpoint: Folder of the model.
        device: Where it goes.
        rewards: From `prepare_rewards`; those that judge with the run's own model get it. None for no training.
        place: See `Method.look`.
    """
    torch.manual_seed(config.seed)  # adapters start alike on all ranks
    policy = vlm.load(checkpoint, config.model, device, train=config.trainer.name != "none")
    identity = {"path": str(checkpoint), "sha256": shared_hash(checkpoint)}
    # before anything is attached or trained, and before a training is continued
    bind_rewards(config, rewards, policy, identity["sha256"])
    seen = questions.method.look(Vision(policy, make_loader(config, questions)), questions.task, place)
    if seen is not None:
        policy = replace(policy, slots=attach(policy.model, seen.entries, seen.trainable))
        questions = task.ask_again(questions)
    encoder = make_encoder(config, policy, identity["sha256"], questions)
    rollout: Rollout = locate(config.rollout.backend, "rollout.backend")(policy)
    labels = LabelScorer(policy) if config.label_scoring else None
    reasoned = config.label_scoring != "direct"
    evaluator = Evaluator(rollout, encoder, questions, config.rollout, labels, reasoned)
    return Parts(identity, questions, policy, encoder, rollout, evaluator, rewards)


def shared_hash(checkpoint: Path) -> str:
    """`files.checkpoint_hash`, by one rank for all: it reads every weight. All ranks call it together."""
    return gather(files.checkpoint_hash(checkpoint) if rank() == 0 else "")[0]


def find_checkpoint(config: Config) -> Path:
    """The checkpoint folder of the run's model; built or fetched on first use."""
    model = config.model
    if model.recipe is not None:
        return files.build(model.recipe, config.cache_dir)
    assert model.path is not None
    folder = files.find(model.path, model.revision)
    files.lineage(folder)  # what adapters build on may be on the hub, too
    return folder


def make_encoder(config: Config, policy: vlm.VLM, sha256: str, questions: Questions) -> vlm.Encoder:
    """Prompts to tensors; with a store of image features if the vision tower is frozen and disk space is given.

    `sha256`: of the checkpoint; features of different ones are kept apart.
    """
    store = None
    if config.model.feature_cache_gb > 0:
        folder = Path(config.cache_dir).resolve() / "features" / weights_name(config, sha256)
        store = FeatureStore(folder, int(config.model.feature_cache_gb * 2**30))
    return vlm.Encoder(policy, make_loader(config, questions), config.model.max_prompt_tokens, store)


def weights_name(config: Config, sha256: str) -> str:
    """Names the weights that a run begins from as they compute, for caches: their hash and their number format."""
    number_format = "int8" if config.model.load_in_8bit else config.model.dtype
    return f"{sha256[:16]}-{number_format}"


def make_trainer(config: Config, parts: Parts, updates: int, resume: Path | None) -> Trainer:
    """The trainer that `trainer.name` asks for."""
    shared: dict[str, Any] = {
        "vlm": parts.policy,
        "encoder": parts.encoder,
        "prompts": Epochs(partial(parts.questions.method.train_prompts, parts.questions.task), parts.questions.train),
        "config": config.trainer,
        "deepspeed": config.deepspeed,
        "updates": updates,
        "seed": config.seed,
        "resume": None if resume is None else resume / "deepspeed",
    }
    if isinstance(config.trainer, GRPO):
        return GRPOTrainer(**shared, rollout=parts.rollout, rewards=parts.rewards, decoding=sampling(config.rollout))
    return SFTTrainer(**shared, loss=config.protocol.sft_loss, reply=parts.questions.method.label_response)


def prepare_rewards(config: Config) -> dict[str, Reward]:
    """The reward mix of a run, built once: what its rewards need from outside is fetched, loaded or asked here.

    Rank 0 goes first, so that nothing is fetched twice.

    Raises:
        UserError: Something is missing.
    """
    rewards = build_rewards(config.rewards)
    for turn in (rank() == 0, rank() != 0):
        for reward in rewards.values():
            prepare: Any = getattr(reward.function, "prepare", None)
            if turn and prepare is not None:
                prepare()
        barrier()
    return rewards


def bind_rewards(config: Config, rewards: dict[str, Reward], policy: vlm.VLM, sha256: str) -> None:
    """Give the rewards that judge with the run's own model that model, as it is now; `sha256`: of its checkpoint."""
    for reward in rewards.values():
        judge: Any = reward.function
        if getattr(judge, "needs_base", False):
            replies = FrozenReplies(policy, judge.max_tokens, config.rollout.evaluation_batch)
            judge.bind(replies, weights_name(config, sha256))


def sampling(config: RolloutConfig) -> Decoding:
    """How completions are drawn for training."""
    return Decoding(config.temperature, config.top_k, config.top_p, config.max_completion_tokens)


def make_tracker(
    config: Config, values: dict[str, Any], folder: Path, questions: Questions, state: State | None
) -> Tracker:
    """W&B on rank 0, nothing elsewhere."""
    if rank() != 0 or config.tracking.mode == "disabled":
        return NullTracker()
    whose = dict.fromkeys(questions.task.origins.values())
    tags = [config.method["name"], config.data.name, config.setting.name, f"s{config.shots}", *whose]
    job_type = "eval" if config.trainer.name == "none" else "train"
    known = state.tracker if state else None
    return WandbTracker(
        config.tracking, folder, job_type, tags, values, questions.evaluation, questions.task.images.open, known
    )
