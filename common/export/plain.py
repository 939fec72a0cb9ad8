"""A trained model as plain files, which transformers and vLLM load and which answer as the run's own model does."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from common.models.vlm import VLM
from common.rollout.vllm.weights import hub_name


def merged(policy: VLM) -> VLM:
    """The model without adapters: what they add is in its weights for good."""
    model = policy.model
    return replace(policy, model=model.merge_and_unload()) if hasattr(model, "merge_and_unload") else policy


def save(policy: VLM, folder: Path, never: Collection[int], max_tokens: int) -> None:
    """Write a model and its processor.

    Args:
        policy: Without adapters.
        folder: Is made.
        never: Token ids that it never says.
        max_tokens: Of a reply, at most.
    """
    generation = policy.model.generation_config
    generation.suppress_tokens = sorted(never)
    generation.max_new_tokens = max_tokens
    generation.do_sample = False
    generation.temperature = generation.top_k = generation.top_p = None
    policy.model.save_pretrained(folder)
    as_on_the_hub(folder)
    policy.processor.save_pretrained(folder)


def as_on_the_hub(folder: Path) -> None:
    """Give the weights in a folder the names that they have on the hub; vLLM knows no others (Gemma's vision tower)."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {hub_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            changed, facts = set(tensors) != set(file.keys()), file.metadata()
        if changed:
            save_file(tensors, path, metadata=facts)
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {hub_name(name): where for name, where in index["weight_map"].items()}
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")
