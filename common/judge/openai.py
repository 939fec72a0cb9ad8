"""`backend: openai`: any server with OpenAI's chat protocol (vLLM, Ollama, hosted ones).

A server can be slow, unreachable or return nonsense; none of this may delay a training for longer than the
configuration allows. The library's own timeout counts from byte to byte, and a waiting thread cannot be ended.
Therefore prompts are tasks of an event loop, which cancels them on time.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.counted import counted
from common.judge.base import JudgeUnavailable, Keep, Model, Runtime, check_server, forget
from common.judge.text import neutral, uncut
from common.types import UserError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between attempts: 0.5, 1, 2, 4, 8, 8, ...
LONGEST_WISH = 60.0  # seconds; upper limit on the pause that a server requests
WORTH_ANOTHER_TRY = (408, 409, 425, 429)  # retried, like all status codes from 500
LONGEST_QUOTE = 200  # characters quoted from a server's error message
REFUSED = (401, 403, 404, 405)  # wrong key, address or model: a retry cannot help


@dataclass(frozen=True)
class Failure:
    """Missing reply. reason: for messages. again: a retry may help. wish: seconds that the server asks to wait."""

    reason: str
    again: bool
    wish: float = 0.0


class OpenAIServer:
    """Judge behind a server, with several prompts at a time."""

    def __init__(self, model: Model, runtime: Runtime) -> None:
        """
        Raises:
            UserError: The address, the key or the library is missing.
        """
        check_server(runtime)
        assert model.model is not None
        self.model, self.runtime = model.model, runtime
        # request parameters beside the prompt
        self.wishes: dict[str, Any] = {"model": model.model, "temperature": 0, "max_tokens": model.max_tokens}

    def identity(self) -> str:
        return f"openai:{self.runtime.base_url}:{json.dumps(self.wishes)}"

    def prepare(self, example: str) -> None:
        """Send one prompt, which tests address, key and model name; not every server can list its models.

        Raises:
            JudgeUnavailable: It does not answer.
            UserError: It refuses every question.
        """
        self.ask([example])

    def ask(self, prompts: Sequence[str], keep: Keep = forget) -> list[str]:
        """
        Raises:
            JudgeUnavailable: Some questions are without an answer after all retries, or the time is over.
            UserError: The server refuses every question.
        """
        outcomes = asyncio.run(self._ask_all(prompts, keep)) if prompts else []
        failures = [answer for answer in outcomes if isinstance(answer, Failure)]
        answers = [None if isinstance(answer, Failure) else answer for answer in outcomes]
        if failures:
            where = f"{self.model} at {self.runtime.base_url}"
            raise JudgeUnavailable(
                f"{where} left {len(failures)} of {counted(len(prompts), 'question')} open: {failures[0].reason}",
                answers,
            )
        return [answer for answer in answers if answer is not None]

    async def _ask_all(self, prompts: Sequence[str], keep: Keep) -> list[str | Failure]:
        from openai import AsyncOpenAI

        slots = asyncio.Semaphore(self.runtime.concurrency)
        limit = self.runtime.total_timeout
        async with AsyncOpenAI(base_url=self.runtime.base_url, api_key=self.runtime.key(), max_retries=0) as client:
            # All prompts run as tasks; FIRST_EXCEPTION ends the wait early if the server refuses everything.
            tasks = [asyncio.create_task(self._question(client, slots, prompt, keep)) for prompt in prompts]
            done, late = await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        over = Failure(f"runtime.total_timeout={limit:g} seconds are over", again=False)
        for task in done:
            task.result()  # raises the UserError of a refusing server
        return [task.result() if task in done else over for task in tasks]

    async def _question(self, client: AsyncOpenAI, slots: asyncio.Semaphore, prompt: str, keep: Keep) -> str | Failure:
        """Send one prompt, and retry while that may help."""
        for attempt in range(self.runtime.retries + 1):
            async with slots:
                answer = await self._attempt(client, prompt)
            if isinstance(answer, str):
                keep(prompt, answer)
                return answer
            if not answer.again:
                return answer
            if attempt < self.runtime.retries:
                await asyncio.sleep(max(answer.wish, min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)))
        return answer

    async def _attempt(self, client: AsyncOpenAI, prompt: str) -> str | Failure:
        import openai

        try:
            async with asyncio.timeout(self.runtime.timeout):
                reply = await client.chat.completions.create(
                    messages=[{"role": "user", "content": prompt}], **self.wishes
                )
        except (TimeoutError, openai.APITimeoutError):
            return Failure(f"no answer within runtime.timeout={self.runtime.timeout:g} seconds", again=True)
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APIConnectionError as error:
            return Failure(f"no connection ({error.__cause__ or error})", again=True)
        except (openai.APIResponseValidationError, json.JSONDecodeError):
            return Failure("the reply is not what the protocol says", again=True)
        return _content(reply)

    def _refused(self, error: Any) -> Failure:
        """Interpret an HTTP status.

        Raises:
            UserError: The server will never answer: key, address or model name is wrong.
        """
        status, said = error.status_code, self._said(error.body)
        if status in REFUSED:
            raise UserError(
                f"the judge at {self.runtime.base_url} refuses {self.model} with HTTP {status}{said}; check"
                " judge.model, runtime.base_url and runtime.api_key_env"
            ) from error
        wish = error.response.headers.get("retry-after", "")
        seconds = min(LONGEST_WISH, float(wish)) if wish.isdecimal() else 0.0
        return Failure(f"HTTP {status}{said}", status in WORTH_ANOTHER_TRY or status >= 500, seconds)

    def _said(self, body: object) -> str:
        """Return the server's own error message if there is one, on one line and without the key."""
        message = body.get("message") if isinstance(body, Mapping) else None
        if not isinstance(message, str) or not message.strip():
            return ""
        if self.runtime.api_key_env:
            message = message.replace(self.runtime.key(), "***")
        return f" ({' '.join(neutral(message).split())[:LONGEST_QUOTE]})"


def _content(reply: Any) -> str | Failure:
    """Return the text of a reply. The library checks little: under status 200 a server may have sent anything."""
    choices = getattr(reply, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    message: Any = getattr(first, "message", None)
    if first is None or not hasattr(message, "content"):
        return Failure("the reply is not what the protocol says", again=True)
    if not isinstance(message.content, str):
        return ""  # a refusal, or an empty reply
    return uncut(message.content) if first.finish_reason == "length" else message.content
