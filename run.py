"""Train and evaluate one configuration: `python run.py method=nothinking data=digits shots=16`. See --help.

Hydra composes, the checks that take a second run, then the ranks start. Reading on: common/pipeline.py.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from common import config as configuration
from common.distributed import adopt_slurm, rank
from common.types import UserError

configuration.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """One job; a multirun calls it once per point and goes on with the next when one fails."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        job(cfg, folder)
    except UserError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            print(f"{folder.name}: {one_line(error)}", file=sys.stderr)  # Hydra itself only reports the first
            raise
        sys.exit(one_line(error))
    finally:
        with suppress(OSError):
            folder.rmdir()  # made by Hydra; goes only if it is empty


def job(cfg: DictConfig, folder: Path) -> None:
    """Check, run, show. A folder that already holds this configuration's result only shows it.

    With `manifest=true` or `doctor=true` nothing is trained: the first prints, the second examines.
    """
    from common import launch, preflight, task
    from common.data import manifest
    from common.report import tables
    from common.run_folder import RunFolder

    config = configuration.validate(cfg)
    values = configuration.plain(cfg)
    if config.manifest:
        print(manifest.text(task.build(config).manifest), end="")
        return
    if config.doctor is True:
        preflight.check(config)
        launch.launch(config, values, folder)
        return
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


def one_line(error: BaseException) -> str:
    """What a user sees of a mistake in the request: the message, and the first line of what caused it."""
    text = " ".join(str(error).split("Config search path")[0].split())
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text += f" ({str(error.__cause__).splitlines()[0]})"
    return f"error: {text}"


def run() -> None:
    """Entry point: mistakes in the request become one line and exit code 1, anything else a traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that errors reach this function and not Hydra's own printer
    # CPU threads that spin while they wait slow two runs on one machine down thirty times (docs/log.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    adopt_slurm()
    try:
        main()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        sys.exit(one_line(error))
    except OSError as error:
        if HydraConfig.initialized() and Path(HydraConfig.get().runtime.output_dir).is_dir():
            raise
        sys.exit(f"error: cannot create the run folder: {error}; choose another with hydra.run.dir=<folder>")


if __name__ == "__main__":
    run()
