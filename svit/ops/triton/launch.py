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

# Settings of a depthwise kernel that a measurement found better than the rule of `strip_settings`:
# (kernel, C, bytes of an element) -> (columns, warps, rows) of a strip, on maps that have as many.
STRIP_SETTINGS: dict[tuple[str, int, int], tuple[int, int, int]] = {}

# Columns and warps of a strip, where the map and its channels are wide enough: 168 registers a thread leave room for 12
# warps a multiprocessor. Rows, at least and at most: more of them mean fewer rows read twice, more results for each
# load of the taps (or, in their gradient, for each sum over the strip), and fewer programs.
COLUMNS, STRIP_WARPS = 16, {"depthwise": 2, "depthwise_taps": 4}
ROWS = {"depthwise": (4, 28), "depthwise_taps": (16, 128)}

# Programs that fill a large GPU a few times over: strips get shorter when they would be fewer.
PROGRAMS = 1280

# Bytes and channels of a program's tile in `bias_gelu_affine`: four times 16 bytes for each of 128 threads.
PIXEL_TILE, PIXEL_CHANNELS = 4 * 128 * 16, 128


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


def strip_launch(kernel: str, x: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Strips of all channels, programs, rows of a strip, and the constants of a depthwise kernel for a map x."""
    B, H, W, C = x.shape
    setting = STRIP_SETTINGS.get((kernel, C, x.element_size()))
    if kernel == "depthwise_taps":
        B, H = min(B, 1), B * H  # for which the images are one map
    return strip_constants(kernel, B, H, W, C, x.element_size(), setting)


@functools.lru_cache(maxsize=4096)
def strip_constants(
    kernel: str, B: int, H: int, W: int, C: int, itemsize: int, setting: tuple[int, int, int] | None
) -> tuple[int, int, int, dict[str, int]]:
    # A thread has 16 bytes of channels, in two columns if the kernel shifts them; it then needs no more columns on each
    # side if the strip is wider than the map.
    pairs = kernel == "depthwise"
    columns, warps, rows = setting or (COLUMNS, STRIP_WARPS[kernel], None)
    columns = min(columns, max(8, triton.next_power_of_2(W + pairs)))
    width = columns - 2 if pairs and columns <= W else columns
    lane = (1 + pairs) * 32 // columns * 16 // itemsize  # channels of a warp
    while warps > 1 and C % (lane * warps):
        warps //= 2
    tiles = B * -(-W // width) * -(-C // (lane * warps))
    least, most = ROWS[kernel]
    rows = rows or min(max(H * tiles // PROGRAMS, least), most)
    strips = max(-(-H // rows), 1)
    rows = -(-H // strips)  # about the same for all
    constants = dict(C=C, BLOCK_W=columns, BLOCK_C=lane * warps, num_warps=warps)
    return B * strips * -(-W // width), tiles * strips, rows, constants


def depthwise3x3(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    _, H, W, _ = x.shape
    y = torch.empty_like(x)
    _, programs, rows, constants = strip_launch("depthwise", x)
    launch(
        kernels.depthwise, programs, x,
        x, weight, bias, None, y, H, W, rows, GELU=gelu, BACKWARD=False, SLOPE=False, **constants,
    )  # fmt: skip
    return y


def depthwise3x3_backward(grad: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, C = x.shape
    dx = torch.empty_like(x)
    _, programs, rows, constants = strip_launch("depthwise", x)
    launch(
        kernels.depthwise, programs, x,
        grad, weight, None, x, dx, H, W, rows, GELU=False, BACKWARD=True, SLOPE=gelu, **constants,
    )  # fmt: skip
    strips, programs, rows, constants = strip_launch("depthwise_taps", x)
    partial = x.new_empty(strips, 10, C, dtype=torch.float32)
    launch(kernels.depthwise_taps, programs, x, grad, x, partial, H, W, B * H, rows, GELU=gelu, **constants)
    taps = partial.sum(0)
    return dx, taps[:9].t().reshape(C, 1, 3, 3).contiguous(), taps[9].clone()


def bias_gelu_affine(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    B, H, W, C = x.shape
    y = torch.empty_like(x)
    programs, constants = pixel_constants(B * H * W, C, x.element_size())
    launch(kernels.bias_gelu_affine, programs, x, x, bias, scale, shift, y, B * H * W, **constants)
    return y


@functools.lru_cache(maxsize=4096)
def pixel_constants(pixels: int, C: int, itemsize: int) -> tuple[int, dict[str, int]]:
    block_c = min(triton.next_power_of_2(C), PIXEL_CHANNELS)
    block_p = PIXEL_TILE // itemsize // block_c
    return -(-pixels // block_p) * -(-C // block_c), dict(C=C, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4)
