"""Start the ranks of one run: this process alone, one process per GPU, or the ranks that torchrun or SLURM started.

- `gpus=0`, or under torchrun or srun: `launch` calls `worker` in this process.
- `gpus=N`: `start_ranks` starts N processes through torch elastic, and each calls `worker`.

`worker` sets up logging and runs common/pipeline.py. Hydra composes once, in the parent; the ranks that it starts get
plain values. (Under torchrun or srun every rank composes by itself.)
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.config.schema import NO_FAMILY, Config
from common.data.task import TaskData
from common.runtime import process
from common.runtime.distributed import forget_group_alone, rank, started_by_launcher
from common.runtime.interrupt import Interrupted, heeded, left_to_ranks
from common.runtime.progress import SOON, watched
from common.types import UserError

log = logging.getLogger(__name__)


def launch(config: Config, folder: Path, data: TaskData | None = None) -> None:
    """Execute the run on `config.gpus` ranks and wait for it.

    `data`: data of the run if this process has read it already; ranks in other processes read it themselves.
    """
    if config.gpus == 0 or started_by_launcher():
        worker(config, folder, data)
    else:
        start_ranks(config.gpus, config, folder)


def start_ranks(count: int, config: Config, folder: Path) -> None:
    """Start `count` processes through torch elastic; the first that fails ends all, and its error is raised."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from common.models.files import weights_folder

    if config.model.family != NO_FAMILY:
        weights_folder(config)  # download or build once, not in every rank
    forget_group_alone()  # environment left by an earlier CPU run of the same sweep
    elastic = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=config.run_name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        start_method="spawn",
        signals_to_handle="SIGQUIT",  # other signals are left to the ranks, which write a checkpoint first
    )
    with left_to_ranks() as request:
        try:
            elastic_launch(elastic, as_rank)(config, folder)
        except ChildFailedError as error:
            # elastic gives the error of the first failed rank as text; turn it back into the exception that run.py
            # expects.
            failure = error.get_first_failure()[1].message  # a dict where the rank could write its error file
            cause = str(failure["message"] if isinstance(failure, dict) else failure)
            for raised, kind in ((UserError, UserError), (RankStopped, Interrupted)):
                if cause.startswith(f"{raised.__name__}: "):
                    raise kind(cause.removeprefix(f"{raised.__name__}: ")) from None
            if request.made:  # a rank was stopped before it could handle the signal
                raise Interrupted("stopped; the same command goes on from the last checkpoint") from None
            raise


class RankStopped(Exception):
    """Stands for `Interrupted` between a rank and the process that started it."""


def as_rank(config: Config, folder: Path) -> None:
    """Run `worker` as a rank of torch elastic.

    Elastic takes a KeyboardInterrupt for an end without error, and would wait forever for the result of the rank.
    """
    try:
        worker(config, folder)
    except Interrupted as stop:
        raise RankStopped(str(stop)) from None


def worker(config: Config, folder: Path, data: TaskData | None = None) -> None:
    """Run one rank: logging, imports, then the pipeline (or the examination of `doctor=true`).

    Raises:
        UserError: A mistake in the request, or a full disk.
        Interrupted: The user asked the run to stop.
    """
    quiet_libraries()
    logging.getLogger("common").setLevel(logging.INFO)
    # Only rank 0 keeps a log.
    kept = None if rank() > 0 or config.doctor is True else folder / "run.log"
    with heeded(), logged(kept), watched(f"{folder.name}: running", SOON):
        from safetensors import SafetensorError

        try:
            # Imports create many objects: pausing the garbage collector makes them faster.
            with process.garbage_collector_paused():
                from common.learner import learner_class
                from common.pipeline import examine, run

                learner_class(config)  # imports the learner's code, which takes seconds for a language model
            if config.doctor is True:
                examine(config, folder)
            else:
                run(config, folder, data)
        # Everything is logged here and raised again; full disks become a UserError, since the user can fix them.
        except (UserError, Interrupted) as error:
            log.error("%s", error)
            raise
        except KeyboardInterrupt:
            log.error("interrupted")
            raise Interrupted("stopped; the same command goes on from the last checkpoint") from None
        except OSError as error:
            log.exception("the run failed")
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"the disk is full ({error}); free some space and give the same command again"
                ) from error
            raise
        except SafetensorError as error:
            log.exception("the run failed")
            raise UserError(f"weights cannot be written or read ({error}); is the disk full?") from error
        except Exception:
            log.exception("the run failed")
            raise


@contextmanager
def logged(path: Path | None) -> Iterator[None]:
    """Send messages to the file, and warnings also to the terminal. Errors are printed by those who catch them.

    Args:
        path: Log file; None: this rank keeps no log and prints nothing.
    """
    if path is None:
        kept: list[logging.Handler] = [logging.NullHandler()]
    else:
        file, terminal = logging.FileHandler(path, encoding="utf-8"), logging.StreamHandler()
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        terminal.addFilter(lambda record: record.levelno == logging.WARNING)
        kept = [file, terminal]
    root = logging.getLogger()
    # Hydra's own handler writes to the terminal, too: without its removal everything would appear twice.
    others = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    for other in others:
        root.removeHandler(other)
    for handler in kept:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in kept:
            root.removeHandler(handler)
            handler.close()
        for other in others:
            root.addHandler(other)


def quiet_libraries() -> None:
    """Turn off progress bars and notices of libraries, which would break our own progress lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
