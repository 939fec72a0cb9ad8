"""One vLLM engine in this process: started without weights, fed with the policy's, asked, and watched."""

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
from common.models.vlm import VLM
from common.rollout.vllm.weights import vocabulary
from common.runtime.distributed import rank, world
from common.types import UserError

# Ends a process that hangs in code which no exception can reach, and says so.


log = logging.getLogger(__name__)
HUNG = 75  # exit code; EX_TEMPFAIL: the same command may do better


class Watchdog:
    """`with watchdog("sampling"): ...`: an error inside becomes one line with its cause; after the timeout the process
    writes why and where it stands, and ends.

    Other ranks are ended by the launcher then; checkpoints are whole, since none is written inside.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds."""
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


# One vLLM engine in this process: started without weights, fed with the policy's, asked for completions.
#
# What stands here works around vLLM 0.32: its CPU build replaces `torch.set_num_threads`, keeps an old copy of a tied
# output projection, and a reload forgets images in the worker but not in the scheduler.
#
# Shapes: B sequences, V vocabulary rows, D width.

GIB = 2**30
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine must live in this process to be given tensors
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks would be bound to the same cores
}


class Engine:
    """Weights in, completions out."""

    def __init__(
        self,
        vlm: VLM,
        *,
        length: int,
        seed: int,
        image_size: int | None,
        gpu_memory_utilization: float,
        cpu_kvcache_space: int,
        max_num_seqs: int,
        enforce_eager: bool,
        sleep_level: int,
    ) -> None:
        """`length`: of prompt and completion together. The others: see `VLLMRollout`.

        Raises:
            UserError: It does not start, or its attention is not the trainer's.
        """
        on_gpu = vlm.device.type == "cuda"
        self.sleep_level, self.asleep, self.loaded = sleep_level if on_gpu else 0, False, False
        self.temperature = torch.ones((), device=vlm.device)
        length = min(length, vlm.model.config.get_text_config().max_position_embeddings)
        options: dict[str, Any] = {
            "load_format": "dummy",
            "generation_config": "vllm",  # nothing of the model's own
            "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "seed": seed * 1_000 + rank(),
            "max_model_len": length,
            "max_num_batched_tokens": max(8192, length),
            "max_num_seqs": max_num_seqs,
            "enforce_eager": enforce_eager or not on_gpu,
            "enable_sleep_mode": self.sleep_level > 0,
            "enable_chunked_prefill": on_gpu,  # a seeded request cut in two raises without a GPU
            "limit_mm_per_prompt": {"image": 1, "video": 0},
            "mm_device_do_normalize": False,  # its mean and deviation would be dummies, too
            "logprobs_mode": "raw_logprobs",  # of the logits as `_install` makes them
            "distributed_executor_backend": "external_launcher" if world() > 1 else "uni",
            **(
                {"gpu_memory_utilization": gpu_memory_utilization}
                if on_gpu
                else {"kv_cache_memory_bytes": cpu_kvcache_space * GIB}
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
        output = vocabulary(vlm.model)
        beyond = range(without_adapters(vlm.model).get_output_embeddings().weight.shape[0], output)
        banned = torch.tensor([*vlm.banned, *beyond], device=vlm.device)
        self.llm.apply_model(lambda model: self._install(model, banned))

    def _check_images(self) -> None:
        """
        Raises:
            UserError: An image's tokens should see each other both ways, and this engine would not let them.
        """
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

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
        """Let the engine's logits be those that the trainer scores: without banned ids, at the sampling temperature.

        Before the sampler sees them, so that the log-probabilities it reports are of the whole distribution although
        top_k and top_p restrict what it draws.
        """
        inner, temperature = model.compute_logits, self.temperature

        def computed(*args: Any, **options: Any) -> torch.Tensor:
            logits = inner(*args, **options)  # [B, V]
            return logits.float().index_fill_(-1, banned, -torch.inf) / temperature

        model.compute_logits = computed

    def generate(self, prompts: Sequence[Any], choices: Sequence[dict[str, Any]], temperature: float) -> list[Any]:
        """VLLM's outputs, one per prompt.

        Args:
            prompts: As vLLM takes them.
            choices: Keyword arguments of each prompt's `SamplingParams`.
            temperature: Of all of them.
        """
        from vllm import SamplingParams

        self.temperature.fill_(temperature)
        parameters = [SamplingParams(**each) for each in choices]
        return self.llm.generate(list(prompts), parameters, use_tqdm=False)  # type: ignore[no-any-return]

    def push(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over weights by their names on the hub; the first time all of them.

        Raises:
            RuntimeError: The first push left a weight of the engine as it was.
        """
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
            scales = {name for name in kept if name.endswith("_scale")}  # of 8-bit caches, which are not used
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
        """Overwrite rows of the vocabulary, from `first` on. Shape: [E m, D]."""

        def copy_rows(model: Any) -> None:
            layer = model.language_model.model.embed_tokens
            layer.weight.data[first : first + len(rows)].copy_(rows)
            retie(model)

        self.llm.apply_model(copy_rows)

    def forget(self) -> None:
        """Drop what was computed with earlier weights: prefixes, and images in scheduler and worker.

        Raises:
            RuntimeError: Something is still being computed.
        """
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache is in use while weights are pushed")
        self.llm.llm_engine.reset_encoder_cache()

    def rest(self) -> bool:
        """Give back GPU memory until `wake`. Returns whether the weights are gone."""
        if self.sleep_level and not self.asleep:
            self.llm.sleep(level=self.sleep_level)
            self.asleep = True
        return self.sleep_level == 2

    def wake(self) -> None:
        """Have memory again."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        """Release everything."""
        with kept_group():
            self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def describe(vlm: VLM, folder: Path, image_size: int | None = None) -> None:
    """Write what an engine needs of a model beside its weights: its configuration and its processor.

    `image_size`: side of the largest picture in pixels. An engine reserves memory for the largest that its processor
    allows, and computes one when it starts: of 16,384 tokens in Qwen2-VL's own.
    """
    base = without_adapters(vlm.model)
    config = copy.deepcopy(base.config)
    rows = vocabulary(vlm.model)
    config.get_text_config().vocab_size = rows
    if hasattr(config, "vocab_size"):
        config.vocab_size = rows
    config.architectures = [type(base).__name__]
    config.save_pretrained(folder)
    processor = copy.deepcopy(vlm.processor)
    if image_size is not None:
        vlm.family.bound(processor, image_size)
    processor.save_pretrained(folder)


def retie(model: Any) -> None:
    """Let a tied output projection see new embeddings: the CPU build packs a copy of its own, and only once."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def kept_group() -> Iterator[None]:
    """Inside, an engine's end ends its own process groups, but not the one of all ranks, which is the trainer's."""
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
    """Inside, vLLM may start; afterwards random numbers, threads and logging are as they were."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    state, threads, setter = torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads
    gpu_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    numbers, more = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_num_threads = setter
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state)
        random.setstate(numbers)
        np.random.set_state(more)
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)
