"""Load files of `torch.save` that may come from others: only tensors and plain values, no pickled code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from common.types import UserError

# What an array needs to be unpickled, beyond PyTorch's own types: the state of NumPy's generator contains one.
ARRAY: tuple[Any, ...] = (np.empty(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32)))


def load(path: Path, device: torch.device | str = "cpu", also: Sequence[Any] = (), mmap: bool = False) -> Any:
    """Load a file.

    Args:
        path: The file.
        device: Device to load tensors to.
        also: Other classes allowed in the file. Creating them must run no other code.
        mmap: Map the file: a tensor is read only when it is used.

    Raises:
        UserError: The file is missing or damaged, or holds something else, whose loading could run code.
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
    """Check a DeepSpeed checkpoint, since DeepSpeed itself loads any pickle there. No tensor is read.

    Raises:
        UserError: A file cannot be loaded safely; names it.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    for path in sorted(folder.rglob("*.pt")):
        load(path, also=(LossScaler, ZeroStageEnum, fragment_address), mmap=True)
