"""Starting the ranks of one run: this process alone, or one process per GPU, or the ranks that torchrun or SLURM
started.

Hydra composes once, in the parent; the ranks it starts get plain values. (Under torchrun or srun every rank composes
itself.)
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Any

from common.distributed import forget_group_alone, rank, started_by_launcher
from common.schema import Config
from common.types import UserError


def launch(config: Config, values: dict[str, Any], folder: Path) -> None:
    """Execute the run on `config.gpus` ranks and wait for it."""
    if config.gpus == 0 or started_by_launcher():
        worker(config, values, folder)
    else:
        start_ranks(config.gpus, config, values, folder)


def start_ranks(count: int, config: Config, values: dict[str, Any], folder: Path) -> None:
    """Start `count` processes through torch elastic; the first that fails ends all, its error shown as the cause."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from common.parts import find_checkpoint

    find_checkpoint(config)  # fetched or built once, before the ranks ask for it
    forget_group_alone()  # left by a job of the same sweep that ran on the CPU
    elastic = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=config.run_name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        start_method="spawn",
    )
    try:
        elastic_launch(elastic, worker)(config, values, folder)
    except ChildFailedError as error:
        found = error.get_first_failure()[1].message  # a dict where the rank could write its error file
        cause = str(found["message"] if isinstance(found, dict) else found)
        if cause.startswith("UserError: "):
            raise UserError(cause.removeprefix("UserError: ")) from None
        raise


def worker(config: Config, values: dict[str, Any], folder: Path) -> None:
    """One rank."""
    quiet_libraries()
    logging.getLogger("common").setLevel(logging.INFO)
    for printer in logging.getLogger().handlers:
        printer.setLevel(logging.WARNING)
    handler = None
    if rank() == 0 and config.doctor is not True:
        handler = logging.FileHandler(folder / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
    from safetensors import SafetensorError

    from common.pipeline import examine, run

    try:
        if config.doctor is True:
            examine(config)
        else:
            run(config, values, folder)
    except UserError as error:
        logging.getLogger(__name__).error("%s", error)
        raise
    except OSError as error:
        logging.getLogger(__name__).exception("the run failed")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full ({error}); free some space and give the same command again") from error
        raise
    except SafetensorError as error:
        logging.getLogger(__name__).exception("the run failed")
        raise UserError(f"weights cannot be written or read ({error}); is the disk full?") from error
    except Exception:
        logging.getLogger(__name__).exception("the run failed")
        raise
    finally:
        if handler is not None:
            logging.getLogger().removeHandler(handler)
            handler.close()


def quiet_libraries() -> None:
    """Progress bars and notices of libraries would tear our own apart."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
