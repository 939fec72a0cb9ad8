"""Train and evaluate one configuration: `python run.py method=nothinking data=digits shots=16`. See --help.

`run` is the entry point and turns errors into one line; Hydra composes the configuration and calls `main` once per run
of a sweep; `job` validates it, makes the checks that take a second, and executes common/pipeline.py: in this process on
the CPU, in one process per GPU otherwise (common/launch.py). Continue reading there.
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
    """Execute one run; in a multirun Hydra calls it once per run, and a run that fails does not stop the others."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with heeded():
        try:
            job(cfg, folder)
        except UserError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                print(f"{folder.name}: {one_line(error)}", file=sys.stderr)  # Hydra reports only the first failure
                raise
            sys.exit(one_line(error))
        except KeyboardInterrupt as stop:
            message = str(stop) if isinstance(stop, Interrupted) else "stopped; the same command goes on"
            message += "; SLURM has queued the job again" if slurm.requeue_if_preempted() else ""
            print(f"{folder.name}: {message}", file=sys.stderr)
            sys.exit(INTERRUPTED)
        finally:
            with suppress(OSError):
                folder.rmdir()  # created by Hydra; rmdir removes it only if it is empty


def job(cfg: DictConfig, folder: Path) -> None:
    """Check, run and show one configuration. If the folder already holds its result, only show it.

    With `dry=true`, `manifest=true` or `doctor=true` nothing is trained: the first says whether the run is finished or
    invalid and what it would cost, the second shows the prompts, the third examines the learner.
    """
    from common import launch, preflight
    from common.data import loading
    from common.report import tables
    from common.run.run_folder import RunFolder
    from common.sweep import dry

    # Validate: from Hydra's DictConfig to our typed `Config`.
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    config = configuration.validate(cfg, typed)
    values = configuration.values_of(config)
    # Modes that train nothing.
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
    # A run: if there is no result yet, check, lock the folder, and train and evaluate on all ranks.
    run_folder = RunFolder(folder)
    result = run_folder.finished_result(values)
    if result is None:
        with watched(begins):
            data = preflight.check(config)
            if rank() == 0:
                run_folder.claim(values)
            launch.launch(config, folder, data)
        result = run_folder.finished_result(values)
    # Already finished: only check that the data are still the same.
    else:
        loading.check_finished(config, folder / "manifest.json")
        print(f"already finished: {folder}")
    # Show the result; rank 0 writes the HTML report.
    if result is not None and rank() == 0:
        if config.tracking.report:
            write_page(folder)
        tables.show(result, folder)


def write_page(folder: Path) -> None:
    """Write report.html and doubts.html unless they exist; `python -m common.report html` writes them anew."""
    from common.report.html import doubts_page, run_page  # draws
    from common.run.run_folder import best_effort

    if not (folder / run_page.FILE).is_file():
        with best_effort(run_page.FILE):
            run_page.make(folder)
            doubts_page.make(folder)


def preview(config: Config, folder: RunFolder) -> None:
    """Check all images, show the prompts of the run, and write its manifest (`manifest=true`).

    Raises:
        UserError: There are several processes, images cannot be used, or the folder holds a run with other prompts.
    """
    from common.data import loading
    from common.report import prompts

    if world() > 1:
        raise UserError(f"manifest=true needs no ranks, but {world()} were started; call run.py by itself")
    data = loading.examined(config)
    asked = locate(config.learner.check, "learner.check")(config, data)
    prompts.show(data.manifest, asked, folder.preview(data.manifest))


def one_line(error: BaseException) -> str:
    """Return an error as one line: the message, and the first line of its cause."""
    error = configuration.user_error(error) or error
    text = " ".join(str(error).split("Config search path")[0].split())
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text += f" ({str(error.__cause__).splitlines()[0]})"
    return f"error: {text}"


def sweeps_beside(words: list[str]) -> list[str]:
    """Return the arguments, with `-cd sweeps` as the folder beside this file unless the current folder has one.

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
    sys.path.append(str(Path.cwd()))  # where packages of one's own lie, such as rewards
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors are raised to here instead of printed by Hydra
    process.set_thread_policy()
    try:
        slurm.adopt()
        # Adapt the command line for Hydra: our sweeps folder, quotes around paths, choices of few-shot learners.
        sys.argv[1:] = of_each_run(literal(sweeps_beside(sys.argv[1:])))
        completes = {"-sc", "--shell-completion"} & set(sys.argv)  # no progress lines between completions
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
