"""What Hydra calls before it makes a multirun's sweeper."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from common.sweep import plugin


class Papers(Callback):
    """Makes the sweeper known to the multiruns that ask for it."""

    def on_multirun_start(self, config: DictConfig, **options: Any) -> None:
        """Hydra makes the sweeper next."""
        if str(config.hydra.sweeper._target_).startswith(plugin.MODULE):
            from common.sweep.sweeper import PaperSweeper  # no other command needs it

            plugin.register(PaperSweeper)
