"""LoRA adapters (arXiv 2106.09685): new ones, and those that a run has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.models.files import ADAPTERS
from common.schema import Lora
from common.types import UserError


def add(model: Any, lora: Lora) -> Any:
    """Wrap the model with adapters that change nothing yet, without dropout, which shared prefixes do not allow.

    Raises:
        UserError: The targets match no module.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, bias="none")
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"model.lora.targets={lora.targets}: {error}") from error
    if getattr(model, "is_gradient_checkpointing", False):
        wrapped.enable_input_require_grads()
    return wrapped


def restore(model: Any, folder: Path, merge: bool) -> Any:
    """Put the adapters of a folder on the model that they were trained on.

    Args:
        model: Their base.
        folder: As `save_pretrained` of a PEFT model wrote it.
        merge: Add them to the weights; the model is then one without adapters, all of it trainable. False: wrap it.

    Raises:
        UserError: They do not fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTERS[1], "pt") as file:
            written = set(file.keys())
        wrapped: Any = PeftModel.from_pretrained(model, str(folder))
        wrapped.peft_config["default"].base_model_name_or_path = None  # else PEFT looks for the base on the hub
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the adapters in {folder} do not load: {' '.join(str(error).split())}") from error
    # PEFT only warns, and leaves the others as if they had not been trained
    if strange := sorted(written ^ get_peft_model_state_dict(wrapped).keys()):
        raise UserError(f"the adapters in {folder} do not fit their base, first: {strange[0]}")
    if not merge:
        return wrapped
    merged = wrapped.merge_and_unload().requires_grad_(True)
    merged.name_or_path = str(folder)  # adapters trained on top belong on this folder, not on the first base alone
    return merged


def name_base(folder: Path, path: str, commit: str) -> None:
    """Let written adapters say which checkpoint of the hub they belong on, instead of where this machine keeps it.

    Not before: PEFT would ask the hub for it whenever it writes.
    """
    settings = folder / ADAPTERS[0]
    found = json.loads(settings.read_text()) | {"base_model_name_or_path": path, "revision": commit}
    settings.write_text(json.dumps(found, indent=2, sort_keys=True))
