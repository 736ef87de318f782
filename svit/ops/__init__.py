"""Functions without parameters: super-token attention's sampling and spreading, the residual depthwise convolution.

`functional.py` is for users, `reference.py` computes everything in PyTorch, `triton/` the same in fused kernels,
`backends.py` chooses, `library.py` registers the ops as `torch.ops.svit`. docs/ops.md explains them.
"""

from . import library, onednn, triton
from .backends import choose, info
from .functional import aggregate, associate, depthwise3x3, sample, spread

if triton.triton is not None:  # else no fused op will run, and PyTorch would warn that it misses Triton
    from . import flops  # noqa: F401

__all__ = [
    "aggregate",
    "associate",
    "choose",
    "depthwise3x3",
    "info",
    "library",
    "onednn",
    "sample",
    "spread",
]
