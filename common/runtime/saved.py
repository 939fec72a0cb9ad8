"""Files of `torch.save` in a folder that may be somebody else's: tensors and plain values alone, no pickled code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from common.types import UserError

# What pickles an array of numbers: beside PyTorch's own kinds the generators of NumPy are kept as one.
ARRAY: tuple[Any, ...] = (np.empty(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32)))


def load(path: Path, device: torch.device | str = "cpu", also: Sequence[Any] = (), mmap: bool = False) -> Any:
    """What a file holds.

    Args:
        path: The file.
        device: Of its tensors.
        also: Classes of other libraries that may be in it. Making them must run nothing else.
        mmap: Read no tensor before it is used.

    Raises:
        UserError: It is missing or damaged, or something else is in it, which loading would run.
    """
    try:
        with torch.serialization.safe_globals([*ARRAY, *also]):
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        raise UserError(
            f"{path} holds more than tensors and plain values ({' '.join(reason.split())[:120]}); loading it could run"
            " foreign code, so it is not loaded: this version did not write it, take the folder of a run that you trust"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:120]})") from error


def check_deepspeed(folder: Path) -> None:
    """Refuse a checkpoint of DeepSpeed, which itself loads whatever is pickled there. No tensor is read.

    Raises:
        UserError: Names the file.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    for path in sorted(folder.rglob("*.pt")):
        load(path, also=(LossScaler, ZeroStageEnum, fragment_address), mmap=True)
