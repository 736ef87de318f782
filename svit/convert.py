"""Converts checkpoints from the authors' layout to ours and back.

The authors' `.pth` files hold weights under "model" and their moving average under "model_ema". The published top-1 is
that of "model". If a file holds both, timm's `checkpoint_path=` takes "model_ema". So convert first: a converted file
holds the weights that you choose, and nothing else.
"""

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from torch.utils._pytree import tree_leaves

from svit.errors import InputError
from svit.files import atomic_write, check_utf8
from svit.models.original import MARK, ONE_HOT, from_original, is_original, to_original

__all__ = ["MODELS", "CheckpointError", "convert"]

MODELS = timm.list_models(module="svit")
"""Names of this package's models in timm."""

# Our name for `MARK`: a key that all our models have.
OUR_MARK = "stem.layers.0.weight"

StateDict = dict[str, torch.Tensor]

# Not those of 8 bits and fewer.
WITH_ISFINITE = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)


class CheckpointError(InputError):
    """A checkpoint cannot be converted. The message names the file and what is wrong with it."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    model: str | None = None,
    num_classes: int = 1000,
    ema: bool = False,
) -> str:
    """Converts a checkpoint from the authors' layout to ours, or back. The keys of `source` decide the direction.

    Every tensor keeps its bits and its dtype. The one-hot kernels of the authors' layout are constants: the conversion
    to our layout drops them, the conversion back adds them. Nothing that a file holds is executed.

    Args:
        source: `.safetensors`, or a file of `torch.save` with the weights under "model" (as the authors'), under
            "state_dict" (as timm's), or bare.
        target: ends in `.safetensors` for our layout and in `.pth` for the authors' (weights under "model"). An
            existing file is replaced when the new one is complete.
        model: name of the model, None to find the one that fits.
        num_classes: classes of the head, 0 for none.
        ema: take "model_ema" (timm's: "state_dict_ema") instead of "model".

    Returns:
        The name of the model.

    Raises:
        CheckpointError: `source` cannot be read or does not fit, an argument is out of range, or `target` cannot be
            written. An existing `target` stays as it was.
    """
    source, target = Path(source), Path(target)
    if model is not None and model not in MODELS:
        raise CheckpointError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file")
    if target.exists() and target.samefile(source):
        raise CheckpointError(f"{target}: source and target are the same file")

    state_dict = read_state_dict(source, ema)
    original = is_original(state_dict)
    if not original and OUR_MARK not in state_dict:
        raise CheckpointError(f"{source}: holds no SViT: neither {MARK!r} nor {OUR_MARK!r} is among its keys")
    suffix = ".safetensors" if original else ".pth"
    if target.suffix != suffix:
        layout = "the authors' key names" if original else "our key names"
        raise CheckpointError(f"{target}: expected a name that ends in {suffix}, since {source} has {layout}")
    name = find_model(source, state_dict, original, model, num_classes)

    write_state_dict(target, from_original(state_dict) if original else to_original(state_dict))
    return name


def read_state_dict(source: Path, ema: bool = False) -> StateDict:
    """The weights in a file, without the prefixes of DistributedDataParallel and torch.compile."""
    return find_state_dict(load(source), source, ema)


def find_state_dict(checkpoint: Any, source: Path, ema: bool = False) -> StateDict:
    """The same in what `load` has read from `source`, which the messages name."""
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{source}: expected a dict, found {type(checkpoint).__name__}")
    entries = ("model_ema", "state_dict_ema") if ema else ("model", "state_dict")
    entry = next((e for e in entries if e in checkpoint), None)
    if entry is not None:
        state_dict = checkpoint[entry]
        if not isinstance(state_dict, dict):
            raise CheckpointError(f"{source}: expected a dict under {entry!r}, found {type(state_dict).__name__}")
    elif not ema and any(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        state_dict = checkpoint
    else:
        raise CheckpointError(f"{source}: no entry {entries[0]!r}; it has {listing(checkpoint)}")

    foreign = [k for k, v in state_dict.items() if not isinstance(k, str) or not is_plain(v)]
    if foreign:
        raise CheckpointError(f"{source}: its state dict holds what is no plain tensor: {listing(foreign)}")
    cleaned = clean_state_dict(state_dict)
    if len(cleaned) < len(state_dict):
        raise CheckpointError(f"{source}: the same keys with and without a prefix such as 'module.'")
    return cleaned


def load(source: Path) -> Any:
    """The content of a file, with tensors on the CPU. Foreign Python objects are refused."""
    if source.suffix == ".safetensors":
        check_utf8(str(source), str(source))
    try:
        if source.suffix == ".safetensors":
            return safetensors.torch.load_file(source)
        with torch.serialization.safe_globals([Namespace]):  # the type of the authors' "args"
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly any exception
        foreign = unsafe_globals(source)
        if foreign:
            what = f"holds Python objects other than tensors, which are not loaded: {listing(foreign)}"
        else:
            kind = type(error).__name__
            what = f"cannot be read ({kind}); it is damaged, cut short or no checkpoint that holds tensors alone"
        raise CheckpointError(f"{source}: {what}") from error


def unsafe_globals(source: Path) -> list[str]:
    """Names of the foreign classes and functions in a file of `torch.save`. [] if they cannot be read."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except Exception:  # no zip archive, or a damaged one
        return []


def is_plain(value: Any) -> bool:
    """Whether both kinds of file can hold `value`."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def find_model(source: Path, state_dict: StateDict, original: bool, model: str | None, num_classes: int) -> str:
    """The name of the model that `state_dict` fits exactly: `model`, or any model if that is None."""
    head = ("head.weight", "head.bias") if original else ("head.fc.weight", "head.fc.bias")
    # With the file's own number of classes, so that only the head's size does not fit if that is wrong.
    classes = next((len(state_dict[k]) for k in head if k in state_dict and state_dict[k].ndim), num_classes)

    found = {}
    for name in [model] if model else MODELS:
        expected = timm.create_model(name, num_classes=classes, device="meta").state_dict()
        found[name] = differences(state_dict, to_original(expected) if original else expected)
    name = min(found, key=lambda n: sum(map(len, found[n].values())))
    problems = summary(found[name])
    if problems:
        which = f"does not fit {name}" if model else f"fits no model, {name} best"
        raise CheckpointError(f"{source}: {which}; {problems}")
    if classes != num_classes:
        raise CheckpointError(
            f"{source}: {name} with {classes} classes, expected {num_classes}; --num-classes {classes} takes it"
        )
    return name


def differences(state_dict: StateDict, expected: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """The differences that prevent loading `state_dict` in place of `expected`, by kind.

    BatchNorms may lack their counters, if nothing else is missing, as timm's frozen ones do. PyTorch loads the rest.
    """
    shared = [k for k in expected if k in state_dict]
    missing = [k for k in expected if k not in state_dict]
    return {
        "missing keys": [] if all(k.endswith("num_batches_tracked") for k in missing) else missing,
        "unexpected keys": [k for k in state_dict if k not in expected],
        "other shapes": [
            f"{k}: {list(state_dict[k].shape)}, expected {list(expected[k].shape)}"
            for k in shared
            if state_dict[k].shape != expected[k].shape
        ],
        # Rounded: a moving average of the constants drifts by round-off.
        "kernels that are not one-hot": [
            k
            for k in shared
            if k.endswith(ONE_HOT)
            and state_dict[k].shape == expected[k].shape
            and not torch.equal(state_dict[k].float().round(), expected[k])
        ],
    }


def summary(found: Mapping[str, Sequence[str]]) -> str:
    """The result of `differences` as text: the number of each kind and the first few. '' for none."""
    return "; ".join(f"{kind}: {len(keys)} ({listing(keys, 3)})" for kind, keys in found.items() if keys)


def listing(names: Sequence[Any] | Mapping[Any, Any], limit: int = 6) -> str:
    """The first few of `names` as text."""
    names = [str(name) for name in names]
    more = [f"{len(names) - limit} more"] if len(names) > limit else []
    return ", ".join(names[:limit] + more) or "nothing"


def is_finite(tensors: Any) -> bool:
    """Whether all numbers in nested dicts and lists of tensors are finite. Of shards it checks this process's."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)]
    floating = [t for t in local if t.is_floating_point() or t.is_complex()]
    floating = [t if t.dtype in WITH_ISFINITE else t.float() for t in floating]
    if not floating:
        return True
    # One result, computed on a GPU if any tensor is there, so that the CPU waits once.
    device = max((t.device for t in floating), key=lambda device: device.type != "cpu")
    return bool(torch.stack([t.isfinite().all().to(device) for t in floating]).all())


def check_finite(source: str | Path, state_dict: StateDict) -> None:
    """A model with weights that are not finite would give some result, and no error.

    Raises:
        CheckpointError: not all numbers in what was read from `source` are finite.
    """
    lost = [key for key, value in state_dict.items() if not is_finite(value)]
    if lost:
        raise CheckpointError(f"checkpoint: {source} holds numbers that are not finite, in {listing(lost)}")


def write_safetensors(
    target: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes tensors and text about them, whole or not at all."""
    with atomic_write(target) as part:
        # Not `save_file`, which makes a file that only its owner can read.
        part.write_bytes(safetensors.torch.save(standalone(tensors), {"format": "pt", **metadata}))


def standalone(tensors: Mapping[str, torch.Tensor]) -> StateDict:
    """Copies of tensors on the CPU, contiguous, none in another's memory.

    Safetensors takes no others, and torch.save would write the full storage of a slice.
    """
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}


def write_state_dict(target: Path, state_dict: StateDict) -> None:
    """Writes a state dict in the format of `target`'s suffix, whole or not at all."""
    try:
        if target.suffix == ".safetensors":
            write_safetensors(target, state_dict)
        else:
            with atomic_write(target) as part:
                torch.save({"model": standalone(state_dict)}, part)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise CheckpointError(f"{target}: cannot be written ({error})") from error
