"""Rewards by a language model as the judge, with a cache of its replies and a rule on failures.

A judge can fail. Its client retries as long as `runtime` allows; then `on_failure: stop` ends the run with one line,
and the same command resumes it from its last checkpoint, with earlier replies from the cache. With `on_failure: drop`,
samples without a reply get NaN, and the trainer leaves this reward out for their whole group. A judge that gives no
reply at all SILENCES times in a row stops the run in both cases, since every update waits for it in vain.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from common.config.schema import one_of
from common.judge.base import Generate, Judge, JudgeUnavailable, Keep, Model, OwnBase, Replies, Runtime, settings
from common.types import Sample, UserError

log = logging.getLogger(__name__)
SILENCES = 5  # our choice
COUNTS = ("calls", "cache_hits", "unparsed", "failed", "seconds")


class CachedJudge(ABC):
    """Judge that is asked nothing twice; has the members of a `StatefulReward` (common/rewards.py) but the call.

    Attributes:
        example: Prompt of the kind that the judge gets, to try it out before the run computes anything.
        judge_replies: Replies to the samples of the last call; None where nothing was asked or came. Length: N.
    """

    example: ClassVar[str]

    def __init__(
        self,
        *,
        judge: Mapping[str, Any],
        runtime: Mapping[str, Any],
        unparsed: float = 0.0,
        on_failure: str = "stop",
    ) -> None:
        """
        Args:
            judge: Model of the judge, see `base.Model`.
            runtime: Access to the judge, see `base.Runtime`.
            unparsed: Value of a sample whose reply cannot be read, 0 to 1.
            on_failure: Behaviour if the judge fails: `stop` or `drop`, see the module docstring.

        Raises:
            UserError: Begins with the argument at fault.
        """
        one_of("on_failure", on_failure, ("stop", "drop"))
        if not 0 <= unparsed <= 1:
            raise UserError(f"unparsed={unparsed} must be from 0 to 1, as the scores are")
        self.runtime = settings(Runtime, "runtime", runtime)
        self.model = settings(Model, "judge", judge)
        self.judge = make_judge(self.model, self.runtime)
        self.unparsed, self.on_failure = unparsed, on_failure
        self.counts = dict.fromkeys(COUNTS, 0.0)
        self.judge_replies: list[str | None] = []
        self.silences = 0  # calls in a row without any reply

    @abstractmethod
    def parse(self, reply: str) -> Any:
        """Return what the judge's reply says; None if it cannot be read, so that it is not cached."""

    @property
    def may_be_missing(self) -> bool:
        """Return whether NaN means a missing reply, so that the group is scored without this reward."""
        return self.on_failure == "drop"

    @property
    def needs_base(self) -> bool:
        """Return whether the run's own base model must be bound before the first call."""
        return isinstance(self.judge, OwnBase)

    def bind(self, generate: Generate, identity: str | None = None) -> None:
        """Give `backend: self` the run's own base model, see `OwnBase.bind`. Other judges ignore it."""
        if isinstance(self.judge, OwnBase):
            self.judge.bind(generate, identity)

    def prepare(self) -> None:
        """Prepare the judge before the run computes anything: load the model, or send the server one prompt.

        Raises:
            UserError: The judge cannot be had, or does not answer and `on_failure` is `stop`.
        """
        try:
            self.judge.prepare(self.example)
        except JudgeUnavailable as error:
            if self.on_failure == "stop":
                raise UserError(
                    f"on_failure=stop: the judge {error}; start it and give the same command again"
                ) from error
            log.warning("the judge %s", error)

    def replies(self, prompts: Sequence[str]) -> dict[str, str | None]:
        """Return the reply to every prompt, from the cache or the judge; None where there is none.

        Raises:
            UserError: Questions stayed open, and `on_failure` is `stop` or the judge has fallen silent.
        """
        judge = self.judge.identity()
        cache = self._cache if judge is not None and self.runtime.cache_gb > 0 else None
        replies: dict[str, str | None] = {}
        if cache is not None and judge is not None:
            replies = {prompt: reply for prompt in set(prompts) if (reply := cache.get(judge, prompt)) is not None}
        # Equal prompts of an update are asked once.
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in replies]
        self.counts["calls"] += len(missing)
        self.counts["cache_hits"] += len(prompts) - len(missing)

        def keep(prompt: str, reply: str) -> None:
            # Only readable replies are cached: a server that returned nonsense may have been repaired next time.
            if cache is not None and judge is not None and self.parse(reply) is not None:
                cache.put(judge, prompt, reply)

        answers, problem = self._ask(missing, keep)
        replies |= zip(missing, answers, strict=True)
        if missing:
            self.silences = 0 if any(answer is not None for answer in answers) else self.silences + 1
        silent = self.silences >= SILENCES
        if problem and (silent or self.on_failure == "stop"):
            often = f"; {SILENCES} times in a row it answered nothing at all" if silent else ""
            raise UserError(
                f"on_failure={self.on_failure}: the judge {problem}{often}; give the same command again when it"
                " answers: the run continues from its last checkpoint"
            )
        return replies

    def read(self, reply: str | None) -> Any:
        """Return what a reply says; None, counted, if it is missing or cannot be read."""
        said = None if reply is None else self.parse(reply)
        if said is None:
            self.counts["failed" if reply is None else "unparsed"] += 1
        return said

    def _ask(self, prompts: Sequence[str], keep: Keep) -> tuple[Sequence[str | None], str]:
        """Return the judge's replies, and a description of what failed."""
        if not prompts:
            return [], ""
        began = time.perf_counter()
        try:
            return self.judge.ask(prompts, keep), ""
        except JudgeUnavailable as error:
            log.warning("the judge %s", error)
            return error.answers, str(error)
        finally:
            self.counts["seconds"] += time.perf_counter() - began

    def fingerprint(self) -> str:
        """Return a hash of the model and the wording, not of the address; of `self` without the weights of the run.

        Of a folder or a hub model the weights are hashed, which are read.
        """
        model = self.judge.identity() if self.model.backend == "hf" else asdict(self.model)
        return hashlib.sha256(json.dumps([self.example, model]).encode()).hexdigest()

    @cached_property
    def _cache(self) -> Replies:
        return Replies(Path(self.runtime.cache_dir).resolve(), int(self.runtime.cache_gb * 2**30))

    def metrics(self) -> dict[str, float]:
        """Return this rank's counts since the last call, to be added up over ranks.

        calls: prompts sent to the judge (retries not counted). cache_hits: samples that needed no call, repetitions
        within an update included. unparsed, failed: samples without a readable reply, without a reply. seconds: time
        spent waiting. A resumed run repeats unparsed and failed, but not calls, cache_hits and seconds.
        """
        metrics = {f"judge/{name}": value for name, value in self.counts.items()}
        self.counts = dict.fromkeys(COUNTS, 0.0)
        return metrics


class JudgedReward(CachedJudge):
    """Reward from 0 to 1 that the judge's reply on a sample states; N completions of one update."""

    @abstractmethod
    def prompt(self, sample: Sample) -> str | float:
        """Return what the judge is asked about a sample, or its value where there is nothing to ask."""

    @abstractmethod
    def parse(self, reply: str) -> float | None:
        """Return the value from 0 to 1 that a reply states; None if it cannot be read."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Return the reward of every sample, NaN without a reply.

        Raises:
            UserError: Questions stayed open, and `on_failure` is `stop` or the judge has fallen silent.
        """
        prompts = [self.prompt(sample) for sample in samples]
        replies = self.replies([prompt for prompt in prompts if isinstance(prompt, str)])
        self.judge_replies = [replies[prompt] if isinstance(prompt, str) else None for prompt in prompts]
        return [self._value(replies[prompt]) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _value(self, reply: str | None) -> float:
        stated: float | None = self.read(reply)
        if reply is None:
            return math.nan
        return self.unparsed if stated is None else stated


def make_judge(model: Model, runtime: Runtime) -> Judge:
    """Build the judge of `judge.backend`; nothing is loaded or opened yet.

    Raises:
        UserError: Names the key at fault.
    """
    if model.backend == "openai":
        from common.judge.openai import OpenAIServer

        return OpenAIServer(model, runtime)
    if model.backend == "hf":
        from common.judge.hf import Checkpoint

        return Checkpoint(model, runtime)
    return OwnBase(model)
