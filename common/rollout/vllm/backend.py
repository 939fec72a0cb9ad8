"""Rollout backend that samples with vLLM: every rank has its own engine in its process.

The engine gets prompts as ids with one placeholder per image, and the seeds of the requests. All weights of the policy
are pushed once, later only those that are trained. Embeddings beyond the vocabulary become tokens of a longer
vocabulary.

Shapes: R completion tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from common.models.extra_embeddings import rows_of_vocabulary
from common.models.vlm import VLM
from common.rollout.base import Completion, Decoding, Request
from common.rollout.vllm import weights
from common.rollout.vllm.engine import Engine, Watchdog


class VLLMRollout:
    """Rollout backend with a vLLM engine."""

    has_weight_copy = True
    logprobs_untruncated = True  # computed before top_k and top_p restrict sampling

    def __init__(
        self,
        vlm: VLM,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        seed: int,
        image_size: int | None = None,
        gpu_memory_utilization: float = 0.4,
        cpu_kvcache_space: float = 1,
        max_num_seqs: int = 64,
        enforce_eager: bool = False,
        sleep_level: int = 1,
        timeout: float = 1800.0,
    ) -> None:
        """
        Args:
            vlm: Policy.
            prompt_tokens: Length of the longest prompt.
            completion_tokens: Length of the longest completion.
            seed: Seed of the engine; requests have seeds of their own.
            image_size: Side in pixels of the largest image, for which memory is reserved; None: the largest that the
                model's processor allows.
            gpu_memory_utilization: Share of the GPU memory for the engine: weights, KV cache and work space.
            cpu_kvcache_space: Size of the KV cache in GiB on a machine without a GPU.
            max_num_seqs: Completions that are computed at a time.
            enforce_eager: Use no CUDA graphs: slower, ready sooner, less memory. Always so on a CPU.
            sleep_level: During an update, a GPU engine moves its weights to the host (1), drops them (2: all are
                pushed again before the next sampling), or keeps everything in place (0).
            timeout: Seconds after which a call counts as hanging and the process is ended.

        Raises:
            UserError: The engine does not start, or cannot compute the same as the trainer.
        """
        self.vlm, self.version = vlm, -1  # -1: the engine has no weights yet
        self.watchdog = Watchdog(timeout)
        with self.watchdog("starting"):
            self.engine = Engine(
                vlm,
                length=prompt_tokens + completion_tokens,
                seed=seed,
                image_size=image_size,
                gpu_memory_utilization=gpu_memory_utilization,
                cpu_kvcache_space=cpu_kvcache_space,
                max_num_seqs=max_num_seqs,
                enforce_eager=enforce_eager,
                sleep_level=sleep_level,
            )

    def generate(self, requests: Sequence[Request], group_size: int, decoding: Decoding) -> list[list[Completion]]:
        """Sample completions, see `Rollout.generate`."""
        prompts = [self._prompt(request) for request in requests]
        choices = [self._choices(request, group_size, decoding) for request in requests]
        with self.watchdog("sampling"):
            outputs = self.engine.generate(prompts, choices, decoding.temperature or 1.0)
        for request, output in zip(requests, outputs, strict=True):
            check_prompt(request, output.prompt_token_ids)
        groups = [[self._completion(each) for each in output.outputs] for output in outputs]
        return [group * (group_size // len(group)) for group in groups]  # greedy: one completion, repeated

    def refresh(self, version: int) -> None:
        """Push weights to the engine: all of them at first and after a sleep that dropped them, later trained ones."""
        if version == self.version:
            return
        complete = self.version < 0
        with self.watchdog("taking over the weights"):
            extra = self.vlm.extra_embeddings
            self.engine.push(weights.named(self.vlm, trained=not complete))
            # A partial push leaves out a frozen vocabulary, whose additional rows may be trained: push these alone.
            if extra is not None and extra.trainable and not complete:
                with weights.whole([extra.embedding.weight, *extra.parts()]):
                    rows = rows_of_vocabulary(extra.embedding, extra.table())
                self.engine.push_rows(extra.first, rows)
            self.engine.forget()
        self.version = version

    def rest(self) -> None:
        """Let the engine free GPU memory."""
        if self.engine.rest():
            self.version = -1  # the weights are gone

    def wake(self) -> None:
        """Let the engine allocate its memory again."""
        self.engine.wake()

    def close(self) -> None:
        """Shut the engine down."""
        self.engine.close()

    def _prompt(self, request: Request) -> dict[str, Any]:
        pictures = request.pictures()
        prompt: dict[str, Any] = {"prompt_token_ids": request.unexpanded().tolist()}
        return prompt | ({"multi_modal_data": {"image": pictures}} if pictures else {})

    def _choices(self, request: Request, group_size: int, decoding: Decoding) -> dict[str, Any]:
        """Return arguments of vLLM's `SamplingParams`; `Engine._install` applies the temperature to the logits."""
        greedy = decoding.temperature == 0
        return {
            "n": 1 if greedy else group_size,
            "temperature": 0.0 if greedy else 1.0,
            "top_k": decoding.top_k,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_tokens,
            "seed": number(request.seed),
            "stop_token_ids": list(self.vlm.eos),
            "logprobs": 0,  # that of the sampled token only
            "detokenize": False,
        }

    def _completion(self, output: Any) -> Completion:
        """Convert an output of vLLM. Shapes: [R]."""
        ids = list(output.token_ids)
        finished = ids[-1] in self.vlm.eos
        logps = [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)]
        text = self.vlm.processor.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
        text = text.removeprefix(self.vlm.lead)
        return Completion(torch.tensor(ids), torch.tensor(logps), text, not finished, self.version)


def number(seed: str) -> int:
    """Return a number for a seed's text; vLLM gives the completions of a group this number and the next ones."""
    # 7 bytes, so that the next ones still fit into 64 bits with a sign
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little")


def check_prompt(request: Request, computed: Sequence[int]) -> None:
    """Check that the engine expanded a prompt to the ids that the trainer will score.

    Raises:
        RuntimeError: The ids differ.
    """
    expected = request.encoded.ids.tolist()
    if list(computed) != expected:
        first = next((i for i, pair in enumerate(zip(computed, expected, strict=False)) if pair[0] != pair[1]), None)
        where = f"they differ at {first}" if first is not None else f"{len(computed)} instead of {len(expected)}"
        raise RuntimeError(
            f"vLLM computed other prompt ids than the trainer's ({where}); their processors disagree about this model:"
            " use rollout=hf and report it"
        )
