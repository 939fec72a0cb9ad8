"""The process group of a run, and this rank's device.

DeepSpeed on its own looks for MPI where no torchrun is, and on a CPU it compiles an operator that a plain gloo run does
not need (and a killed compilation leaves a lock that hangs later runs).
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
    """Join the launcher's process group, or form one of this process alone, and return this rank's device.

    The group stays until the process ends: DeepSpeed remembers the first one it sees, so the jobs of a sweep share it.
    """
    if gpus == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not started_by_launcher():
        form_group_alone()
    import deepspeed

    for noisy in ("DeepSpeed", "compilers"):  # the second: of the compiler that DeepSpeed tries out
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if gpus == 0:
        fix_order()
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
    else:
        # a launcher may show every process a GPU of its own
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        # its own limit, 10 minutes unless DEEPSPEED_TIMEOUT says otherwise, is less than a judge may take
        limit = max(timedelta(seconds=LONGEST_WAIT), deepspeed.constants.default_pg_timeout)
        deepspeed.init_distributed(dist_backend="gloo" if gpus == 0 else "nccl", timeout=limit, verbose=False)
        atexit.register(torch.distributed.destroy_process_group)
        if world() == 1:  # torch has put [rank0] before every line of a traceback
            sys.excepthook = sys.__excepthook__
    return device


def fix_order() -> None:
    """Let CPU threads add up in one order: PyTorch's gradient of `x[rows]`, where a row is read several times, is
    otherwise a sum in the order in which they come. On GPUs it has one anyway.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only to find mistakes
    torch.use_deterministic_algorithms(True, warn_only=True)


def model_of(device: torch.device) -> str:
    """What a device is sold as, such as `NVIDIA A100-SXM4-80GB`.

    >>> model_of(torch.device("cpu"))
    'CPU'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
