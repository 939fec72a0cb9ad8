"""Train and evaluate one configuration: `python run.py method=nothinking data=digits shots=16`. See --help.

Hydra composes, the checks that take a second run, then the ranks start. Reading on: common/pipeline.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from common import config as configuration
from common.distributed import rank
from common.types import UserError

configuration.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """One job; a multirun calls it once per point."""
    from common import launch, preflight
    from common.report import tables
    from common.run_folder import RunFolder

    config = configuration.validate(cfg)
    values = configuration.plain(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    place = RunFolder(folder)
    result = place.finished_result(values)
    if result is None:
        preflight.check(config)
        if rank() == 0:
            place.claim(values)
        launch.launch(config, values, folder)
        result = place.finished_result(values)
    else:
        print(f"already finished: {folder}")
    if result is not None and rank() == 0:
        tables.show(result, folder)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the handlers below instead of Hydra's own printer
    try:
        main()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        sys.exit("error: " + " ".join(str(error).split()))
