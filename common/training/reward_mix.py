"""Prepare the rewards of a run: build them, fetch what they need, bind the run's own model to judges."""

from __future__ import annotations

from typing import Any

from common.models.vlm import VLM
from common.rewards import Reward, StatefulReward, build_rewards
from common.rollout.hf import FrozenReplies
from common.runtime.distributed import barrier, rank


def prepare_rewards(mix: dict[str, dict[str, Any]]) -> dict[str, Reward]:
    """Build the reward mix of a run, and fetch, load or connect what its rewards need from outside.

    Rank 0 goes first, so that nothing is fetched twice.

    Raises:
        UserError: Something is missing.
    """
    rewards = build_rewards(mix)
    for turn in (rank() == 0, rank() != 0):
        for reward in rewards.values():
            if turn and isinstance(reward.function, StatefulReward):
                reward.function.prepare()
        barrier()
    return rewards


def bind_rewards(rewards: dict[str, Reward], policy: VLM, batch: int, name: str) -> None:
    """Give the rewards that judge with the run's own model that model in its present state.

    Args:
        rewards: Rewards from `prepare_rewards`.
        policy: Model before anything is attached to it or trained, and before a training is resumed.
        batch: Number of texts in a batch.
        name: Name of the weights, with their number format, for caches.
    """
    functions = [reward.function for reward in rewards.values()]
    judges = [each for each in functions if isinstance(each, StatefulReward) and each.needs_base]
    replies = FrozenReplies(policy, batch) if judges else None  # one, since it may be a copy of the model
    for judge in judges:
        assert replies is not None
        judge.bind(replies, name)
