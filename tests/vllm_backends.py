"""vLLM backends that remember, and backends that break."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch

from common.rollout.vllm.backend import VLLMRollout


class Replaying(VLLMRollout):
    """Samples as it should, and answers with what another run has sampled for the same seeds, if there is one."""

    def __init__(self, vlm, *, samples, **options):
        super().__init__(vlm, **options)
        self.samples = Path(samples)
        self.samples.mkdir(exist_ok=True)

    def generate(self, requests, group_size, decoding):
        groups = super().generate(requests, group_size, decoding)
        if decoding.temperature == 0:
            return groups
        found = []
        for request, group in zip(requests, groups, strict=True):
            path = self.samples / hashlib.sha256(request.seed.encode()).hexdigest()
            if not path.is_file():
                torch.save([(c.ids, c.logps, c.text, c.truncated) for c in group], path)
            known = torch.load(path)
            found.append(
                [
                    replace(c, ids=ids, logps=logps, text=text, truncated=truncated)
                    for c, (ids, logps, text, truncated) in zip(group, known, strict=True)
                ]
            )
        return found


class Failing(VLLMRollout):
    """Breaks once, while it samples for the update after `at` others: `raise`, `hang` or `die`."""

    def __init__(self, vlm, *, how, at, marker, **options):
        super().__init__(vlm, **options)
        self.how, self.at, self.marker = how, at, Path(marker)
        inner = self.engine.llm.generate

        def generate(*arguments, **named):
            if self.version == self.at and not self.marker.exists():
                self.marker.touch()
                if self.how == "raise":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
                if self.how == "hang":
                    time.sleep(600)
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*arguments, **named)

        self.engine.llm.generate = generate
