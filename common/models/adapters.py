"""Add and load adapters: LoRA (arXiv 2106.09685) and a trainable copy of the projector."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from common.config.schema import LoraConfig
from common.models.families import Family
from common.models.files import ADAPTERS
from common.types import UserError


def without_adapters(model: Any) -> Any:
    """Return the `*ForConditionalGeneration` inside a PEFT model; its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def add(model: Any, lora: LoraConfig, family: type[Family]) -> Any:
    """Wrap the model with new adapters, which change nothing yet.

    They have no dropout: completions that share a prompt would share its dropout mask.

    Raises:
        UserError: The targets match no module, or the projector cannot be trained.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    targets: list[str] = []
    parameters: list[str] = []
    whole = None
    if lora.r > 0 and lora.targets is not None:
        targets = [lora.targets]
        # PEFT raises only if nothing matches at all, but the projector always does
        if lora.projector != "none" and not any(_fits(lora.targets, name) for name, _ in model.named_modules()):
            raise UserError(f"model.lora.targets={lora.targets} matches no module of the model")
    if lora.projector == "lora":
        linear, parameters = _matrices(model, family.projector)
        # one regular expression for all: PEFT takes either one or a list of names
        targets = [f"({one})" for one in [*targets, *linear]]
    elif lora.projector == "full":
        whole = [family.projector]
        _in_full_precision(model, family.projector)
    config = LoraConfig(
        r=max(lora.r, 1),  # PEFT requires r >= 1 even if only the projector is trained
        lora_alpha=lora.alpha,
        target_modules="|".join(targets) or ([] if parameters else DUMMY_TARGET_MODULES),
        target_parameters=parameters or None,
        modules_to_save=whole,
        lora_dropout=0.0,
        bias="none",
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"model.lora.targets={lora.targets}: {error}") from error
    model.disable_input_require_grads()  # see `vlm.load`
    return wrapped


def _fits(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"model.lora.targets={pattern} is no regular expression: {error}") from error


def _matrices(model: Any, name: str) -> tuple[list[str], list[str]]:
    """Return what LoRA can adapt in a module: linear layers as regular expressions, else names of bare matrices.

    Gemma 3's projector is such a bare parameter. Norms have no matrix and are not adapted.
    """
    from torch.nn import Linear

    module = model.get_submodule(name)
    linear = [re.escape(f"{name}.{part}") for part, layer in module.named_modules() if isinstance(layer, Linear)]
    return linear, [] if linear else [f"{name}.{part}" for part, value in module.named_parameters() if value.ndim == 2]


def _in_full_precision(model: Any, name: str) -> None:
    """Let a module of a bf16 model compute in fp32, like adapters: bf16 would round small updates away.

    Raises:
        UserError: Its weights are in 8 or 4 bits.
    """
    module = model.get_submodule(name)
    if any(not parameter.is_floating_point() for parameter in module.parameters()):
        raise UserError(
            f"model.lora.projector=full, but weights of {name} are in 8 or 4 bits (model.load_in_8bit, load_in_4bit),"
            " which cannot be trained; set model.lora.projector=lora"
        )
    # the rest of the model keeps its format, so inputs and outputs are cast at the border of the module
    outside = next(module.parameters()).dtype
    module.float()
    module.register_forward_pre_hook(_inwards, with_kwargs=True)
    module.register_forward_hook(partial(_outwards, outside))


def _inwards(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cast the input to the number format of the weights; merging turns them back into that of the model."""
    inside = next(module.parameters()).dtype
    return tuple(x.to(inside) for x in inputs), {name: x.to(inside) for name, x in named.items()}


def _outwards(outside: Any, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    return output.to(outside)


def restore(model: Any, folder: Path, merge: bool) -> Any:
    """Load the adapters of a folder onto the model that they were trained on.

    Args:
        model: Base of the adapters.
        folder: Folder that `save_pretrained` of a PEFT model wrote.
        merge: Add them to the weights and return a model without adapters, all of it trainable. False: wrap it.

    Raises:
        UserError: They do not fit the model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTERS[1], "pt") as file:
            written = set(file.keys())
        whole = PeftConfig.from_pretrained(str(folder)).modules_to_save or []
        for name in whole:
            _in_full_precision(model, name)
        wrapped: Any = PeftModel.from_pretrained(model, str(folder))
        wrapped.peft_config["default"].base_model_name_or_path = None  # else PEFT looks for the base on the hub
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the adapters in {folder} do not load: {' '.join(str(error).split())}") from error
    # PEFT only warns about names that differ, and leaves those adapters at their initial values
    if strange := sorted(written ^ get_peft_model_state_dict(wrapped).keys()):
        raise UserError(f"the adapters in {folder} do not fit their base, first: {strange[0]}")
    if not merge:
        return wrapped
    merged = wrapped.merge_and_unload().requires_grad_(True)
    for name in whole:
        merged.get_submodule(name).to(merged.dtype)
    merged.name_or_path = str(folder)  # PEFT writes it as the base of adapters that are trained next
    return merged


def name_base(folder: Path, path: str, commit: str) -> None:
    """Write id and commit of a hub model as the base of saved adapters, instead of a path on this machine.

    Do this after saving: given a hub id, PEFT would query the hub whenever it saves.
    """
    settings = folder / ADAPTERS[0]
    config = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": path, "revision": commit}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
