"""The DeepSpeed engine, the same path for one CPU process and for many GPUs.

Three things DeepSpeed would do differently on its own: without torchrun it looks for MPI; on a CPU it compiles an
operator that a plain gloo run does not need (and a killed compilation leaves a lock that hangs later runs); and it
fixes the number of micro-batches, which here varies from update to update.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

from common.distributed import form_group_alone, started_by_launcher
from common.schedule import learning_rate
from common.schema import Trainer


def init_process_group(gpus: int) -> torch.device:
    """Join the launcher's process group, or form one of this process alone, and return this rank's device.

    The group stays until the process ends: DeepSpeed remembers the first one it sees, so the jobs of a sweep share it.
    """
    if gpus == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not started_by_launcher():
        form_group_alone()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if gpus == 0:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo" if gpus == 0 else "nccl", verbose=False)
        atexit.register(torch.distributed.destroy_process_group)
    return device


class Engine:
    """Optimiser steps over any number of micro-batches.

    The module must be complete before it comes here: a weight edited afterwards is silently reverted by the next step,
    because the optimiser keeps its own fp32 copy.
    """

    def __init__(
        self, module: torch.nn.Module, config: Trainer, deepspeed_config: dict[str, Any], updates: int
    ) -> None:
        """
        Args:
            module: What is trained; parameters that do not require gradients stay frozen.
            config: Learning rate, schedule, AdamW and clipping values.
            deepspeed_config: Keys handed to DeepSpeed as they are (ZeRO stage and the like).
            updates: Length of the learning-rate schedule.
        """
        import deepspeed

        self.config, self.updates = config, updates
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
        )
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.grad_clip,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": parameters[0].dtype == torch.bfloat16},
            **deepspeed_config,
        }
        module.train()  # loading leaves evaluation mode, in which gradient checkpointing is off
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)

    def __call__(self, *inputs: Any) -> Any:
        """Forward; call `backward` on a loss made of the result before the next one."""
        return self.engine(*inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch. Losses are summed; `last` marks the one before `step`."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, update: int) -> dict[str, float]:
        """Clip, step, zero the gradients. Returns the gradient norm before clipping and the learning rate."""
        rate = learning_rate(self.config, update, self.updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        # without ZeRO DeepSpeed clips but does not tell the norm
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
        self.engine.step()
        reported = self.engine.get_global_grad_norm()
        grad_norm = reported if reported is not None else norm
        return {"grad_norm": float(grad_norm) if grad_norm is not None else 0.0, "learning_rate": rate}

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers; an engine left open can abort the interpreter at exit."""
        self.engine.destroy()


def micro_batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive slices of `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
