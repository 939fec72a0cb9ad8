"""The `Rollout` backend that samples with vLLM: an engine in every rank's process, shared by ranks if it is split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.models.slots import rows_of_vocabulary
from common.models.vlm import VLM
from common.rollout.base import Completion, Decoding, Request
from common.rollout.vllm import weights
from common.rollout.vllm.engine import Engine, Watchdog
from common.runtime.distributed import rank, world

# Ranks that share an engine, each with a part of its weights, ask it together.
#
# A tensor-parallel engine answers only if all its ranks ask the same, but ranks have prompts of their own, and not
# equally often: the last batch of an evaluation, or a group that is drawn again, concerns some alone. So they ask in
# rounds, each for the prompts of all, and a rank that has no more joins the rounds of the others until nobody has.


Ask = Callable[[Sequence[Any], Sequence[dict[str, Any]], float], list[Any]]


@dataclass(frozen=True)
class Asked:
    """What a rank wants to know: see `Engine.generate`."""

    prompts: list[Any]
    choices: list[dict[str, Any]]
    temperature: float


class Together:
    """The ranks of one engine."""

    def __init__(self, size: int, ask: Ask) -> None:
        """
        Args:
            size: Ranks of an engine; it divides their number.
            ask: The engine.
        """
        import torch.distributed as dist

        self.ask, self.place = ask, rank() % size
        groups = [dist.new_group(list(range(first, first + size)), backend="gloo") for first in range(0, world(), size)]
        self.size, self.group = size, groups[rank() // size]

    def round(self, mine: Asked) -> list[Any]:
        """The engine's outputs for this rank's prompts."""
        return self._round(self._of_all(mine))

    def finish(self) -> None:
        """Join the others' rounds until they have no more."""
        while any(parts := self._of_all(None)):
            self._round(parts)

    def _of_all(self, mine: Asked | None) -> list[Asked | None]:
        import torch.distributed as dist

        parts: list[Asked | None] = [None] * self.size
        dist.all_gather_object(parts, mine, group=self.group)
        return parts

    def _round(self, parts: list[Asked | None]) -> list[Any]:
        """Ask for all, those of one temperature at a time; the outputs of this rank."""
        outputs: list[Any] = []
        for temperature in sorted({part.temperature for part in parts if part}):
            shares = [part if part and part.temperature == temperature else Asked([], [], 0.0) for part in parts]
            found = self.ask(
                [prompt for part in shares for prompt in part.prompts],
                [choice for part in shares for choice in part.choices],
                temperature,
            )
            before = sum(len(part.prompts) for part in shares[: self.place])
            outputs += found[before : before + len(shares[self.place].prompts)]
        return outputs


# The `Rollout` backend that samples with vLLM: an engine of its own in every rank's process.
#
# Prompts go in as ids with one placeholder per image, seeds are those of the requests, weights are the policy's:
# pushed whole at first, later only what an update has moved. Embeddings beyond the vocabulary are tokens of a longer
# vocabulary.
#
# Shapes: R completion tokens.


class VLLMRollout:
    """See `Rollout` in common/rollout/base.py."""

    has_weight_copy = True
    logprobs_untruncated = True  # taken before top_k and top_p restrict what is drawn

    def __init__(
        self,
        vlm: VLM,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        seed: int,
        image_size: int | None = None,
        memory: float = 0.4,
        cpu_gib: int = 1,
        sequences: int = 64,
        eager: bool = False,
        sleep: int = 1,
        tensor_parallel: int = 1,
        timeout: float = 1800.0,
    ) -> None:
        """
        Args:
            vlm: The policy.
            prompt_tokens: Longest prompt.
            completion_tokens: Longest completion.
            seed: Of the engine; a completion's own comes with its request.
            image_size: Side of the largest picture in pixels, for which memory is reserved; None: the largest that the
                model's own processor allows.
            memory: Share of the GPU for the engine: weights, cache and work space.
            cpu_gib: Size of the cache where there is no GPU.
            sequences: Completions that are computed at a time.
            eager: No CUDA graphs: slower, ready sooner, less memory. Always so on a CPU.
            sleep: While the policy is updated, a GPU engine keeps its weights on the host (1), drops them (2: they are
                pushed whole before the next sampling), or keeps everything where it is (0).
            tensor_parallel: Ranks that share an engine, each with its part of the weights; neighbours on one machine.
            timeout: Seconds after which a call counts as hanging, and the process is ended.

        Raises:
            UserError: The engine does not start, or cannot compute what the trainer computes.
        """
        self.vlm, self.version = vlm, -1  # nothing is loaded yet
        self.watchdog = Watchdog(timeout)
        with self.watchdog("starting"):
            self.engine = Engine(
                vlm,
                length=prompt_tokens + completion_tokens,
                seed=seed,
                image_size=image_size,
                memory=memory,
                cpu_gib=cpu_gib,
                sequences=sequences,
                eager=eager,
                sleep=sleep,
                tensor_parallel=tensor_parallel,
            )
            self.team = Together(tensor_parallel, self.engine.generate) if tensor_parallel > 1 else None

    def generate(self, requests: Sequence[Request], group_size: int, decoding: Decoding) -> list[list[Completion]]:
        """See `Rollout.generate`."""
        prompts = [self._prompt(request) for request in requests]
        choices = [self._choices(request, group_size, decoding) for request in requests]
        with self.watchdog("sampling"):
            if self.team is None:
                outputs = self.engine.generate(prompts, choices, decoding.temperature or 1.0)
            else:
                outputs = self.team.round(Asked(prompts, choices, decoding.temperature or 1.0))
        for request, output in zip(requests, outputs, strict=True):
            check_prompt(request, output.prompt_token_ids)
        groups = [[self._completion(each) for each in output.outputs] for output in outputs]
        return [group * (group_size // len(group)) for group in groups]  # a greedy group is one completion

    def refresh(self, version: int) -> None:
        """See `Rollout.refresh`. The first time, and after a sleep that dropped them, all weights are pushed."""
        if version == self.version:
            return
        complete = self.version < 0
        with self.watchdog("taking over the weights"):
            slots = self.vlm.slots
            self.engine.push(weights.named(self.vlm.model, trained=not complete))
            if slots is not None and slots.trainable and not complete:
                with weights.whole([slots.embedding.weight, *slots.parts()]):
                    rows = rows_of_vocabulary(slots.embedding, slots.table())
                self.engine.push_rows(slots.first, rows)
            self.engine.forget()
        self.version = version

    def finish(self) -> None:
        """See `AsksTogether`."""
        if self.team is not None:
            with self.watchdog("sampling for other ranks"):
                self.team.finish()

    def rest(self) -> None:
        """See `Rollout.rest`."""
        if self.engine.rest():
            self.version = -1

    def wake(self) -> None:
        """See `Rollout.wake`."""
        self.engine.wake()

    def close(self) -> None:
        """See `Rollout.close`."""
        self.engine.close()

    def _prompt(self, request: Request) -> dict[str, Any]:
        pictures = request.pictures()
        prompt: dict[str, Any] = {"prompt_token_ids": request.unexpanded().tolist()}
        return prompt | ({"multi_modal_data": {"image": pictures}} if pictures else {})

    def _choices(self, request: Request, group_size: int, decoding: Decoding) -> dict[str, Any]:
        """Of vLLM's `SamplingParams`; the temperature is applied to the logits before its sampler sees them."""
        greedy = decoding.temperature == 0
        return {
            "n": 1 if greedy else group_size,
            "temperature": 0.0 if greedy else 1.0,
            "top_k": decoding.top_k,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_tokens,
            "seed": number(request.seed),
            "stop_token_ids": list(self.vlm.eos),
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }

    def _completion(self, output: Any) -> Completion:
        """One of vLLM's outputs. Shapes: [R]."""
        ids = list(output.token_ids)
        finished = ids[-1] in self.vlm.eos
        logps = [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)]
        text = self.vlm.processor.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
        return Completion(torch.tensor(ids), torch.tensor(logps), text, not finished, self.version)


def number(seed: str) -> int:
    """A seed's text as vLLM takes it; the completions of a group get it and the numbers that follow."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little")


def check_prompt(request: Request, computed: Sequence[int]) -> None:
    """
    Raises:
        RuntimeError: The engine computed other ids than the trainer will.
    """
    expected = request.encoded.ids.tolist()
    if list(computed) != expected:
        first = next((i for i, pair in enumerate(zip(computed, expected, strict=False)) if pair[0] != pair[1]), None)
        where = f"they differ at {first}" if first is not None else f"{len(computed)} instead of {len(expected)}"
        raise RuntimeError(
            f"vLLM computed other prompt ids than the trainer's ({where}); their processors disagree about this model:"
            " use rollout=hf and report it"
        )
