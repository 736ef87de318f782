"""Helpers that the Triton kernels share: launching a kernel and loading a map.

Maps are contiguous NHWC. Sums run in float32. Kernels use no atomics, so every run gives the same bits. Offsets of a
cell or strip from the start of the map have 64 bits; offsets inside it fit into 32.

Kernels are not autotuned, which would stall the first steps of every run. A rule computes the launch parameters once
for each shape and dtype. A table beside the kernel overrides the rule where a measurement found better ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# By default Triton compiles a kernel again for a size of 1 and for multiples of 16. Only C would gain from that, and C
# is a constant. A detector sees many sizes, so Triton must not specialize on these.
SIZES = ("H", "W", "hh", "ww", "cells")


def launch(kernel, programs: int, like: Tensor, *args, **constants) -> None:
    """Runs a kernel on the device of `like`. With 0 programs it runs nothing."""
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](*args, **constants)


@triton.jit
def load_map(x, first, offset, inside, c, C: tl.constexpr):
    """Pixels (P, C) of a map, 0 outside it."""
    at = x + first * C + offset[:, None] * C + c[None, :]
    return tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)
