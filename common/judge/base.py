"""Define language models as judges: their interface, their configuration, and the cache of their replies."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

from common.config.schema import one_of
from common.plugins import check_call
from common.runtime.disk_cache import DiskCache
from common.runtime.distributed import LONGEST_WAIT
from common.types import UserError

# Cache of replies on disk, so that a resumed or repeated run asks nothing twice. One file per reply, written completely
# or not at all: processes can share the folder and may be killed at any moment.

log = logging.getLogger(__name__)


class Replies:
    """Replies by judge and prompt. Each file also stores the prompt, for readers."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """`folder`: created if missing. `limit_bytes`: 0: nothing is kept."""
        self.cache = DiskCache(folder, limit_bytes, ".json")

    @staticmethod
    def key(judge: str, prompt: str) -> str:
        """Return the SHA-256 of both; a judge's name has no NUL, so no two pairs give the same text."""
        return hashlib.sha256(f"{judge}\0{prompt}".encode()).hexdigest()

    def get(self, judge: str, prompt: str) -> str | None:
        """Return this judge's reply to this prompt, or None."""
        key = self.key(judge, prompt)
        content = self.cache.get(key)
        if content is None:
            return None
        try:
            entry = json.loads(content)
            if (entry["judge"], entry["prompt"]) == (judge, prompt):
                return str(entry["reply"])
        except (ValueError, KeyError, TypeError):
            log.warning("the reply %s is damaged and asked for anew", key)
        return None

    def put(self, judge: str, prompt: str, reply: str) -> None:
        """Store a reply."""
        entry = {"judge": judge, "prompt": prompt, "reply": reply}
        self.cache.put(self.key(judge, prompt), json.dumps(entry, ensure_ascii=False).encode())


# Interface and configuration. A judge maps plain text to plain text; a reward (common/judge/reward.py) writes the
# prompt and parses the reply.

BACKENDS = ("self", "hf", "openai")
LONGEST_CALL = LONGEST_WAIT - 300.0  # seconds; other ranks may be waiting in a collective meanwhile
Settings = TypeVar("Settings")  # a dataclass
Generate = Callable[[Sequence[str], int], list[str]]  # prompts and a limit on tokens to replies
Keep = Callable[[str, str], None]  # takes a prompt and its reply as soon as there is one


class JudgeUnavailable(Exception):
    """Error after all retries that some prompts have no reply. `answers` holds the replies, None for missing ones."""

    def __init__(self, reason: str, answers: Sequence[str | None]) -> None:
        super().__init__(reason)
        self.answers = list(answers)


def forget(prompt: str, reply: str) -> None:
    """Store nothing."""


class Judge(Protocol):
    """Interface of a language model that scores."""

    def identity(self) -> str | None:
        """Return a name, for the cache, of all that a reply depends on beside the prompt; None: do not cache."""

    def prepare(self, example: str) -> None:
        """Load or connect to the judge before the run computes anything.

        Args:
            example: Prompt of the kind that it will be asked, to try it out.

        Raises:
            JudgeUnavailable: It does not answer now.
            UserError: It can never answer.
        """

    def ask(self, prompts: Sequence[str], keep: Keep = forget) -> list[str]:
        """Return one reply per prompt, in order: the most probable one (temperature 0).

        Args:
            prompts: Prompts for the judge.
            keep: Function called with every prompt and its reply as soon as it exists, so that a crash loses few.

        Raises:
            JudgeUnavailable: Some prompts have no reply after all retries.
        """


@dataclass(frozen=True)
class Model:
    """Model of the judge: the configuration that decides the scores (`judge` in conf/rewards/alert.yaml).

    backend: `self` (the run's own frozen base model, the paper's judge), `hf` (another model, loaded beside the
        run's), `openai` (a server with OpenAI's protocol).
    model: hub id or folder (`hf`), or the server's name of the model (`openai`).
    revision, dtype: of the model (`hf`).
    max_tokens: limit on a reply.
    """

    backend: str = "self"
    model: str | None = None
    revision: str | None = None
    dtype: str = "bfloat16"
    max_tokens: int = 16

    def __post_init__(self) -> None:
        _texts("judge", {"model": self.model, "revision": self.revision})
        one_of("judge.backend", self.backend, BACKENDS)
        one_of("judge.dtype", self.dtype, ("bfloat16", "float32"))
        _at_least("judge.max_tokens", self.max_tokens, 1)
        if self.backend != "self" and not self.model:
            kind = "a hub id or a model folder" if self.backend == "hf" else "the name the server has for it"
            raise UserError(f"judge.model is missing; judge.backend={self.backend} needs {kind}")
        if self.backend == "self" and self.model:
            raise UserError(f"judge.model={self.model}: backend=self is the run's own model; choose hf or openai")


@dataclass(frozen=True)
class Runtime:
    """Access to the judge, on which no score depends (`runtime` in conf/rewards/alert.yaml).

    base_url: address of the server.
    api_key_env: environment variable with its key, None for servers without one.
    timeout: seconds per attempt, to the last byte.
    retries: attempts after the first.
    total_timeout: seconds for all prompts of one call, at most LONGEST_CALL.
    concurrency: prompts at a time, per rank.
    batch_size: prompts per forward (`hf`).
    gpus: 0 puts the judge on the CPU (`hf`).
    cache_dir: folder of cached replies.
    cache_gb: its limit, 0: none are kept.
    """

    base_url: str | None = None
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 4
    total_timeout: float = 600.0
    concurrency: int = 8
    batch_size: int = 16
    gpus: int = 0
    cache_dir: str = "cache/judge"
    cache_gb: float = 1.0

    def __post_init__(self) -> None:
        _texts("runtime", {"base_url": self.base_url, "api_key_env": self.api_key_env})
        for name, least in (("retries", 0), ("concurrency", 1), ("batch_size", 1), ("gpus", 0), ("cache_gb", 0)):
            _at_least(f"runtime.{name}", getattr(self, name), least)
        for name in ("timeout", "total_timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"runtime.{name}={getattr(self, name)}: give seconds, above 0")
        if not self.total_timeout <= LONGEST_CALL:
            limit = f"give at most {LONGEST_CALL:g} seconds; other ranks may wait meanwhile"
            raise UserError(f"runtime.total_timeout={self.total_timeout}: {limit}")

    def key(self) -> str:
        """Return the server's key; local servers accept any text."""
        return os.environ[self.api_key_env] if self.api_key_env else "none"


def _at_least(key: str, value: float, least: int) -> None:
    if not value >= least:
        raise UserError(f"{key}={value} must be at least {least}")


def _texts(block: str, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise UserError(f"{block}.{name}={value!r} must be a text; put it into quotes")


def settings(kind: type[Settings], key: str, values: Mapping[str, Any]) -> Settings:
    """Build a block of the configuration from its values, checked.

    Raises:
        UserError: Names the key at fault and the fix.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{key}={values} must hold names and values; see conf/rewards/alert.yaml")
    check_call(f"{kind.__module__}.{kind.__name__}", key, dict(values))
    return kind(**values)


def check_server(runtime: Runtime) -> None:
    """Check that address, key and library of a server exist.

    Raises:
        UserError: Names what is missing.
    """
    if not runtime.base_url or not runtime.base_url.startswith(("http://", "https://")):
        raise UserError(
            f"runtime.base_url={runtime.base_url}: judge.backend=openai needs the server's address, e.g."
            " http://127.0.0.1:8000/v1 (vLLM), http://127.0.0.1:11434/v1 (Ollama), https://api.openai.com/v1"
        )
    if runtime.api_key_env and not os.environ.get(runtime.api_key_env):
        raise UserError(f"runtime.api_key_env={runtime.api_key_env}: there is no such environment variable; export it")
    if find_spec("openai") is None:
        raise UserError("judge.backend=openai needs the openai library; install it with pip install openai")


class OwnBase:
    """`backend: self`: the run's own base model, frozen, without its adapters; bound after it is loaded."""

    def __init__(self, model: Model) -> None:
        self.max_tokens = model.max_tokens
        self.generate: Generate | None = None
        self.name: str | None = None

    def bind(self, generate: Generate, identity: str | None) -> None:
        """Take the model.

        Args:
            generate: Function to one greedy reply per prompt; `text.uncut` is applied to truncated replies.
            identity: Name of the base model's weights and number format; None: replies are not cached.
        """
        self.generate, self.name = generate, identity

    def identity(self) -> str | None:
        return None if self.name is None else f"self:{self.name}:{self.max_tokens}"

    def prepare(self, example: str) -> None:
        """Do nothing: the run loads its model itself."""

    def ask(self, prompts: Sequence[str], keep: Keep = forget) -> list[str]:
        if self.generate is None:
            raise RuntimeError("the judge is the run's own model, but bind() has not been called")
        replies = self.generate(prompts, self.max_tokens)
        for prompt, reply in zip(prompts, replies, strict=True):
            keep(prompt, reply)
        return replies
