"""Launches of the kernels, one function an op, with the signatures of library.py. Arguments come contiguous.

Launch parameters follow rules, worked out once for a shape and dtype, and what a measurement found better stands in a
table: no autotuning, which would stall the first steps of every run.
"""

import functools

import torch
import triton
from torch import Tensor

from . import kernels

# Settings of a super-token kernel in place of those of `cell_settings`, where a measurement found them better or
# registers spilled: (kernel, C, h, w, bytes of an element) -> (pixels at a time, warps) of a program, which has a cell.
SETTINGS: dict[tuple[str, int, int, int, int], tuple[int, int]] = {
    ("associate_aggregate", 192, 4, 4, 2): (16, 1),
    ("spread", 96, 8, 8, 2): (16, 2),
}

# Bytes of a map that a program of a super-token kernel works on at a time, at most; and for each of its warps. Few
# warps share the work that each of them repeats (addresses, sums over a warp) and wait for each other less.
CELL_TILE, WARP_TILE = 2**14, 2**12

# Kernels with a product that has the pixels as rows. From 64 rows and 4 warps on, compilers may make of it the
# asynchronous instructions of the tensor cores (wgmma of sm_90, tcgen05 of sm_100), which some assemblers get wrong.
PIXELS_AS_ROWS = ("spread", "norm_sample_backward")

# Bytes and channels of a row in a depthwise kernel: 16 bytes for each of 128 threads.
ROW_TILE, ROW_CHANNELS = 128 * 16, 64

# Rows of a strip in the depthwise kernels: the last that the map fills, or the first. More of them mean fewer rows read
# twice, and fewer programs; each number is a kernel to compile.
ROWS_FORWARD, ROWS_TAPS = (7, 14), (7, 14, 28, 56)


def launch(kernel, programs: int, like: Tensor, *args, **constants) -> None:
    """Runs a kernel on the device of `like`; nothing if there is nothing to do."""
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](*args, **constants)


def cell_launch(kernel: str, x: Tensor, cell: list[int]) -> dict[str, int]:
    """Constants of a super-token kernel for a map x."""
    h, w = cell
    key = kernel, x.shape[-1], h, w, x.element_size()
    return cell_constants(*key, SETTINGS.get(key))


@functools.cache
def cell_constants(
    kernel: str, C: int, h: int, w: int, itemsize: int, setting: tuple[int, int] | None
) -> dict[str, int]:
    block_c = max(triton.next_power_of_2(C), 16)
    block_p, warps = setting or cell_settings(kernel, block_c, h * w, itemsize)
    if kernel in PIXELS_AS_ROWS and block_p >= 64 and warps >= 4:
        raise ValueError(f"SETTINGS: expected fewer than 64 pixels or 4 warps for {kernel}, got {block_p} and {warps}")
    # One stage: a loop over a large cell's pixels, if prefetched, would want more shared memory than some GPUs have.
    return dict(C=C, CELL_H=h, CELL_W=w, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps, num_stages=1)


def cell_settings(kernel: str, block_c: int, P: int, itemsize: int) -> tuple[int, int]:
    """Pixels at a time and warps of a super-token kernel, for cells of P pixels."""
    block_p = max(min(triton.next_power_of_2(P), CELL_TILE // itemsize // block_c), 16)
    if kernel in PIXELS_AS_ROWS:
        block_p = 16
    warps = block_p * block_c * itemsize // WARP_TILE
    if kernel == "norm_sample_backward" or (kernel == "associate_aggregate" and itemsize == 4):
        warps *= 2  # a gradient beside the pixels, or products of three parts: as many registers again
    return block_p, min(max(warps, 1), 8)


def grid(x: Tensor, cell: list[int]) -> tuple[int, int]:
    return -(-x.shape[1] // cell[0]), -(-x.shape[2] // cell[1])


def associate(x: Tensor, s: Tensor, cell: list[int]) -> Tensor:
    B, H, W, C = x.shape
    hh, ww = grid(x, cell)
    q = x.new_empty(B, hh, ww, 9, cell[0] * cell[1])
    launch(
        kernels.associate_aggregate, B * hh * ww, x,
        x, s, q, None, None, None, None, 0.0, C**-0.5, H, W, hh, ww,
        NORM=False, ASSOCIATE=True, AGGREGATE=False, **cell_launch("associate_aggregate", x, cell),
    )  # fmt: skip
    return q


def fold(partial: Tensor, partial_mass: Tensor, dtype: torch.dtype, mean: bool) -> tuple[Tensor, Tensor]:
    B, hh, ww, _, C = partial.shape
    s, mass = partial.new_empty(B, hh, ww, C, dtype=dtype), partial.new_empty(B, hh, ww)
    cells, constants = B * hh * ww, fold_constants(C, dtype.itemsize)
    launch(
        kernels.fold, -(-cells // constants["BLOCK_T"]), s,
        partial, partial_mass, s, mass, cells, hh, ww, MEAN=mean, **constants,
    )  # fmt: skip
    return s, mass


@functools.cache
def fold_constants(C: int, itemsize: int) -> dict[str, int]:
    block_c = triton.next_power_of_2(C)
    return dict(C=C, BLOCK_T=max(128 * 16 // itemsize // block_c, 1), BLOCK_C=block_c, num_warps=4)


def partial_sums(q: Tensor, C: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:4], C, dtype=torch.float32), q.new_empty(q.shape[:4], dtype=torch.float32)


def aggregate(x: Tensor, q: Tensor, cell: list[int]) -> tuple[Tensor, Tensor]:
    B, H, W, C = x.shape
    hh, ww = grid(x, cell)
    total, mass = partial_sums(q, C)
    launch(
        kernels.associate_aggregate, B * hh * ww, x,
        x, None, q, total, mass, None, None, 0.0, 0.0, H, W, hh, ww,
        NORM=False, ASSOCIATE=False, AGGREGATE=True, **cell_launch("associate_aggregate", x, cell),
    )  # fmt: skip
    return fold(total, mass, torch.float32, mean=False)


def sample(
    x: Tensor, cell: list[int], n_iter: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, C = x.shape
    hh, ww = grid(x, cell)
    norm = weight is not None
    parameters = cell_launch("associate_aggregate", x, cell)
    s = x.new_empty(B, hh, ww, C)
    q = x.new_empty(B, hh, ww, 9, cell[0] * cell[1])
    total, mass = partial_sums(q, C)
    launch(
        kernels.cell_mean, B * hh * ww, x,
        x, s, weight, bias, eps, H, W, hh, ww, NORM=norm, **cell_launch("cell_mean", x, cell),
    )  # fmt: skip
    for _ in range(n_iter):
        launch(
            kernels.associate_aggregate, B * hh * ww, x,
            x, s, q, total, mass, weight, bias, eps, C**-0.5, H, W, hh, ww,
            NORM=norm, ASSOCIATE=True, AGGREGATE=True, **parameters,
        )  # fmt: skip
        s, folded_mass = fold(total, mass, x.dtype, mean=True)
    return s, q, folded_mass


def sample_backward(
    grad: Tensor, x: Tensor, q: Tensor, mass: Tensor, cell: list[int], weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if weight is None:
        return launch_spread(grad, q, mass, None, cell, x.shape[1:3]), mass.new_empty(0), mass.new_empty(0)
    B, H, W, C = x.shape
    hh, ww = grid(x, cell)
    dx = torch.empty_like(x)
    dnorm = mass.new_empty(B * hh * ww, 2, C)
    launch(
        kernels.norm_sample_backward, B * hh * ww, x,
        grad, x, q, mass, weight, dx, dnorm, eps, H, W, hh, ww,
        **cell_launch("norm_sample_backward", x, cell),
    )  # fmt: skip
    dweight, dbias = dnorm.sum(0)
    return dx, dweight.clone(), dbias.clone()


def spread(s: Tensor, q: Tensor, cell: list[int], size: list[int], residual: Tensor | None) -> Tensor:
    return launch_spread(s, q, None, residual, cell, size)


def launch_spread(
    s: Tensor, q: Tensor, mass: Tensor | None, residual: Tensor | None, cell: list[int], size: list[int]
) -> Tensor:
    B, hh, ww, C = s.shape
    H, W = size
    y = s.new_empty(B, H, W, C, dtype=s.dtype if residual is None else residual.dtype)
    launch(
        kernels.spread, B * hh * ww, s,
        s, q, mass, residual, y, H, W, hh, ww,
        MEAN=mass is not None, RESIDUAL=residual is not None, **cell_launch("spread", s, cell),
    )  # fmt: skip
    return y


def strip_launch(x: Tensor, choices: tuple[int, ...], halo: int) -> tuple[int, int, dict[str, int]]:
    """Strips of all channels, programs, and the parameters of a depthwise kernel that writes all but `halo` columns."""
    B, H, W, C = x.shape
    block_c = min(triton.next_power_of_2(C), ROW_CHANNELS)
    block_w = max(min(ROW_TILE // x.element_size() // block_c, triton.next_power_of_2(W + halo)), 4)
    rows = max((n for n in choices if n <= H), default=choices[0])
    strips = B * triton.cdiv(H, rows) * triton.cdiv(W, block_w - halo)
    programs = strips * triton.cdiv(C, block_c)
    return strips, programs, dict(C=C, ROWS=rows, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=4)


def depthwise3x3(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    B, H, W, C = x.shape
    y = torch.empty_like(x)
    _, programs, parameters = strip_launch(x, ROWS_FORWARD, halo=2)
    launch(
        kernels.depthwise, programs, x,
        x, weight, bias, None, y, H, W, GELU=gelu, BACKWARD=False, SLOPE=False, **parameters,
    )  # fmt: skip
    return y


def depthwise3x3_backward(grad: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, C = x.shape
    dx = torch.empty_like(x)
    _, programs, parameters = strip_launch(x, ROWS_FORWARD, halo=2)
    launch(
        kernels.depthwise, programs, x,
        grad, weight, None, x, dx, H, W, GELU=False, BACKWARD=True, SLOPE=gelu, **parameters,
    )  # fmt: skip
    strips, programs, parameters = strip_launch(x, ROWS_TAPS, halo=0)
    partial = x.new_empty(strips, 10, C, dtype=torch.float32)
    launch(kernels.depthwise_taps, programs, x, grad, x, partial, H, W, GELU=gelu, **parameters)
    taps = partial.sum(0)
    return dx, taps[:9].t().reshape(C, 1, 3, 3).contiguous(), taps[9].clone()
