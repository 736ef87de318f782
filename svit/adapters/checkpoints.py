"""Lets `torch.load(weights_only=True)`, PyTorch's default, read mmengine's checkpoints."""

import os
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

__all__ = ["allow_mmengine_checkpoints", "refuse_foreign_objects"]


def allow_mmengine_checkpoints() -> None:
    """Lets `torch.load` read the history of logged values in a Runner's checkpoint.

    It allows mmengine's HistoryBuffer and the parts of numeric NumPy arrays, which are plain data, and nothing that
    could execute code. Without it, loading and resuming fail from PyTorch 2.6 on. A history refers to its own methods
    by `getattr`; `method_of_history` replaces that.
    """
    HistoryBuffer()  # the first instance registers the statistics
    core = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]  # of NumPy 1
    kinds = {type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64)}
    arrays = [np.ndarray, np.dtype, core._reconstruct, core.scalar, *kinds]
    torch.serialization.add_safe_globals([HistoryBuffer, (method_of_history, "builtins.getattr"), *arrays])


def refuse_foreign_objects() -> None:
    """Forces `weights_only=True` on every `torch.load` of this process. Our commands call it.

    If such a load refuses a file, the maintained fork of mmengine loads it again without this protection.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def method_of_history(owner: Any, name: str) -> Callable[..., Any]:
    """`getattr` that returns statistics of HistoryBuffer only."""
    if owner is not HistoryBuffer or name not in HistoryBuffer._statistics_methods:
        raise UnpicklingError(f"expected a statistic of HistoryBuffer, got {name!r} of {owner!r}")
    return getattr(owner, name)
