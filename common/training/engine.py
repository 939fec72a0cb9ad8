"""Wrap DeepSpeed, with the same code path for one CPU process and for many GPUs.

DeepSpeed assumes a fixed number of micro-batches per update; here it varies from update to update.
"""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.config.schema import TrainerConfig
from common.models.extra_embeddings import ExtraEmbeddings
from common.models.offloaded import OffloadedEmbeddings
from common.plugins import locate
from common.rollout.base import Rollout, sampling_mode
from common.runtime import saved as saved_files
from common.runtime.distributed import barrier, rank, world
from common.training.base import learning_rate
from common.types import UserError

OFFLOADED = "host_rows_{}"  # file beside DeepSpeed's own


def make_optimizer(config: TrainerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that `trainer.optimizer` names, AdamW by default.

    Args:
        config: Its class and values.
        groups: Parameter groups, each with its `lr`.

    Raises:
        UserError: The class cannot be found, or does not take its options.
    """
    kind = locate(config.optimizer, "trainer.optimizer")
    known = inspect.signature(kind).parameters
    usual = {"lr": config.learning_rate, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
    options = {name: value for name, value in usual.items() if name in known} | config.optimizer_options
    try:
        return kind(groups, **options)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"trainer.optimizer={config.optimizer} does not take these values ({error}); correct"
            " trainer.optimizer_options"
        ) from error


class Engine:
    """Optimizer steps over any number of micro-batches.

    The module must be complete before it is passed in: a later edit of a weight is silently reverted by the next
    step, because the optimizer keeps its own fp32 copy.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        config: TrainerConfig,
        deepspeed_config: dict[str, Any],
        updates: int,
        resume: Path | None = None,
    ) -> None:
        """
        Args:
            module: Module to train; parameters that do not require gradients stay frozen.
            config: Learning rate, schedule, AdamW and clipping values.
            deepspeed_config: Keys that DeepSpeed receives unchanged (such as the ZeRO stage).
            updates: Length of the learning-rate schedule.
            resume: Folder that `save` wrote, on any number of ranks; weights and optimizer state are loaded from it.
        """
        import deepspeed

        self.config, self.updates = config, updates
        # Parameter groups: the model, embeddings added to the vocabulary (extra) with a rate of their own, and the
        # stand-ins of extra on the host. Their gradient is the norm of the host rows' gradient, so that clipping sees
        # it; rate 0 keeps them.
        parameters = [p for p in module.parameters() if p.requires_grad]
        extra = {
            id(p) for submodule in module.modules() if isinstance(submodule, ExtraEmbeddings) for p in submodule.parts()
        }
        self.hosted = [m for m in module.modules() if isinstance(m, OffloadedEmbeddings) and m.trainable]
        own_peak = config.embedding_learning_rate
        norms = {id(m.norm) for m in self.hosted}
        self.rows_peak = config.learning_rate if own_peak is None else own_peak
        peaks = (config.learning_rate, self.rows_peak, 0.0)
        members = (
            [p for p in parameters if id(p) not in extra | norms],
            [p for p in parameters if id(p) in extra],
            [p for p in parameters if id(p) in norms],
        )
        kept = [(own, peak) for own, peak in zip(members, peaks, strict=True) if own]
        groups, self.peaks = [{"params": own, "lr": peak} for own, peak in kept], [peak for _, peak in kept]
        self.has_frozen = len(parameters) < len(list(module.parameters()))
        self.stage = zero_stage(deepspeed_config)
        optimizer = make_optimizer(config, groups)
        folder, universal = (None, False) if resume is None else _for_this_world(resume, self.stage)
        zero = {"reduce_bucket_size": bucket_size(deepspeed_config, sum(p.numel() for p in parameters))}
        # One micro-batch per step as far as DeepSpeed knows: `backward` sets the accumulation boundary itself.
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.grad_clip,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": parameters[0].dtype == torch.bfloat16},
            "checkpoint": {"load_universal": universal},
            **deepspeed_config,
            "zero_optimization": zero | deepspeed_config.get("zero_optimization", {}),
        }
        module.train()  # models are loaded in evaluation mode, in which gradient checkpointing is off
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        for rows in self.hosted:
            rows.forget()  # gradients left by the doctor's examination
        if folder is not None:
            self.restore(folder, resume)

    def __call__(self, *inputs: Any) -> Any:
        """Run a forward; call `backward` on a loss of its result before the next forward."""
        return self.engine(*inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch. Losses are summed, not averaged; `last`: the last one before `step`."""
        for rows in self.hosted:
            rows.last = last
        self.engine.set_gradient_accumulation_boundary(last)
        # scale_wrt_gas=False: DeepSpeed would divide the loss by gradient_accumulation_steps.
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, update: int) -> dict[str, float]:
        """Clip, step, and zero the gradients. Return the gradient norm before clipping and the learning rate."""
        rate = learning_rate(self.config, update, self.updates)
        # Every group follows the same schedule, scaled to its own peak.
        for group, peak in zip(self.engine.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = rate * peak / self.config.learning_rate
        norm = _norm(self.engine.module) if self.stage == 0 else None  # DeepSpeed reports it only with ZeRO
        self.engine.step()
        reported = self.engine.get_global_grad_norm()
        grad_norm = float(reported if reported is not None else 0.0 if norm is None else norm)
        limit = self.config.grad_clip
        share = min(1.0, limit / (grad_norm + 1e-6)) if limit > 0 else 1.0  # same factor as DeepSpeed's clipping
        for rows in self.hosted:
            rows.step(rate * self.rows_peak / self.config.learning_rate, share)
        return {"grad_norm": grad_norm, "learning_rate": rate}

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Gather all weights on every rank, so that the module itself can be called: to sample, evaluate or save.

        Only ZeRO stage 3 has anything to gather. Its hooks would partition the weights again after every layer, so they
        are removed inside and registered again afterwards.
        """
        if self.stage < 3:
            yield
            return
        import deepspeed

        offload = self.engine.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self.engine.module.parameters())):
            # A forward before this may have left submodules marked as active, which blocks re-partitioning at the end.
            for parameter in self.engine.module.parameters():
                parameter.ds_active_sub_modules.clear()
            for hook in [*offload.forward_hooks, *offload.backward_hooks]:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                # The order of layers that ZeRO-3 recorded for prefetching no longer fits: let it record anew.
                coordinator = offload.get_param_coordinator()
                if not coordinator.is_invalid_trace():
                    coordinator._invalidate_trace()
                offload._register_deepspeed_module(offload.module)

    def restore(self, folder: Path, saved: Path | None = None) -> None:
        """Load weights and optimizer state that `save` wrote on the same number of ranks. All ranks call it together.

        `saved`: the original checkpoint, if `folder` is a conversion of it.
        """
        saved_files.check_deepspeed(folder)
        # Checkpoints hold no frozen weights (those come from the loaded model), so loading is strict only without any.
        loaded, _ = self.engine.load_checkpoint(
            str(folder.parent), tag=folder.name, custom_load_fn=partial(_load, strict=not self.has_frozen)
        )
        if loaded is None:
            raise RuntimeError(f"DeepSpeed cannot read the checkpoint {folder}")
        for number, rows in enumerate(self.hosted):
            rows.host.restore((saved or folder) / OFFLOADED.format(number))

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state of all ranks in DeepSpeed's format. All ranks call it together."""
        self.engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=self.has_frozen
        )
        for number, rows in enumerate(self.hosted):
            if rank() == 0:
                rows.host.save(folder / OFFLOADED.format(number))
            barrier()

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers; an engine left open can abort the interpreter at exit."""
        self.engine.destroy()


class EngineTrainer:
    """Base of trainers on an engine; `version` counts the updates that its weights have seen."""

    engine: Engine
    rollout: Rollout
    version: int

    @contextmanager
    def sampling(self, sampler_only: bool = False) -> Iterator[None]:
        # A sampler with its own copy of the weights (vLLM) needs nothing gathered.
        apart = sampler_only and getattr(self.rollout, "has_weight_copy", False)
        with nullcontext() if apart else self.engine.whole_weights(), sampling_mode(self.rollout, self.version):
            yield

    def save(self, folder: Path) -> None:
        self.engine.save(folder)

    def restore(self, folder: Path, done: int) -> None:
        self.engine.restore(folder)
        self.version = done

    def close(self) -> None:
        self.engine.close()


def _norm(module: torch.nn.Module) -> torch.Tensor | None:
    """Return the norm of all gradients, without keeping a reference: the step frees them after copying."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else None


def _load(src: dict[str, Any], dst: torch.nn.Module, strict: bool) -> None:
    """Load a checkpoint's state without the entries of frozen 8-bit weights.

    bitsandbytes saves their scales and layout even when frozen weights are left out, and refuses to load them once the
    model was used.
    """
    kept = {name: value for name, value in src.items() if name.rpartition(".")[2] not in ("SCB", "weight_format")}
    dst.load_state_dict(kept, strict=strict)


def zero_stage(deepspeed_config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration."""
    return int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))


def bucket_size(deepspeed_config: dict[str, Any], trained: int) -> int:
    """Return the number of elements that ranks reduce at a time.

    DeepSpeed's default of 500 million, which ZeRO 1 to 3 allocates in full, but at most the number of trained elements:
    for adapters the default would waste gigabytes.
    """
    given = deepspeed_config.get("zero_optimization", {}).get("reduce_bucket_size")
    return int(given) if given is not None else max(1, min(500_000_000, trained))


def _for_this_world(folder: Path, stage: int) -> tuple[Path, bool]:
    """Return the checkpoint in a form that this number of ranks can load, and whether it is DeepSpeed's universal one.

    The state of ZeRO 1 to 3 is split by rank; another number of ranks needs the universal format, converted here once.
    """
    written = len(list(folder.glob("*_optim_states.pt")))
    if stage == 0 or written == world():
        return folder, False
    universal = folder.with_name("universal")
    saved_files.check_deepspeed(folder)
    if rank() == 0 and not universal.is_dir():
        unfinished = folder.with_name("universal.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        convert_to_universal(folder, unfinished)
        os.replace(unfinished, universal)
    barrier()
    return universal, True


def convert_to_universal(source: Path, target: Path) -> None:
    """Run DeepSpeed's own conversion, in a process of its own, since it starts workers and prints."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"converting the checkpoint {source} for {world()} ranks failed: {done.stderr[-2000:]}")
