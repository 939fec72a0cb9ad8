"""Shared parts of the benchmarks: the model, its inputs, our side of the comparisons, and timing.

Shapes: P prompt tokens, R completion tokens, G completions.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from common.config.schema import GRPOConfig, ModelConfig
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, pack_plain, pack_shared
from common.models import vlm
from common.models.encoder import EncodedPrompt
from common.models.families import Qwen2VL
from common.models.tiny import qwen2_vl as tiny
from common.models.vlm import VLM
from common.training.grpo.loss import LossInputs, clipped, policy_loss, scaled, token_weights

VOCABULARY = 8192
GRID = (1, 24, 24)  # 576 patches, 144 image tokens: an image of 336x336 pixels
PATCH, MERGE = 14, 2
BETA, EPSILON = 0.04, 0.2
CPU = torch.device("cpu")
FIRST_WORD = 700  # ids from here on are ordinary tokens in every benchmark prompt


@dataclass(frozen=True)
class Case:
    """Problem size: prompt tokens, completion tokens, completions per prompt."""

    prompt: int
    completion: int
    group: int

    @property
    def name(self) -> str:
        return f"P{self.prompt}_R{self.completion}_G{self.group}"

    @property
    def shared_tokens(self) -> int:
        return self.prompt + self.group * self.completion

    @property
    def plain_tokens(self) -> int:
        return self.group * (self.prompt + self.completion)


def save_model(folder: Path) -> Path:
    """Write a Qwen2-VL of 17 M parameters with random weights as a model folder."""
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    processor = tiny.build_processor()
    token = processor.tokenizer.convert_tokens_to_ids
    eos, pad = token("<|im_end|>"), token("<|endoftext|>")
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={
                "hidden_size": 384,
                "intermediate_size": 1536,
                "num_hidden_layers": 6,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 8192,
                "use_sliding_window": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
                "bos_token_id": pad,
                "eos_token_id": eos,
                "pad_token_id": pad,
            },
            vision_config={
                "depth": 2,
                "embed_dim": 128,
                "hidden_size": 384,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": 2,
            },
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            tie_word_embeddings=True,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Place:
    """Device and number format of both sides."""

    device: torch.device = CPU
    dtype: str = "float32"

    def seconds(self) -> float:
        """Return CPU seconds of this process or, on a GPU, wall-clock seconds after all queued work has finished."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)  # kernels run asynchronously
        return time.perf_counter()


HERE = Place()


def load_ours(folder: Path, place: Place = HERE) -> VLM:
    """Load the model folder with the code of this project."""
    config = ModelConfig(
        name="benchmark", family="qwen2_vl", path=str(folder), dtype=place.dtype, image_size=336, max_prompt_tokens=8192
    )
    return vlm.load(folder, config, place.device)


def load_stock(folder: Path, place: Place = HERE) -> Any:
    """Load the model folder with transformers."""
    from transformers import AutoModelForImageTextToText

    dtype = vlm.DTYPES[place.dtype]
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(place.device)


def perturb(model: torch.nn.Module) -> None:
    """Change the policy's weights a little, always in the same way, so that the KL term is not zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(0.3 * parameter.std(correction=0) * noise)


def make_group(policy: VLM, case: Case) -> PromptGroup:
    """Return a prompt of random words with one image near its beginning, and random completions."""
    config = policy.model.config
    generator = torch.Generator().manual_seed(1)
    image = torch.full((GRID[1] * GRID[2] // MERGE**2,), config.image_token_id)
    words = torch.randint(FIRST_WORD, VOCABULARY, (case.prompt - len(image) - 2,), generator=generator)
    start, end = torch.tensor([config.vision_start_token_id]), torch.tensor([config.vision_end_token_id])
    ids = torch.cat([words[:16], start, image, end, words[16:]])
    grid = torch.tensor([GRID])
    pixels = torch.randn(GRID[1] * GRID[2], 3 * 2 * PATCH * PATCH, generator=generator)
    completions = torch.randint(FIRST_WORD, VOCABULARY, (case.group, case.completion), generator=generator)
    return PromptGroup(EncodedPrompt(ids, Qwen2VL.positions(ids, grid, config), pixels, grid), tuple(completions))


def make_advantages(case: Case) -> torch.Tensor:
    """Return the advantages [G] of a group in which every other completion is correct."""
    return scaled((torch.arange(case.group) % 2).float()[None])[0]


class OurModels:
    """Policy and reference model with their scorers; the policy's weights are perturbed."""

    def __init__(self, folder: Path, place: Place = HERE) -> None:
        self.policy = load_ours(folder, place)
        perturb(self.policy.model)
        # as in TRL, no id is banned: both sides normalise over the whole vocabulary
        policy, base = (replace(vlm, banned=()) for vlm in (self.policy, load_ours(folder, place)))
        self.scorer = PolicyScorer(policy, 1.0, GRPOConfig.head_chunk).to(place.device).train()
        reference = PolicyScorer(base, 1.0, GRPOConfig.head_chunk).to(place.device)
        self.reference = reference.eval().requires_grad_(False)


class OurStep:
    """Scoring, loss and backward of one group, as in the trainer."""

    def __init__(self, models: OurModels, case: Case, shared: bool = True) -> None:
        self.models, self.model, self.shared = models, models.policy.model, shared
        self.group, self.advantages = make_group(models.policy, case), make_advantages(case)

    def __call__(self) -> float:
        """Compute all gradients, starting from none, and return the loss."""
        self.model.zero_grad()
        policy = self.models.policy
        if self.shared:
            packed = pack_shared([self.group], policy.family, policy.device)
        else:
            packed = pack_plain([self.group], policy.family, policy.pad, policy.device)
        with torch.no_grad():
            ref_logps, _ = self.models.reference(packed, False)
        logps, _ = self.models.scorer(packed)
        lengths = torch.tensor([len(completion) for completion in self.group.completions])
        weights = token_weights("grpo", lengths, len(lengths), len(lengths), int(lengths.sum()), int(lengths.max()))
        advantages, weights = self.advantages.to(logps), weights.to(logps)
        inputs = LossInputs(logps, logps.detach(), ref_logps, advantages, weights, packed.owner)
        loss = policy_loss(inputs, clipped(EPSILON, EPSILON), BETA).loss
        loss.backward()
        return float(loss.detach())


def counted_flops(step: Callable[[], Any]) -> int:
    """Return the floating-point operations of a step, recomputation included.

    PyTorch's counter has no formula for attention on CPUs. Causal attention counts half, since its kernel skips masked
    keys.
    """
    aten = torch.ops.aten

    def seen(keys: int, causal: bool) -> float:
        return (keys + 1) / (2 * keys) if causal else 1.0

    def attention(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
        return int(sdpa_flop_count(query, key, value) * seen(key[2], causal))

    def backward(
        grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, dropout: float, causal: bool, **_: Any
    ) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value) * seen(key[2], causal))

    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return counter.get_total_flops()


@contextmanager
def completion_rows_only() -> Iterator[None]:
    """Make TRL's fused head score completion tokens only, as it does on GPUs, without changing its kernels.

    The head chooses the rows by `_use_triton` of `trl.trainer.utils`. The kernels call their own copy of it, in
    `trl.kernels`, which still returns False on a CPU.
    """
    import trl.trainer.utils

    utils: Any = trl.trainer.utils
    original = utils._use_triton
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = original


@dataclass(frozen=True)
class Seconds:
    """CPU seconds of the repetitions of one variant."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{min(self.values):.3f}, {max(self.values):.3f}]"


def alternate(
    variants: Mapping[str, Callable[[], Any]], repetitions: int, clock: Callable[[], float] = time.process_time
) -> dict[str, Seconds]:
    """Run the variants in turn, so that slow phases of the machine affect all; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions + 1):
        for name, run in variants.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: Seconds(tuple(values[1:])) for name, values in seconds.items()}


def show(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: dict[str, Any]) -> None:
    """Print a table, then the numbers as one line of JSON."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    print(json.dumps(numbers))


def prepare() -> None:
    """Use one thread, and silence log messages and progress bars of transformers."""
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
