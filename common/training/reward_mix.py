"""The rewards of a run, made ready: built, reached, and given the run's own model where they judge with it."""

from __future__ import annotations

from typing import Any

from common.models.vlm import VLM
from common.rewards import Reward, StatefulReward, build_rewards
from common.rollout.hf import FrozenReplies
from common.runtime.distributed import barrier, rank


def prepare_rewards(mix: dict[str, dict[str, Any]]) -> dict[str, Reward]:
    """The reward mix of a run, built once: what its rewards need from outside is fetched, loaded or asked here.

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
    """Give the rewards that judge with the run's own model that model, as it is now.

    Args:
        rewards: From `prepare_rewards`.
        policy: Before anything is attached to it or trained, and before a training is continued.
        batch: Texts that it is asked together.
        name: Of its weights as they compute, for caches.
    """
    for reward in rewards.values():
        if isinstance(reward.function, StatefulReward) and reward.function.needs_base:
            reward.function.bind(FrozenReplies(policy, batch), name)
