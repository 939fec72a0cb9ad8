"""Runs of the real pipeline in processes of their own that can be killed at a chosen moment.

The processes fork from one that has imported everything, so a run costs seconds. `kill` names a moment: the n-th call
of a function, before or after it.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import resource
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAVY = ["torch", "deepspeed", "transformers", "peft", "pyarrow.parquet", "common.pipeline", "sklearn.datasets"]


@dataclass(frozen=True)
class Kill:
    """The process dies by SIGKILL at the `count`-th call of `function` ("module:Class.name"), before or after it."""

    function: str
    count: int
    after: bool = False

    def arm(self) -> None:
        """Replace the function by one that counts."""
        module, _, path = self.function.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original, calls = getattr(owner, name), 0

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.count and not self.after:
                self.strike()
            result = original(*args, **kwargs)
            if calls == self.count and self.after:
                self.strike()
            return result

        setattr(owner, name, counted)

    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Full(Kill):
    """From that moment on no file can grow beyond 100 kB, as on a full disk."""

    def strike(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def job(folder: Path, overrides: list[str], kill: Kill | None, environment: dict[str, str]) -> None:
    """What run.py does after the checks, in this process; with RANK in the environment as one rank of several."""
    # the process that forked may be a group of its own
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FEWSHOT_ALONE"):
        os.environ.pop(name, None)
    os.environ |= environment
    import hydra
    import torch

    from common.config import composition as configuration
    from common.launch import launch
    from common.run.run_folder import RunFolder
    from common.runtime import slurm

    slurm.adopt()
    torch.set_num_threads(1)
    configuration.register()
    with hydra.initialize_config_dir(str(Path(__file__).parent.parent / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", overrides)
    config = configuration.validate(cfg)
    values = configuration.values_of(config)
    place = RunFolder(folder)
    if place.finished_result(values) is not None:
        return
    if os.environ.get("RANK", "0") == "0":
        place.claim(values)
    if kill is not None:
        kill.arm()
    launch(config, folder)


class Runner:
    """Starts jobs; keep one for many."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(HEAVY)

    def __call__(self, folder: Path, overrides: list[str], kill: Kill | None = None) -> int:
        """Run one job and return its exit code (-9 if it was killed)."""
        return self._run([self._start(folder, overrides, kill, {})])[0]

    def ranks(self, count: int, folder: Path, overrides: list[str], kill: Kill | None = None) -> list[int]:
        """Run one job on several CPU ranks, as torchrun would start them; `kill` is for rank 0."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        each = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)]
        return self.tasks(each, folder, overrides, kill)

    def tasks(
        self, environments: list[dict[str, str]], folder: Path, overrides: list[str], kill: Kill | None = None
    ) -> list[int]:
        """Run one process per environment."""
        return self._run(
            [
                self._start(folder, overrides, kill if number == 0 else None, environment)
                for number, environment in enumerate(environments)
            ]
        )

    def _start(self, *arguments: Any) -> Any:
        process = self.context.Process(target=job, args=arguments)
        process.start()
        return process

    @staticmethod
    def _run(processes: list[Any]) -> list[int]:
        for process in processes:
            process.join(timeout=300)
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, "the job hangs"
        return [process.exitcode for process in processes]
