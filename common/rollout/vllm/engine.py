"""Run a vLLM engine in this process: start it without weights, push those of the policy, sample, end it if it hangs.

Several functions work around vLLM 0.32: its CPU build replaces `torch.set_num_threads` and keeps an old copy of a tied
output projection, and a reload forgets images in the worker but not in the scheduler.
"""

from __future__ import annotations

import copy
import faulthandler
import logging
import os
import random
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.models.adapters import without_adapters
from common.models.vlm import VLM, complete
from common.rollout.vllm.weights import vocabulary
from common.runtime.distributed import rank, world
from common.types import UserError

log = logging.getLogger(__name__)
HUNG = 75  # exit code EX_TEMPFAIL: the same command may succeed when repeated


class Watchdog:
    """Context manager for calls of vLLM: errors become a UserError; after the timeout it ends the process.

    Before that it prints a message and all stack traces. It calls `os._exit`, since no exception reaches a thread
    that hangs in native code. The launcher then ends the other ranks; no checkpoint is being written inside.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout`: in seconds."""
        self.timeout = timeout

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        timer = threading.Timer(self.timeout, self._end, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            log.exception("vLLM failed while %s", what)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            raise UserError(
                f"vLLM failed while {what} ({reason}). The same command goes on from the last checkpoint; if memory was"
                " short, with smaller rollout.options.gpu_memory_utilization, max_num_seqs or cpu_kvcache_space."
                " run.log has the whole error"
            ) from error
        finally:
            timer.cancel()

    def _end(self, what: str) -> None:
        message = (
            f"vLLM has been {what} for {self.timeout:g} s, more than rollout.options.timeout allows; the process ends."
            " The same command goes on from the last checkpoint"
        )
        log.error(message)
        print(f"error: {message}", file=sys.stderr)
        faulthandler.dump_traceback(sys.stderr)
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(HUNG)


# The engine. Shapes: B sequences, V vocabulary rows, D width.

GIB = 2**30
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine must be in this process, so that tensors can be passed to it
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise all ranks would be bound to the same cores
}


class Engine:
    """A vLLM engine whose weights are pushed as tensors."""

    def __init__(
        self,
        vlm: VLM,
        *,
        length: int,
        seed: int,
        image_size: int | None,
        gpu_memory_utilization: float,
        cpu_kvcache_space: float,
        max_num_seqs: int,
        enforce_eager: bool,
        sleep_level: int,
    ) -> None:
        """`length`: of prompt and completion together. Other arguments as for `VLLMRollout`.

        Raises:
            UserError: It does not start, or its attention differs from that of the trainer.
        """
        on_gpu = vlm.device.type == "cuda"
        self.sleep_level, self.asleep, self.loaded = sleep_level if on_gpu else 0, False, False
        self.temperature = torch.ones((), device=vlm.device)  # a tensor, so that `_install` reads its current value
        length = min(length, vlm.model.config.get_text_config().max_position_embeddings)
        options: dict[str, Any] = {
            "load_format": "dummy",  # random weights, until `push`
            "generation_config": "vllm",  # ignore the model's generation_config.json
            "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "seed": seed * 1_000 + rank(),
            "max_model_len": length,
            "max_num_batched_tokens": max(8192, length),
            "max_num_seqs": max_num_seqs,
            "enforce_eager": enforce_eager or not on_gpu,
            "enable_sleep_mode": self.sleep_level > 0,
            "enable_chunked_prefill": on_gpu,  # on a CPU, vLLM raises if a seeded request is split into chunks
            "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
            "mm_device_do_normalize": False,  # mean and deviation would be dummy weights, too
            "logprobs_mode": "raw_logprobs",  # those of the logits that `_install` returns
            "distributed_executor_backend": "external_launcher" if world() > 1 else "uni",
            **(
                {"gpu_memory_utilization": gpu_memory_utilization}
                if on_gpu
                else {"kv_cache_memory_bytes": int(cpu_kvcache_space * GIB)}
            ),
        }
        with tempfile.TemporaryDirectory(prefix="vllm-") as folder, undisturbed():
            describe(vlm, Path(folder), image_size)
            from vllm import LLM  # ten seconds or more

            try:
                self.llm: Any = LLM(model=folder, **options)
            except (RuntimeError, ValueError, OSError, KeyError, TypeError, AssertionError) as error:
                reason = " ".join(str(error).split())[:500]
                raise UserError(
                    f"vLLM does not start ({type(error).__name__}: {reason}); see rollout.options, or use rollout=hf"
                ) from error
        if vlm.family.both_ways and not vlm.causal_images:
            self._check_images()
        # ids behind the model's own vocabulary (extra embeddings, padding) must never be sampled
        output = vocabulary(vlm.model)
        beyond = range(without_adapters(vlm.model).get_output_embeddings().weight.shape[0], output)
        banned = torch.tensor([*vlm.banned, *beyond], device=vlm.device)
        self.llm.apply_model(lambda model: self._install(model, banned))

    def _check_images(self) -> None:
        """Check that the engine supports bidirectional attention among the tokens of an image.

        Raises:
            UserError: The model needs it, and the attention backend on this device does not support it.
        """
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        # [0]: the engine has one worker, which is in this process
        layers = self.llm.apply_model(
            lambda model: [each.get_attn_backend() for each in model.modules() if isinstance(each, AttentionLayerBase)]
        )[0]
        for backend in layers:
            if not backend.supports_mm_prefix():
                raise UserError(
                    f"vLLM's {backend.get_name()} attention on this device lets no image token see those after it, as"
                    " this model's do; set model.image_attention=causal, for trainer and sampler alike, or rollout=hf"
                )

    def _install(self, model: Any, banned: torch.Tensor) -> None:
        """Make the engine's logits those that the trainer scores: without banned ids, at the sampling temperature.

        This comes before vLLM's sampler, so that it reports log-probabilities of the full distribution although top_k
        and top_p restrict sampling.
        """
        inner, temperature = model.compute_logits, self.temperature

        def computed(*args: Any, **options: Any) -> torch.Tensor:
            logits = inner(*args, **options)  # [B, V]
            return logits.float().index_fill_(-1, banned, -torch.inf) / temperature

        model.compute_logits = computed

    def generate(self, prompts: Sequence[Any], choices: Sequence[dict[str, Any]], temperature: float) -> list[Any]:
        """Return the outputs of vLLM, one per prompt.

        Args:
            prompts: Prompts in the format of vLLM.
            choices: Keyword arguments of each prompt's `SamplingParams`.
            temperature: Sampling temperature of all prompts.
        """
        from vllm import SamplingParams

        self.temperature.fill_(temperature)
        parameters = [SamplingParams(**each) for each in choices]
        return self.llm.generate(list(prompts), parameters, use_tqdm=False)  # type: ignore[no-any-return]

    def push(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load weights, given by their names in hub checkpoints; the first time all of them.

        Raises:
            RuntimeError: The first push left out a weight of the engine.
        """
        # For the duration of the push, replace `load_weights` by a version that records what it has loaded.
        loaded: set[str] = set()

        def record(model: Any) -> None:
            inner = type(model).load_weights

            def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
                loaded.update(found := inner(model, weights) or set())
                return found

            model.load_weights = load_weights

        def forget(model: Any) -> list[str]:
            del model.load_weights
            kept = dict(model.named_buffers()).keys() & model.state_dict().keys()
            scales = {name for name in kept if name.endswith("_scale")}  # for 8-bit KV caches, which are not used
            return [*(name for name, _ in model.named_parameters()), *(kept - scales)]

        self.llm.apply_model(record)
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named)})
        finally:
            names = self.llm.apply_model(forget)[0]
        missing = sorted(set(names) - loaded)
        if missing and not self.loaded:
            raise RuntimeError(f"vLLM was not given {len(missing)} of its weights, first: {missing[0]}")
        self.loaded = True
        self.llm.apply_model(retie)

    def push_rows(self, first: int, rows: torch.Tensor) -> None:
        """Overwrite rows of the vocabulary, starting at `first`. Shape: [E m, D]."""

        def copy_rows(model: Any) -> None:
            (layer,) = (module for name, module in model.named_modules() if name.endswith(".embed_tokens"))
            layer.weight.data[first : first + len(rows)].copy_(rows)
            retie(model)

        self.llm.apply_model(copy_rows)

    def forget(self) -> None:
        """Clear the caches of prefixes and image features, which were computed with earlier weights.

        Raises:
            RuntimeError: The engine is still computing.
        """
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache is in use while weights are pushed")
        self.llm.llm_engine.reset_encoder_cache()

    def rest(self) -> bool:
        """Free GPU memory until `wake`; return whether the weights were dropped."""
        if self.sleep_level and not self.asleep:
            self.llm.sleep(level=self.sleep_level)
            self.asleep = True
        return self.sleep_level == 2

    def wake(self) -> None:
        """Allocate memory again."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        """Shut down and free all memory."""
        with kept_group():
            self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def describe(vlm: VLM, folder: Path, image_size: int | None = None) -> None:
    """Write configuration and processor of a model, all that an engine reads from disk.

    `image_size`: side of the largest image in pixels. At its start, an engine computes the largest image that the
    processor allows, to reserve memory: 16,384 tokens with the original one of Qwen2-VL.
    """
    base = without_adapters(vlm.model)
    config = copy.deepcopy(base.config)
    rows = vocabulary(vlm.model)
    # room for extra embeddings as tokens
    config.get_text_config().vocab_size = rows
    if hasattr(config, "vocab_size"):
        config.vocab_size = rows
    complete(config, vlm)
    # vLLM chooses its own implementation by this name
    config.architectures = [type(base).__name__]
    config.save_pretrained(folder)
    processor = copy.deepcopy(vlm.processor)
    if image_size is not None:
        vlm.family.bound(processor, image_size)
    processor.save_pretrained(folder)


def retie(model: Any) -> None:
    """Update a tied output projection after new embeddings: vLLM's CPU build makes a packed copy, and only once."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def kept_group() -> Iterator[None]:
    """Keep the default process group, which the trainer uses, while an engine destroys its own groups."""
    end = torch.distributed.destroy_process_group

    def end_other(group: Any = None) -> None:
        if group is not None:
            end(group)

    torch.distributed.destroy_process_group = end_other
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = end


@contextmanager
def undisturbed() -> Iterator[None]:
    """Set vLLM's environment variables, and restore random states, threads and logging after it has started."""
    # variables that the user has set take precedence
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    state, threads, setter = torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads
    gpu_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    numbers, more = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        # vLLM's CPU build has replaced the function
        torch.set_num_threads = setter
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state)
        random.setstate(numbers)
        np.random.set_state(more)
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)
