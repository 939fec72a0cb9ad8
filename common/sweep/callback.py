"""What Hydra calls before it makes a multirun's sweeper and launcher."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from common.sweep.plugin import MODULE, register


class Papers(Callback):
    """Makes the sweeper known to the multiruns that ask for it, and lets a SLURM array be waited for with open eyes."""

    def on_multirun_start(self, config: DictConfig, **options: Any) -> None:
        """Hydra makes the sweeper next."""
        if str(config.hydra.sweeper._target_).startswith(MODULE):
            from common.sweep.sweeper import PaperSweeper  # no other command needs it

            register(PaperSweeper)
        if str(config.hydra.launcher._target_).endswith(".SlurmLauncher"):
            from common.sweep import queue

            queue.watch()
