"""Create the process group of a run, and choose this rank's device.

DeepSpeed itself looks for MPI if torchrun did not start it, and on a CPU it compiles an operator that a plain gloo run
does not need (and a killed compilation leaves a lock that hangs later runs).
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from datetime import timedelta

import torch

from common.runtime.distributed import LONGEST_WAIT, form_group_alone, started_by_launcher, world


def init_process_group(gpus: int) -> torch.device:
    """Join the launcher's process group, or create one of this process alone; return this rank's device.

    The group stays until the process ends: DeepSpeed keeps the first one it gets, so all jobs of a sweep share it.
    """
    if gpus == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif os.environ.get("DS_ACCELERATOR") == "cpu":  # of a run on the CPU, in the process that started this one
        del os.environ["DS_ACCELERATOR"]
    if not started_by_launcher():
        form_group_alone()
    import deepspeed

    for noisy in ("DeepSpeed", "compilers"):  # `compilers` logs the compiler that DeepSpeed tries
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if gpus == 0:
        fix_order()
        # the operator that DeepSpeed would compile
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
    else:
        # some launchers show each process only one GPU, whatever its local rank
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        # DeepSpeed's default, 10 minutes unless DEEPSPEED_TIMEOUT is set, is shorter than a judge may take
        limit = max(timedelta(seconds=LONGEST_WAIT), deepspeed.constants.default_pg_timeout)
        deepspeed.init_distributed(dist_backend="gloo" if gpus == 0 else "nccl", timeout=limit, verbose=False)
        atexit.register(torch.distributed.destroy_process_group)
        if world() == 1:  # torch has set a hook that puts [rank0] before every line of a traceback
            sys.excepthook = sys.__excepthook__
    return device


def fix_order() -> None:
    """Make sums on CPU threads deterministic: PyTorch's gradient of `x[rows]`, with a row read several times, otherwise
    adds up in the order in which threads finish. On GPUs the order is fixed anyway.
    """
    # filling uninitialised memory only helps to find mistakes, and takes time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)


def model_of(device: torch.device) -> str:
    """Return the product name of a device, such as `NVIDIA A100-SXM4-80GB`.

    >>> model_of(torch.device("cpu"))
    'CPU'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
