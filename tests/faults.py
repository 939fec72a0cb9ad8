"""Runs of the real pipeline in processes of their own that can be killed at a chosen moment.

The processes fork from one that has imported everything, so a run costs seconds. `kill` names a moment: the n-th call
of a function, before or after it.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import signal
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
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if calls == self.count and self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)


def job(folder: Path, overrides: list[str], kill: Kill | None) -> None:
    """What run.py does after the checks, in this process."""
    import hydra
    import torch

    from common import config as configuration
    from common.launch import launch
    from common.run_folder import RunFolder

    torch.set_num_threads(1)
    configuration.register()
    with hydra.initialize_config_dir(str(Path(__file__).parent.parent / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", overrides)
    config, values = configuration.validate(cfg), configuration.plain(cfg)
    place = RunFolder(folder)
    if place.finished_result(values) is not None:
        return
    place.claim(values)
    if kill is not None:
        kill.arm()
    launch(config, values, folder)


class Runner:
    """Starts jobs; keep one for many."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(HEAVY)

    def __call__(self, folder: Path, overrides: list[str], kill: Kill | None = None) -> int:
        """Run one job and return its exit code (-9 if it was killed)."""
        process = self.context.Process(target=job, args=(folder, overrides, kill))
        process.start()
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"the job in {folder} hangs")
        assert process.exitcode is not None
        return process.exitcode
