"""Checkpoints of whole detectors and segmentors: reads them safely, and keeps them as safetensors.

`torch.load(weights_only=True)`, PyTorch's default, reads mmengine's own, and mmengine reads safetensors.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import safetensors
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from svit.convert import CheckpointError, find_state_dict, is_finite, listing, load, read_state_dict, write_safetensors
from svit.models.svit import WEIGHTS

__all__ = [
    "allow_mmengine_checkpoints",
    "allow_safetensors",
    "find_checkpoint",
    "refuse_foreign_objects",
    "to_safetensors",
]


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


def allow_safetensors() -> None:
    """Lets mmengine load safetensors wherever it takes a checkpoint, by the end of the file's name."""
    CheckpointLoader.register_scheme(r"(?!https?://).*\.safetensors$", load_from_safetensors, force=True)


def load_from_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """What mmengine expects of a checkpoint: the weights and, under "meta", the classes if the file names them.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = Path(filename).expanduser()
    state_dict = {key: value.to(map_location) for key, value in read_state_dict(path).items()}
    with safetensors.safe_open(path, "pt") as file:
        found = json.loads((file.metadata() or {}).get("dataset_meta", "null"))
    if found and found.get("palette"):
        found["palette"] = [tuple(colour) for colour in found["palette"]]  # mmdet takes a list for several colours
    return {"state_dict": state_dict, "meta": {"dataset_meta": found} if found else {}}


def to_safetensors(checkpoint: str | Path, target: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Keeps the weights and the names of the classes of a checkpoint of mmengine, whole or not at all.

    Where the training kept a moving average of the weights (EMAHook), these are the weights.

    Args:
        checkpoint: the .pth file of a whole detector or segmentor.
        target: the .safetensors file. `svit mm-test` and `svit mm-infer`, and mmengine's `load_from`, read it.
        dtype: of the floating-point tensors.

    Raises:
        CheckpointError: the checkpoint cannot be read, a number is too large for `dtype`, or the target's name ends in
            another way.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise CheckpointError(f"target: expected a name that ends in .safetensors, got {target}")
    allow_mmengine_checkpoints()
    whole = load(Path(checkpoint))
    weights = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in find_state_dict(whole, Path(checkpoint)).items()
    }
    lost = [key for key, value in weights.items() if not is_finite(value)]
    if lost:
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{checkpoint}: not all numbers are finite as {kind}, those of {listing(lost)}")
    meta = whole.get("meta", {}).get("dataset_meta", {})
    write_safetensors(target, weights, {"dataset_meta": json.dumps(meta)})


def find_checkpoint(name: str) -> str:
    """`name` itself if it is a file or address; else the file of that name among those that come with the package.

    A name that is neither comes back as it is: whoever loads the file says that there is none.
    """
    ours = WEIGHTS / f"{name}.safetensors"
    return str(ours) if not Path(name).exists() and Path(name).name == name and ours.is_file() else name


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
