"""mmengine's checkpoints under `torch.load(weights_only=True)`, PyTorch's default."""

import os
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

__all__ = ["allow_mmengine_checkpoints", "refuse_foreign_objects"]


def allow_mmengine_checkpoints() -> None:
    """Lets `torch.load` build what a Runner's checkpoint holds beside tensors: its history of the logged values.

    That is mmengine's HistoryBuffer and the parts of NumPy arrays of numbers, all plain data. Without it, loading or
    resuming fails with PyTorch from 2.6 on; nothing that could execute code is allowed. A history names its own
    methods, which takes a `getattr`: `method_of_history` stands in for it.
    """
    HistoryBuffer()  # the first one sets up which statistics there are
    core = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]  # of NumPy 1
    kinds = {type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64)}
    arrays = [np.ndarray, np.dtype, core._reconstruct, core.scalar, *kinds]
    torch.serialization.add_safe_globals([HistoryBuffer, (method_of_history, "builtins.getattr"), *arrays])


def refuse_foreign_objects() -> None:
    """Makes every `torch.load` of this process a `weights_only=True`, for programs of our own.

    The maintained fork of mmengine reads a file that such a load refuses once more, and executes what it holds.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def method_of_history(owner: Any, name: str) -> Callable[..., Any]:
    """`getattr` for the statistics of HistoryBuffer and nothing else."""
    if owner is not HistoryBuffer or name not in HistoryBuffer._statistics_methods:
        raise UnpicklingError(f"expected a statistic of HistoryBuffer, got {name!r} of {owner!r}")
    return getattr(owner, name)
