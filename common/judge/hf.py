"""`backend: hf`: a second model, loaded beside the run's model, prompted with text only and decoded greedily.

It is downloaded and loaded on the run's device before the run computes anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from common.judge.base import Keep, Model, Runtime, forget
from common.judge.text import uncut
from common.types import UserError

log = logging.getLogger(__name__)


class Checkpoint:
    """Judge with a language model from a folder or the hub."""

    def __init__(self, model: Model, runtime: Runtime) -> None:
        """
        Raises:
            UserError: The folder is missing or damaged, or holds no whole model.
        """
        assert model.model is not None
        self.name, self.model, self.runtime = model.model, model, runtime
        if Path(self.name).expanduser().is_dir():
            self._check(Path(self.name).expanduser())
        elif self.name.startswith((".", "/", "~")) or self.name.count("/") != 1:
            raise UserError(f"judge.model={self.name} is not a folder; give a model folder or a hub id owner/name")

    def prepare(self, example: str) -> None:
        """Download and load the model; nothing is asked.

        Raises:
            UserError: It cannot be had, is damaged, is no whole model, or has no chat template.
        """
        tokenizer, model = self._tokenizer, self._model
        log.info("the judge is %s (%s)", tokenizer.name_or_path, type(model).__name__)

    def _check(self, folder: Path) -> None:
        from common.models.files import ADAPTERS, check_folder

        check_folder(folder)
        if (folder / ADAPTERS[0]).is_file():
            raise UserError(f"judge.model={self.name} holds adapters; give a model with whole weights")

    @cached_property
    def _folder(self) -> Path:
        from common.models.files import find

        folder = find(self.name, self.model.revision, key="judge.model")
        self._check(folder)
        return folder

    @cached_property
    def _identity(self) -> str:
        from common.models.files import weights_hash

        return f"hf:{weights_hash(self._folder)}:{self.model.dtype}:{self.model.max_tokens}"

    def identity(self) -> str:
        return self._identity

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        from common.models.vlm import loaded

        tokenizer = loaded(AutoTokenizer, self._folder, f"judge.model={self.name}", padding_side="left")
        if not tokenizer.chat_template:
            raise UserError(f"judge.model={self.name} has no chat template; give an instruction-tuned model")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

        from common.models.vlm import DTYPES, loaded, whole

        name = f"judge.model={self.name}"
        sees = hasattr(loaded(AutoConfig, self._folder, name), "vision_config")
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = whole(kind, self._folder, name, dtype=DTYPES[self.model.dtype])
        # Plain greedy decoding, without the model's own generation settings such as a repetition penalty.
        model.generation_config = GenerationConfig(
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
            do_sample=False,
            max_new_tokens=self.model.max_tokens,
        )
        device = torch.device("cuda", torch.cuda.current_device()) if self.runtime.gpus else torch.device("cpu")
        return model.to(device).eval().requires_grad_(False)

    def ask(self, prompts: Sequence[str], keep: Keep = forget) -> list[str]:
        """Generate in batches. Shapes: B prompts of a forward, left-padded to P tokens; up to max_tokens new ones."""
        answers: list[str] = []
        for start in range(0, len(prompts), self.runtime.batch_size):
            part = prompts[start : start + self.runtime.batch_size]
            replies = self._replies(part)
            for prompt, reply in zip(part, replies, strict=True):
                keep(prompt, reply)
            answers += replies
        return answers

    def _replies(self, prompts: Sequence[str]) -> list[str]:
        import torch

        tokenizer, model = self._tokenizer, self._model
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # add_special_tokens=False: the chat template has already written the beginning-of-sequence token.
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False).to(model.device)
        with torch.no_grad():
            ids = model.generate(**batch)[:, batch["input_ids"].shape[1] :]  # [B, new]
        ends = model.generation_config.eos_token_id
        last = set(ends) if isinstance(ends, list) else {ends}
        replies = []
        for row in ids.tolist():
            # without an end token the reply was truncated: drop its last word, which may be half a number
            text = tokenizer.decode(row, skip_special_tokens=True)
            replies.append(text if last & set(row) else uncut(text))
        return replies
