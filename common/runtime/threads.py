"""How CPU threads divide and wait for work, so that the same command rounds alike whatever else the machine does.

Libraries read these variables once, when they are loaded.
"""

from __future__ import annotations

import os


def settle() -> None:
    """Set them; call it before torch or NumPy is imported. Ranks inherit them."""
    # threads that spin while they wait slow two runs on one machine down thirty times (docs/log.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # a sum that fewer threads share rounds otherwise: always as many as there may be
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")
    os.environ["OMP_DYNAMIC"] = "FALSE"  # with TRUE, gradients of PyTorch's kernels are not finite
