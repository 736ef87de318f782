"""Functions without parameters: super-token sampling and upsampling, the residual depthwise convolution, and the two
half-blocks.

Each operator has a folder: README.md holds the maths, __init__.py the public functions and the checks of their
arguments, reference.py the PyTorch form that the others are tested against. Beside them stand the kernels,
registration.py (`torch.ops.svit`) and self_check.py. `_dispatch.py` chooses the backend; cuda.py, onednn.py and
triton.py say what each backend serves. docs/ops.md explains them.
"""

import importlib
import warnings
from types import ModuleType

from . import _dispatch, cuda, triton  # backends, in the order of preference; conv_ffn adds oneDNN
from ._dispatch import choose, info, self_check
from .attention import super_token_attention
from .conv_ffn import conv_ffn
from .depthwise import bias_gelu_affine, depthwise3x3
from .super_token import aggregate, associate, sample, spread

for _operator in ("super_token", "depthwise", "attention", "conv_ffn"):
    importlib.import_module(f"{__name__}.{_operator}.registration")
_dispatch.make_functions()

__all__ = [
    "aggregate",
    "associate",
    "bias_gelu_affine",
    "choose",
    "conv_ffn",
    "cuda",
    "depthwise3x3",
    "info",
    "sample",
    "self_check",
    "spread",
    "super_token_attention",
    "triton",
]

# Deprecated modules, and where their contents are now.
_FORMER = {
    "backends": "_dispatch",
    "functional": "",
    "library": "_registration",
    "verify": "_self_check",
}


def __getattr__(name: str) -> ModuleType:
    if name not in _FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = f"{__name__}.{_FORMER[name]}".removesuffix(".")
    warnings.warn(f"svit.ops.{name} is deprecated, use {new}", DeprecationWarning, stacklevel=2)
    return importlib.import_module(new)
