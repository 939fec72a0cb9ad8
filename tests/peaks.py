"""Memory that a forward, a backward and an optimizer step really take, in a process of its own.

    python -m tests.peaks '{"folder": ..., "lora": 0, "checkpointing": false, "dtype": "float32", "stage": null}'

Prints MiB: without `stage` those of a forward and of forward and backward, beside weights and gradients; with it those
of the process while an engine of that ZeRO stage goes backward and while it steps, beside what it held before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from unittest import mock

import torch

from benchmarks.grpo_step import _status as status
from common.config.schema import LoraConfig, ModelConfig, TrainerConfig
from common.cost.update import _drop_gradient
from common.forward import attention
from common.forward.logprobs import PolicyScorer, head_rows
from common.forward.packing import PromptGroup, pack_shared
from common.models import vlm
from common.models.encoder import PromptEncoder
from common.runtime.group import init_process_group
from common.training.engine import Engine
from common.types import Prompt

SIZE, WORDS, COMPLETION, GROUP = 168, 300, 100, 4
# as on a GPU, where AdamW steps all weights together and needs room for that
TRAINER = TrainerConfig(name="sft", learning_rate=1e-3, epochs=1.0, optimizer_options={"foreach": True})


def config_of(case):
    """The model's part of a run."""
    lora = case["lora"]
    return ModelConfig(
        name="wide",
        path=case.get("folder", "unused"),
        family=case["family"],
        image_size=SIZE,
        dtype=case["dtype"],
        gradient_checkpointing=case["checkpointing"],
        lora=LoraConfig(r=lora),
        freeze_vision=lora > 0,
        attention=case.get("attention", "copy"),
    )


def row(policy):
    """A group in the shared layout."""
    from PIL import Image

    def black(keys):
        return [Image.new("RGB", (SIZE, SIZE)) for _ in keys]

    (prompt,) = PromptEncoder(policy, black, None)([Prompt("0", "the " * WORDS, "")])
    group = PromptGroup(prompt, (torch.full((COMPLETION,), policy.eos[0]),) * GROUP)
    return pack_shared([group], policy.family, torch.device("cpu"))


def deepspeed(stage):
    """With a bucket that is touched whole: pages that nobody writes to are no memory here, on a GPU they are."""
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}}


def rise(call, base=None):
    """MiB by which a call raises the resident memory at its highest."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS") if base is None else base
    call()
    return status("VmHWM") - before


def main(case):
    torch.set_num_threads(1)
    policy = vlm.load(Path(case["folder"]), config_of(case), torch.device("cpu"))
    attention.install(policy.model, case["attention"])
    scorer = PolicyScorer(policy, 1.0, head_rows(policy.model)).train()
    packed = row(policy)
    weights = sum(p.nbytes for p in scorer.parameters()) / 2**20

    def score():
        with torch.no_grad():
            scorer(packed, False)

    def train():
        logps, _ = scorer(packed)
        logps.sum().backward()

    if case["stage"] is None:
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        score()  # libraries take their own memory once
        return rise(score), rise(train)
    init_process_group(gpus=0)
    score()  # weights of a file in their own format are no memory here before they are read
    base = status("VmRSS") - weights
    engine = Engine(scorer, TRAINER, deepspeed(case["stage"]), 3)

    def twice():
        for last in (False, True):
            logps, _ = engine(packed)
            engine.backward(logps.sum(), last)

    found = []
    for update in range(2):  # AdamW makes its states in the first step
        found = [rise(twice, base), rise(lambda: engine.step(update), base)]  # noqa: B023
    return found


if __name__ == "__main__":
    plain = attention.masked_attention
    # keys copied for all heads, as on a GPU; on the CPU they are not
    with mock.patch.object(attention, "masked_attention", lambda *arguments: plain(*arguments[:-1], False)):
        print(json.dumps(main(json.loads(sys.argv[1]))))
