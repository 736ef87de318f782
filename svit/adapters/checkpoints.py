"""mmengine's checkpoints under `torch.load(weights_only=True)`, PyTorch's default."""

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

__all__ = ["allow_mmengine_checkpoints"]


def allow_mmengine_checkpoints() -> None:
    """Lets `torch.load` build what a Runner's checkpoint holds beside tensors: its history of the logged values.

    That is mmengine's HistoryBuffer and the parts of NumPy arrays of numbers, all plain data. Without it, loading or
    resuming fails with PyTorch from 2.6 on; nothing that could execute code is allowed.
    """
    core = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    kinds = {type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64)}
    torch.serialization.add_safe_globals(
        [HistoryBuffer, np.ndarray, np.dtype, core._reconstruct, core.scalar, *sorted(kinds, key=lambda k: k.__name__)]
    )
