"""Functions without parameters: super-token attention's sampling and spreading, the residual depthwise convolution,
and the halves of a block as wholes.

`functional.py` is for users, `reference.py` computes everything in PyTorch, `triton/` the parts in fused kernels,
`cuda.py` with `csrc/` the wholes, `backends.py` chooses, `verify.py` checks a backend before its first call,
`library.py` registers the ops as `torch.ops.svit`.
docs/ops.md explains them.
"""

from . import cuda, library, onednn, triton
from .backends import choose, info, self_check
from .functional import (
    aggregate,
    associate,
    bias_gelu_affine,
    conv_ffn,
    depthwise3x3,
    sample,
    spread,
    super_token_attention,
)

if triton.triton is not None:  # else no fused op will run, and PyTorch would warn that it misses Triton
    from . import flops  # noqa: F401

__all__ = [
    "aggregate",
    "associate",
    "bias_gelu_affine",
    "choose",
    "conv_ffn",
    "cuda",
    "depthwise3x3",
    "info",
    "library",
    "onednn",
    "sample",
    "self_check",
    "spread",
    "super_token_attention",
]
