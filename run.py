"""Train and evaluate one configuration: `python run.py method=nothinking data=digits shots=16`. See --help.

Hydra composes, the checks that take a second run, then the ranks start. Reading on: common/pipeline.py.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from common.config import composition as configuration
from common.config import suggest
from common.config.command_line import literal, of_each_run
from common.plugins import locate
from common.runtime import process, slurm
from common.runtime.distributed import rank, world
from common.runtime.interrupt import Interrupted, heeded
from common.runtime.progress import SOON, watched
from common.types import UserError

if TYPE_CHECKING:
    from common.config.schema import Config
    from common.run.run_folder import RunFolder

configuration.register()
HERE = Path(__file__).resolve().parent
INTERRUPTED = 130  # exit code of a program that Ctrl-C has ended


@hydra.main(version_base="1.3", config_path=str(HERE / "conf"), config_name="config")
def main(cfg: DictConfig) -> None:
    """One job; a multirun calls it once per point and goes on with the next when one fails."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with heeded():
        try:
            job(cfg, folder)
        except UserError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                print(f"{folder.name}: {one_line(error)}", file=sys.stderr)  # Hydra itself only reports the first
                raise
            sys.exit(one_line(error))
        except KeyboardInterrupt as stop:
            message = str(stop) if isinstance(stop, Interrupted) else "stopped; the same command goes on"
            message += "; SLURM has queued the job again" if slurm.requeue_if_preempted() else ""
            print(f"{folder.name}: {message}", file=sys.stderr)
            sys.exit(INTERRUPTED)
        finally:
            with suppress(OSError):
                folder.rmdir()  # made by Hydra; goes only if it is empty


def job(cfg: DictConfig, folder: Path) -> None:
    """Check, run, show. A folder that already holds this configuration's result only shows it.

    With `dry=true`, `manifest=true` or `doctor=true` nothing is trained: the first says whether the run is finished or
    would be refused and what it would cost, the second shows the prompts, the third examines.
    """
    from common import launch, preflight
    from common.data import loading
    from common.report import tables
    from common.run.run_folder import RunFolder
    from common.sweep import dry

    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    config = configuration.validate(cfg, typed)
    values = configuration.values_of(config)
    if config.dry:
        dry.show_one(config, folder, finished=RunFolder(folder).finished_result(values) is not None)
        return
    begins = f"{folder.name}: reading {config.data.name}"
    if config.manifest:
        with watched(begins):
            preview(config, RunFolder(folder))
        return
    if config.doctor is True:
        with watched(begins):
            preflight.check(config)
            launch.launch(config, folder)
        return
    run_folder = RunFolder(folder)
    result = run_folder.finished_result(values)
    if result is None:
        with watched(begins):
            data = preflight.check(config)
            if rank() == 0:
                run_folder.claim(values)
            launch.launch(config, folder, data)
        result = run_folder.finished_result(values)
    else:
        loading.check_finished(config, folder / "manifest.json")
        print(f"already finished: {folder}")
    if result is not None and rank() == 0:
        if config.tracking.report:
            write_page(folder)
        tables.show(result, folder)


def write_page(folder: Path) -> None:
    """report.html, if the run has none yet; `python -m common.report html` makes it anew."""
    from common.report.html import run_page  # draws
    from common.run.run_folder import best_effort

    if not (folder / run_page.FILE).is_file():
        with best_effort(run_page.FILE):
            run_page.make(folder)


def preview(config: Config, folder: RunFolder) -> None:
    """`manifest=true`: try all pictures, show what the run would ask, and write the whole manifest where the run will.

    Raises:
        UserError: There are several processes, pictures cannot be used, or the folder holds a run that asks something
            else.
    """
    from common.data import loading
    from common.report import prompts

    if world() > 1:
        raise UserError(f"manifest=true needs no ranks, but {world()} were started; call run.py by itself")
    data = loading.examined(config)
    asked = locate(config.learner.check, "learner.check")(config, data)
    prompts.show(data.manifest, asked, folder.preview(data.manifest))


def one_line(error: BaseException) -> str:
    """What a user sees of a mistake in the request: the message, and the first line of what caused it."""
    error = configuration.user_error(error) or error
    text = " ".join(str(error).split("Config search path")[0].split())
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text += f" ({str(error.__cause__).splitlines()[0]})"
    return f"error: {text}"


def sweeps_beside(words: list[str]) -> list[str]:
    """The arguments, `-cd sweeps` as the folder beside this file where the current one has none of that name.

    >>> sweeps_beside(["-cn", "sweeps", "shots=4"])
    ['-cn', 'sweeps', 'shots=4']
    """
    if Path("sweeps").is_dir():
        return words
    asked = [
        before in ("-cd", "--config-dir") and word == "sweeps"
        for before, word in zip(["", *words], words, strict=False)
    ]
    return [str(HERE / word) if here else word for here, word in zip(asked, words, strict=True)]


def run() -> None:
    """Entry point: mistakes in the request become one line and exit code 1, anything else a traceback."""
    process.ensure_utf8()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that errors reach this function and not Hydra's own printer
    process.set_thread_policy()
    try:
        slurm.adopt()
        sys.argv[1:] = of_each_run(literal(sweeps_beside(sys.argv[1:])))
        completes = {"-sc", "--shell-completion"} & set(sys.argv)  # where a line beside the choices is in the way
        with nullcontext() if completes else watched("composing the configuration", SOON):
            main()
    except KeyboardInterrupt:  # between runs, or while other processes run them
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (UserError, OmegaConfBaseException) as error:
        sys.exit(one_line(error))
    except (HydraException, ValueError, RuntimeError, AssertionError) as error:
        explanation = suggest.explain(error, sys.argv[1:])
        if explanation is None and not isinstance(error, HydraException):
            raise
        sys.exit(f"error: {explanation}" if explanation else one_line(error))
    except OSError as error:
        if HydraConfig.initialized() and Path(HydraConfig.get().runtime.output_dir).is_dir():
            raise
        sys.exit(f"error: cannot create the run folder: {error}; choose another with hydra.run.dir=<folder>")


if __name__ == "__main__":
    run()
