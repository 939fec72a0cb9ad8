"""Estimate a run before it runs: tokens of its prompts, GPU memory, operations of an update, hours on a card.

Computed from the model's configuration files and the run's own prompts, by the code that trains; no weights are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from common.config.schema import NO_FAMILY, Config, GRPOConfig
from common.cost.update import GIB, Batch, Pass, cache_bytes, measure, memory
from common.counted import counted
from common.forward import attention
from common.forward.logprobs import head_rows
from common.forward.packing import PromptGroup, pack, score_prompts
from common.models import files, meter, vlm
from common.models.adapters import without_adapters
from common.models.encoder import EncodedPrompt, PromptEncoder
from common.models.extra_embeddings import attach
from common.training.base import total_updates
from common.training.sft import target
from common.types import Prompt
from common.vlm.prompting import TaskPrompts

# A card: GiB, dense bf16 operations per second, bytes of memory traffic per second; the makers' data sheets.
CARDS = {
    "RTX 4090": (24, 165e12, 1.01e12),
    "L40S": (48, 362e12, 0.86e12),
    "A100 40 GB": (40, 312e12, 1.56e12),
    "A100 80 GB": (80, 312e12, 2.04e12),
    "H100": (80, 989e12, 3.35e12),
    "H200": (141, 989e12, 4.8e12),
}
# Our choice, for a slow and a fast training: the shares of peak operations and of peak bandwidth that it reaches, and
# the least seconds per sampled token, with kernels launched one by one and with CUDA graphs.
SLOW, FAST = (0.15, 0.3, 0.03), (0.45, 0.7, 0.003)


@dataclass(frozen=True)
class Cost:
    """Estimated cost of a training. Operations are those of one GPU in one update.

    Attributes:
        prompts: Tokens of the shortest and the longest training prompt.
        completion: Largest number of tokens of a completion.
        operations: Operations by length of a completion in tokens, then by phase.
        memory: Bytes by phase, then by what holds them; see `update.memory`.
        updates: Number of planned updates.
        ranks: Number of GPUs.
        traffic: Bytes read per sampled token, by length of a completion; 0 where nothing is sampled.
        reuse: Number of updates per rollout.
    """

    prompts: tuple[int, int]
    completion: int
    operations: dict[int, dict[str, float]]
    memory: dict[str, dict[str, float]]
    updates: int
    ranks: int
    traffic: dict[int, float]
    reuse: int = 1

    @property
    def fullest(self) -> str:
        """Return the phase that needs most memory."""
        return max(self.memory, key=lambda phase: sum(self.memory[phase].values()))

    @property
    def bytes(self) -> float:
        """Return the memory of the phase that needs most."""
        return sum(self.memory[self.fullest].values())

    def hours(self, card: str, completion: int) -> tuple[float, float]:
        """Return the hours of the whole training without evaluations: lower and upper estimate."""
        _, speed, bandwidth = CARDS[card]
        total = sum(self.operations[completion].values())
        found = []
        for used, read, token in (FAST, SLOW):
            seconds = total / (speed * used)
            # Sampling is bound by memory bandwidth or by the overhead per token, whichever is slower.
            if traffic := self.traffic[completion]:
                seconds += completion * max(token, traffic / (bandwidth * read)) / self.reuse
            found.append(self.updates * seconds / 3600)
        return found[0], found[1]


def of_run(config: Config, task_prompts: TaskPrompts, folder: Path, ranks: int, lengths: Sequence[int] = ()) -> Cost:
    """Estimate the cost of a run's training.

    Args:
        config: Configuration of the run, with a trainer that trains.
        task_prompts: Prompts of the run.
        folder: Folder of the model, from `files.find`; its weights need not be there.
        ranks: Number of GPUs.
        lengths: Completion lengths to count operations for; empty: the longest label's reply and the limit.
    """
    trainer, size, limit = config.trainer, config.model.image_size, config.rollout.max_completion_tokens
    # The model on the meta device, and the longest prompt, label and test prompt as the worst case.
    policy = _with_bank(vlm.on_meta(folder, config.model), config, task_prompts)
    attention.install(policy.model, config.model.attention)
    measure_tokens = meter.of_folder(folder, config.model.family).tokens
    tokens = measure_tokens(task_prompts.train, size)
    prompt = _encoded(policy, _longest(task_prompts.train, tokens), size)
    tests = [each for split in task_prompts.evaluation.values() for each in split]
    tested = _encoded(policy, _longest(tests, measure_tokens(tests, size)), size) if tests else prompt
    label = max((_reply(policy, task_prompts, each, config) for each in _labels(task_prompts)), key=len)
    prompts, sampled, most = math.ceil(trainer.prompts_per_update / ranks), None, len(label)
    if isinstance(trainer, GRPOConfig):
        sampled, most = Batch(prompt, prompts, trainer.group_size, limit), limit
    # Forwards to count: a single group of each length for operations, and the largest micro-batch for memory.
    shown = tuple(lengths) or tuple(dict.fromkeys((min(len(label), most), most)))
    passes = {length: _measured(policy, prompt, label, length, 1, config) for length in {*shown, most}}
    fits = _groups_per_forward(config, len(prompt.ids) + _group_size(config) * most, prompts)
    largest = passes[most] if fits == 1 else _measured(policy, prompt, label, most, fits, config)
    evaluated = Batch(tested, min(config.rollout.evaluation_batch, max(1, len(tests))), 1, limit)
    weights, others = _weight_bytes(policy, config), len(task_prompts.train[0].scored_with)
    return Cost(
        (min(tokens), len(prompt.ids)),
        most,
        {length: _operations(passes[length], config, prompts, others) for length in shown},
        memory(policy, largest, sampled, evaluated, trainer, config.deepspeed, ranks, weights),
        total_updates(trainer, len(task_prompts.train)),
        ranks,
        {length: _traffic(policy, sampled, length) for length in shown},
        trainer.num_iterations if isinstance(trainer, GRPOConfig) else 1,
    )


def foreseen(config: Config, task_prompts: TaskPrompts) -> list[str]:
    """Return the estimated cost of a run as lines of text.

    Empty where no vision-language model is trained, and for models that are built here, which are tiny.
    """
    model = config.model
    if model.family == NO_FAMILY or config.trainer.name == "none" or model.path is None:
        return []
    folder = files.find(model.path, model.revision, weights=False)
    return lines(of_run(config, task_prompts, folder, max(1, config.gpus)))


def _measured(
    policy: vlm.VLM, prompt: EncodedPrompt, label: torch.Tensor, length: int, groups: int, config: Config
) -> Pass:
    """Count the forward of some groups whose completions all have one length."""
    trainer = config.trainer
    completion = label if len(label) == length else label[:1].repeat(length)
    made = [PromptGroup(prompt, (completion,) * _group_size(config))] * groups
    impl = trainer.impl if isinstance(trainer, GRPOConfig) else "shared"
    packed = pack(made, policy.family, policy.pad, torch.device("cpu"), impl)
    if not isinstance(trainer, GRPOConfig) and config.protocol.sft_loss == "everything":
        packed = score_prompts(packed, policy.banned, policy.model.get_output_embeddings().weight.shape[0])
    chunk = trainer.head_chunk if isinstance(trainer, GRPOConfig) else head_rows(policy.model)
    return measure(policy, packed, chunk)


def _group_size(config: Config) -> int:
    return config.trainer.group_size if isinstance(config.trainer, GRPOConfig) else 1


def _groups_per_forward(config: Config, tokens: int, prompts: int) -> int:
    budget = config.trainer.tokens_per_forward if isinstance(config.trainer, GRPOConfig) else None
    fits = prompts if budget is None else max(1, budget // tokens)
    return max(1, min(config.trainer.prompts_per_forward, prompts, fits))


def _operations(one: Pass, config: Config, prompts: int, others: int) -> dict[str, float]:
    """Return a rank's operations in an update, by phase. A sampled token costs as much as in a forward.

    `others`: other images that completions are scored with.
    """
    trainer = config.trainer
    phases = {"training": prompts * float(one.forward + one.backward)}
    if isinstance(trainer, GRPOConfig):
        phases["sampling"] = prompts * one.forward / trainer.num_iterations
        if trainer.beta > 0:
            phases["reference"] = prompts * one.forward / trainer.num_iterations
        if (several := trainer.steps_per_rollout) > 1:  # all but the first update's groups are scored before it
            phases["old policy"] = prompts * one.forward * (several - 1) / several / trainer.num_iterations
        if others > 0:
            phases["other images"] = others * prompts * one.forward / trainer.num_iterations
    return phases


def _traffic(policy: vlm.VLM, sampled: Batch | None, length: int) -> float:
    """Return the bytes read per sampled token for all rows together: weights, and the cache at half length."""
    if sampled is None:
        return 0.0
    cache = cache_bytes(policy, sampled.count * sampled.group_size, len(sampled.prompt.ids) + length // 2)
    weights = sum(p.nbytes for p in policy.model.parameters())
    return weights + cache


def _with_bank(policy: vlm.VLM, config: Config, task_prompts: TaskPrompts) -> vlm.VLM:
    """Add the embeddings to the model that the method puts beside its vocabulary."""
    count, trained = task_prompts.prompting.embeddings(task_prompts.task), bool(config.method.get("trainable", True))
    if count == 0:
        return policy
    text = policy.model.config.get_text_config()
    tokens = policy.family.image_tokens(policy.model.config.to_dict(), config.model.image_size)
    if config.trainer.embeddings == "host":  # only those of the current prompt are on the GPU
        count, trained = max(len(prompt.categories) for prompt in task_prompts.train), False
    entries = torch.empty(count, tokens, text.hidden_size, device="meta")
    return replace(policy, extra_embeddings=attach(policy.model, entries, trained))


def _encoded(policy: vlm.VLM, prompt: Prompt, image_size: int) -> EncodedPrompt:
    """Encode the prompt with a black image."""

    def black(keys: Sequence[str]) -> list[Image.Image]:
        return [Image.new("RGB", (image_size, image_size)) for _ in keys]

    return PromptEncoder(policy, black, None)([prompt])[0]


def _longest(prompts: Sequence[Prompt], tokens: Sequence[int]) -> Prompt:
    return prompts[max(range(len(prompts)), key=tokens.__getitem__)]


def _labels(task_prompts: TaskPrompts) -> list[str]:
    return list(dict.fromkeys(prompt.label for prompt in task_prompts.train))


def _reply(policy: vlm.VLM, task_prompts: TaskPrompts, label: str, config: Config) -> torch.Tensor:
    """Return the token ids of the reply to a label, with its end."""
    loss = "answer" if isinstance(config.trainer, GRPOConfig) else config.protocol.sft_loss
    return target(policy, task_prompts.prompting.label_response(label), loss)


def _weight_bytes(policy: vlm.VLM, config: Config) -> int | None:
    """Return the bytes of weights in 8 or 4 bits, or None without them.

    bitsandbytes stores linear layers in few bits, except the output projection and what is trained.
    """
    bits = config.model.bits
    if bits is None:
        return None
    base = without_adapters(policy.model)
    linear = [
        module.weight
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name and "lora" not in name
    ]
    saved = sum(weight.nbytes - _quantised_bytes(weight, bits) for weight in linear if not weight.requires_grad)
    dequantised = max((weight.nbytes for weight in linear), default=0)  # one layer's weights at a time
    return sum(p.nbytes for p in policy.model.parameters()) - saved + dequantised


def _quantised_bytes(weight: torch.Tensor, bits: int) -> int:
    """Return the bytes of a matrix with its scales.

    8 bits: an fp32 scale per row. 4 bits (NF4 with quantised scales): a byte per 64 numbers, and four per 256 of these.
    """
    count = weight.numel()
    return count + 4 * len(weight) if bits == 8 else count // 2 + count // 64 + count // (64 * 64)


def smallest_card(needed: float) -> str:
    """Return the smallest card with 8 % more memory than needed, for what a caching allocator takes beside.

    >>> smallest_card(20 * GIB), smallest_card(38 * GIB), smallest_card(200 * GIB)
    ('RTX 4090', 'L40S', 'none')
    """
    fitting = [(size, name) for name, (size, *_) in CARDS.items() if size * GIB >= 1.08 * needed]
    return min(fitting, default=(0, "none"))[1]


def lines(cost: Cost, card: str = "A100 80 GB") -> list[str]:
    """Return the estimate as lines of text."""
    few, many = cost.prompts
    held = cost.memory[cost.fullest]
    parts = " + ".join(f"{name} {_gib(size)}" for name, size in held.items() if size >= 0.01 * GIB)
    found = [
        f"prompts: {few} to {counted(many, 'token')}, completions up to {cost.completion}",
        f"memory: about {_gib(cost.bytes)} GiB per GPU, most in {cost.fullest}: {parts};"
        f" smallest card: {smallest_card(cost.bytes)}",
    ]
    for length, phases in cost.operations.items():
        low, high = cost.hours(card, length)
        what = " + ".join(f"{name} {count * cost.ranks / 1e12:.3g}" for name, count in phases.items())
        found.append(
            f"completions of {counted(length, 'token')}: {what} TFLOP per update, {low:.2g} to {high:.2g} h of"
            f" training on {cost.ranks} x {card}"
        )
    return found


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
