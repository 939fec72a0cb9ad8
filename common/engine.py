"""The DeepSpeed engine, the same path for one CPU process and for many GPUs.

Three things DeepSpeed would do differently on its own: without torchrun it looks for MPI; on a CPU it compiles an
operator that a plain gloo run does not need (and a killed compilation leaves a lock that hangs later runs); and it
fixes the number of micro-batches, which here varies from update to update.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.distributed import LONGEST_WAIT, barrier, form_group_alone, rank, started_by_launcher, world
from common.models.slots import Slots
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

    for noisy in ("DeepSpeed", "compilers"):  # the second: of the compiler that DeepSpeed tries out
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if gpus == 0:
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
    return device


class Engine:
    """Optimiser steps over any number of micro-batches.

    The module must be complete before it comes here: a weight edited afterwards is silently reverted by the next step,
    because the optimiser keeps its own fp32 copy.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        config: Trainer,
        deepspeed_config: dict[str, Any],
        updates: int,
        resume: Path | None = None,
    ) -> None:
        """
        Args:
            module: What is trained; parameters that do not require gradients stay frozen.
            config: Learning rate, schedule, AdamW and clipping values.
            deepspeed_config: Keys handed to DeepSpeed as they are (ZeRO stage and the like).
            updates: Length of the learning-rate schedule.
            resume: Folder that `save` wrote, on any number of ranks; its weights and optimizer state are taken over.
        """
        import deepspeed

        self.config, self.updates = config, updates
        parameters = [p for p in module.parameters() if p.requires_grad]
        slots = {id(found.entries) for found in module.modules() if isinstance(found, Slots)}
        own_peak = config.embedding_learning_rate
        peaks = (config.learning_rate, config.learning_rate if own_peak is None else own_peak)
        members = ([p for p in parameters if id(p) not in slots], [p for p in parameters if id(p) in slots])
        kept = [(own, peak) for own, peak in zip(members, peaks, strict=True) if own]
        groups, self.peaks = [{"params": own, "lr": peak} for own, peak in kept], [peak for _, peak in kept]
        self.has_frozen = len(parameters) < len(list(module.parameters()))
        self.stage = zero_stage(deepspeed_config)
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
        )
        folder, universal = (None, False) if resume is None else _for_this_world(resume, self.stage)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.grad_clip,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": parameters[0].dtype == torch.bfloat16},
            "checkpoint": {"load_universal": universal},
            **deepspeed_config,
        }
        module.train()  # loading leaves evaluation mode, in which gradient checkpointing is off
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        if folder is not None:
            # frozen weights are not in the checkpoint: they are those of the model that was loaded
            loaded, _ = self.engine.load_checkpoint(
                str(folder.parent), tag=folder.name, custom_load_fn=partial(_load, strict=not self.has_frozen)
            )
            if loaded is None:
                raise RuntimeError(f"DeepSpeed cannot read the checkpoint {folder}")

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
        for group, peak in zip(self.engine.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = rate * peak / self.config.learning_rate
        # without ZeRO DeepSpeed clips but does not tell the norm
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
        self.engine.step()
        reported = self.engine.get_global_grad_norm()
        grad_norm = reported if reported is not None else norm
        return {"grad_norm": float(grad_norm) if grad_norm is not None else 0.0, "learning_rate": rate}

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, every rank holds all weights and may call the module itself: to sample, evaluate or save.

        Only ZeRO stage 3 has something to do. Its hooks would hand the weights back after every layer, so they rest.
        """
        if self.stage < 3:
            yield
            return
        import deepspeed

        offload = self.engine.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self.engine.module.parameters())):
            for parameter in self.engine.module.parameters():
                parameter.ds_active_sub_modules.clear()
            for hook in [*offload.forward_hooks, *offload.backward_hooks]:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                coordinator = offload.get_param_coordinator()
                if not coordinator.is_invalid_trace():
                    coordinator._invalidate_trace()
                offload._register_deepspeed_module(offload.module)

    def save(self, folder: Path) -> None:
        """Weights and optimizer state of all ranks, in DeepSpeed's format. All ranks call it together."""
        self.engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=self.has_frozen
        )

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers; an engine left open can abort the interpreter at exit."""
        self.engine.destroy()


def _load(src: dict[str, Any], dst: torch.nn.Module, strict: bool) -> None:
    """Weights of a checkpoint, without what belongs to frozen 8-bit ones: bitsandbytes saves their scales and their
    layout nevertheless, and refuses to load them once the model was used.
    """
    kept = {name: value for name, value in src.items() if name.rpartition(".")[2] not in ("SCB", "weight_format")}
    dst.load_state_dict(kept, strict=strict)


def zero_stage(deepspeed_config: dict[str, Any]) -> int:
    """ZeRO stage that a DeepSpeed configuration asks for."""
    return int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))


def _for_this_world(folder: Path, stage: int) -> tuple[Path, bool]:
    """The checkpoint in a form that this number of ranks can load, and whether that is DeepSpeed's universal one.

    The state of ZeRO 1 to 3 is split by rank; another number of ranks needs the universal format, made here once.
    """
    written = len(list(folder.glob("*_optim_states.pt")))
    if stage == 0 or written == world():
        return folder, False
    universal = folder.with_name("universal")
    if rank() == 0 and not universal.is_dir():
        unfinished = folder.with_name("universal.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        convert_to_universal(folder, unfinished)
        os.replace(unfinished, universal)
    barrier()
    return universal, True


def convert_to_universal(source: Path, target: Path) -> None:
    """DeepSpeed's own conversion, in a process of its own: it starts workers and prints."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"converting the checkpoint {source} for {world()} ranks failed: {done.stderr[-2000:]}")


def micro_batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive slices of `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
