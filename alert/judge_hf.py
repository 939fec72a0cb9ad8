"""`backend: hf`: another checkpoint, loaded beside the run's model and asked in text only, greedily.

It is loaded when the first question comes, on the run's device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from alert.judge_base import Model, Runtime
from alert.judge_prompt import uncut
from common.types import UserError


class Checkpoint:
    """A language model from a folder or the hub."""

    def __init__(self, model: Model, runtime: Runtime) -> None:
        """
        Raises:
            UserError: The folder is missing or damaged.
        """
        assert model.model is not None
        self.name, self.model, self.runtime = model.model, model, runtime
        self.folder = Path(self.name).expanduser()
        if self.folder.is_dir():
            from common.models.files import check_folder

            check_folder(self.folder)
        elif self.name.startswith((".", "/", "~")) or self.name.count("/") != 1:
            raise UserError(f"judge.model={self.name} is not a folder; give a checkpoint folder or a hub id owner/name")

    @cached_property
    def _identity(self) -> str:
        from common.models.files import checkpoint_hash

        local = self.folder.is_dir()
        weights = checkpoint_hash(self.folder) if local else f"{self.name}@{self.model.revision or 'main'}"
        return f"hf:{weights}:{self.model.dtype}:{self.model.max_tokens}"

    def identity(self) -> str:
        return self._identity

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Tokenizer and model.

        Raises:
            UserError: The checkpoint does not load, or has no chat template.
        """
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoTokenizer,
            GenerationConfig,
        )

        where: dict[str, Any] = {"revision": self.model.revision}
        name = str(self.folder) if self.folder.is_dir() else self.name
        device = torch.device("cuda", torch.cuda.current_device()) if self.runtime.gpus else torch.device("cpu")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **where)
            sees = hasattr(AutoConfig.from_pretrained(name, **where), "vision_config")
            kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            model = kind.from_pretrained(name, dtype=getattr(torch, self.model.dtype), **where)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"judge.model={name} does not load: {' '.join(str(error).split())}") from error
        if not tokenizer.chat_template:
            raise UserError(f"judge.model={name} has no chat template; give an instruction-tuned checkpoint")
        # without the checkpoint's own wishes, such as a repetition penalty: the most probable reply
        model.generation_config = GenerationConfig(
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
            max_new_tokens=self.model.max_tokens,
        )
        return tokenizer, model.to(device).eval().requires_grad_(False)

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """Shapes: B prompts of a forward, padded on the left to P tokens; up to max_tokens new ones."""
        size = self.runtime.batch_size
        return [reply for i in range(0, len(prompts), size) for reply in self._replies(prompts[i : i + size])]

    def _replies(self, prompts: Sequence[str]) -> list[str]:
        import torch

        tokenizer, model = self._loaded
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # the template has already written what begins a conversation
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False).to(model.device)
        with torch.no_grad():
            ids = model.generate(**batch)[:, batch["input_ids"].shape[1] :]  # [B, new]
        ends = model.generation_config.eos_token_id
        last = set(ends) if isinstance(ends, list) else {ends}
        found = []
        for row in ids.tolist():
            text = tokenizer.decode(row, skip_special_tokens=True)
            found.append(text if last & set(row) else uncut(text))
        return found
