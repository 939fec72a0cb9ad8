"""Hydra callback that prepares a multirun's sweeper and launcher."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from common.sweep.plugin import MODULE, register


class Papers(Callback):
    """Registers the papers' sweeper for multiruns that use it, and a queue watcher for SLURM arrays."""

    def on_multirun_start(self, config: DictConfig, **options: Any) -> None:
        """Register both; Hydra instantiates the sweeper next."""
        if str(config.hydra.sweeper._target_).startswith(MODULE):
            from common.sweep.sweeper import PaperSweeper  # no other command needs it

            register(PaperSweeper)
        if str(config.hydra.launcher._target_).endswith(".SlurmLauncher"):
            from common.sweep import queue

            queue.watch()
