"""Ends a process that hangs in code which no exception can reach, and says so."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from common.types import UserError

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
                " short, with smaller rollout.options.memory, sequences or cpu_gib. run.log has the whole error"
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
