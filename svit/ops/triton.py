"""The Triton backend: any GPU that Triton serves. For tests, TRITON_INTERPRET=1 in the environment adds the CPU.

This module says what the backend serves. The operators' folders have the kernels and their launches.
"""

import functools
import hashlib
import importlib
import marshal
import os
from pathlib import Path

import torch

from . import _dispatch

try:
    import triton

    available, version = True, f"triton {triton.__version__}"
except ImportError as error:  # no Triton for macOS, Windows, and PyTorch builds without GPU support
    available, version = False, f"no triton: {error}"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton's interpreter computes bfloat16 wrongly. The tests correct that and add the dtype.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)

# Bytes of a pixel. A program of a super-token op holds 16 pixels and 16 super tokens in registers and shared memory.
MAX_BYTES = 2048
ANY_CHANNELS = ("depthwise3x3", "depthwise3x3_backward", "bias_gelu_affine")


def usable(op: str, x: torch.Tensor) -> tuple[bool, str]:
    """Whether this backend serves `op` on the map x (B, H, W, C), and if not, why."""
    if not available:
        return False, version
    if not INTERPRETED and x.device.type != "cuda":
        return False, f"x is on {x.device.type}, it runs on GPUs"
    if x.dtype not in DTYPES:
        return False, f"it computes in {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not in {x.dtype}"
    C = x.shape[-1]
    if C % 8 or C == 0:
        return False, f"it needs a multiple of 8 channels, not {C}"
    if C * x.element_size() > MAX_BYTES and op not in ANY_CHANNELS:
        return False, f"it serves up to {MAX_BYTES // x.element_size()} channels in {x.dtype}, not {C}"
    # While a model is compiled or exported, x may be a fake tensor on a GPU that does not exist.
    if INTERPRETED or torch.version.hip is not None or not torch.cuda.is_available():
        return True, ""
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return False, "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or higher"
    return True, ""


def implement(module: str, *ops: str) -> None:
    """Adds `launch_<op>` of an operator's module to this backend for each op. Without Triton it adds the names only."""
    kernels = importlib.import_module(module) if available else None
    BACKEND.implement(**{op: getattr(kernels, f"launch_{op}", None) for op in ops})


@functools.cache
def build() -> str:
    """Triton's version and a digest of the kernels, as they are in memory, and of their launches."""
    digest = hashlib.sha256()
    modules = [vars(importlib.import_module("._kernels", __package__))]
    modules += [getattr(BACKEND, op).__globals__ for op in BACKEND.OPS]
    for module in {m["__file__"]: m for m in modules}.values():
        digest.update(Path(module["__file__"]).read_bytes())
        for name, kernel in sorted(module.items()):
            if hasattr(kernel, "fn"):
                digest.update(name.encode() + marshal.dumps(kernel.fn.__code__))
    return f"{version}, kernels {digest.hexdigest()[:16]}"


def fingerprint(device: torch.device) -> str:
    """Identifies the kernels and the device: a verdict of the self-check holds for these."""
    if device.type != "cuda":
        return f"{build()}, interpreted"
    properties = torch.cuda.get_device_properties(device)
    architecture = getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}"
    return f"{build()}, {architecture}"


BACKEND = _dispatch.add_backend("triton", usable, fingerprint)
