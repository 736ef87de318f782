"""What the operators' Triton kernels share: how a kernel is launched, and how a map is read.

Maps are contiguous NHWC; sums run in float32; no atomics, so results are the same bit by bit. Offsets of a cell or a
strip from the start of the map are 64 bit wide; those inside it must fit into 32.

No autotuning, which would stall the first steps of every run: launch parameters follow rules, worked out once for a
shape and dtype, and what a measurement found better stands in a table beside the kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton compiles a kernel anew for a size of 1 and for multiples of 16, unless told not to. What there is to gain from
# that lies in C, a constant, and a detector sees many sizes.
SIZES = ("H", "W", "hh", "ww", "cells")


def launch(kernel, programs: int, like: Tensor, *args, **constants) -> None:
    """Runs a kernel on the device of `like`; nothing if there is nothing to do."""
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](*args, **constants)


@triton.jit
def load_map(x, first, offset, inside, c, C: tl.constexpr):
    """Pixels (P, C) of a map, 0 outside it."""
    at = x + first * C + offset[:, None] * C + c[None, :]
    return tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)
