"""The Triton kernels of super-token sampling and upsampling, and a launch for each op.

A program owns one cell. It reads the cell's pixels (P, C) and the 9 super tokens around it, padded to 16 for the tensor
cores. It holds q as (16, P), with the softmax over the 9. It writes its shares of the 9 super tokens as partial sums,
and `fold` adds those up.

Products of float32 run on the tensor cores too, as three of TF32 ("tf32x3"): 21 bits of the operands instead of 10.
AMD's GPUs have no such mode.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from svit.ops import _kernels
from svit.ops._kernels import SIZES, load_map

PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")

# Settings that override `cell_settings`, because they are measured to be faster or avoid spills:
# (kernel, C, h, w, bytes of an element) -> (pixels at a time, warps) of a program.
SETTINGS: dict[tuple[str, int, int, int, int], tuple[int, int]] = {
    ("associate_aggregate", 192, 4, 4, 2): (16, 1),
    ("spread", 96, 8, 8, 2): (16, 2),
}

# The most bytes of a map that a program works on at a time, and the bytes for each of its warps. With few warps, less
# work is repeated in each (addresses, sums over a warp), and they wait for each other less.
CELL_TILE, WARP_TILE = 2**14, 2**12

# Kernels with a product whose rows are pixels. From 64 rows and 4 warps on, a compiler may use the asynchronous
# instructions of the tensor cores (wgmma on sm_90, tcgen05 on sm_100), which some assemblers translate wrongly.
PIXELS_AS_ROWS = ("spread", "norm_sample_backward")


@triton.jit
def cell_of(program, hh, ww):
    """Image, row and column of the program's cell."""
    hh, ww, program = (
        hh.to(tl.uint32),
        ww.to(tl.uint32),
        program.to(tl.uint32),
    )  # a signed division takes more instructions
    row = program // ww
    b = row // hh
    return b.to(tl.int32), (row - b * hh).to(tl.int32), (program - row * ww).to(tl.int32)


@triton.jit
def pixels_of(b, i, j, p, H, W, CELL_H: tl.constexpr, CELL_W: tl.constexpr):
    """First pixel of cell (i, j), offsets of its pixels p from that one, and which of them lie inside the map."""
    y, x = p // CELL_W, p % CELL_W
    first = (b.to(tl.int64) * H + i * CELL_H) * W + j * CELL_W
    inside = (p < CELL_H * CELL_W) & (i * CELL_H + y < H) & (j * CELL_W + x < W)
    return first, y * W + x, inside


@triton.jit
def center(v, c, C: tl.constexpr, eps):
    """Pixels (P, C) minus their mean over the channels, float32, and 1 / standard deviation."""
    mean = tl.sum(v, 1) * (1.0 / C)
    v = tl.where((c < C)[None, :], v - mean[:, None], 0.0)
    return v, tl.rsqrt(tl.sum(v * v, 1) * (1.0 / C) + eps)


@triton.jit
def load_pixels(x, weight, bias, eps, first, offset, inside, c, C: tl.constexpr, NORM: tl.constexpr):
    """Pixels (P, C), float32, after the layer norm if NORM; 0 outside the map."""
    v = load_map(x, first, offset, inside, c, C).to(tl.float32)
    if NORM:
        v, rstd = center(v, c, C, eps)
        v *= rstd[:, None]
        w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        t = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        v = tl.where(inside[:, None], v * w[None, :] + t[None, :], 0.0)
    return v


@triton.jit
def neighbour(k, i, j, hh, ww):
    """Offset of super token k of the 9 around cell (i, j) from the cell's own, and whether it exists."""
    y, x = i + k // 3 - 1, j + k % 3 - 1
    inside = (k < 9) & (y >= 0) & (y < hh) & (x >= 0) & (x < ww)
    return (k // 3 - 1) * ww + k % 3 - 1, inside


@triton.jit
def load_neighbours(s, cell, k, i, j, hh, ww, c, C: tl.constexpr):
    """The super tokens (16, C) around a cell, 0 outside the grid."""
    offset, inside = neighbour(k, i, j, hh, ww)
    at = s + cell.to(tl.int64) * C + offset[:, None] * C + c[None, :]
    return tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def shares(q, cell, k, p, P: tl.constexpr):
    """Addresses (16, P) of a cell's q, and which of them exist."""
    return q + cell.to(tl.int64) * 9 * P + k[:, None] * P + p[None, :], (k < 9)[:, None] & (p < P)[None, :]


@triton.jit(do_not_specialize=SIZES)
def cell_mean(
    x, s, weight, bias, eps, H, W, hh, ww,
    C: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr, NORM: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """s (B, hh, ww, C): the mean over a cell's pixels, padding included."""
    P: tl.constexpr = CELL_H * CELL_W
    cell = tl.program_id(0)
    b, i, j = cell_of(cell, hh, ww)
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, P, BLOCK_P):
        first, offset, inside = pixels_of(b, i, j, start + tl.arange(0, BLOCK_P), H, W, CELL_H, CELL_W)
        v = load_map(x, first, offset, inside, c, C).to(tl.float32)
        if NORM:
            v, rstd = center(v, c, C, eps)
            v *= tl.where(inside, rstd, 0.0)[:, None]
        total += tl.sum(v, 0)
    total *= 1.0 / P
    if NORM:  # scale and bias apply to the sum; the padding has no bias
        pixels = tl.minimum(H - i * CELL_H, CELL_H) * tl.minimum(W - j * CELL_W, CELL_W)
        w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        t = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        total = total * w + t * (pixels * (1.0 / P))
    tl.store(s + cell.to(tl.int64) * C + c, total.to(s.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def associate_aggregate(
    x, s, q, total, mass, weight, bias, eps, scale, H, W, hh, ww,
    C: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr, NORM: tl.constexpr,
    ASSOCIATE: tl.constexpr, AGGREGATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """q (B, hh, ww, 9, P), which ASSOCIATE computes from s; with AGGREGATE partial sums (B, hh, ww, 9, C) and masses
    (B, hh, ww, 9)."""
    P: tl.constexpr = CELL_H * CELL_W
    cell = tl.program_id(0)
    b, i, j = cell_of(cell, hh, ww)
    c = tl.arange(0, BLOCK_C)
    k = tl.arange(0, 16)
    if ASSOCIATE:
        near = load_neighbours(s, cell, k, i, j, hh, ww, c, C)
    if AGGREGATE:
        sums = tl.zeros((16, BLOCK_C), tl.float32)
        masses = tl.zeros((16,), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        first, offset, inside = pixels_of(b, i, j, p, H, W, CELL_H, CELL_W)
        v = load_pixels(x, weight, bias, eps, first, offset, inside, c, C, NORM).to(x.dtype.element_ty)
        at, exists = shares(q, cell, k, p, P)
        if ASSOCIATE:
            logits = tl.dot(near, tl.trans(v), input_precision=PRECISION) * scale
            logits = tl.where((k < 9)[:, None], logits, float("-inf"))
            e = tl.exp(logits - tl.max(logits, 0)[None, :])
            share = (e * (1.0 / tl.sum(e, 0))[None, :]).to(q.dtype.element_ty)
            tl.store(at, share, mask=exists)
            share = tl.where(exists, share, 0.0)
        else:
            share = tl.load(at, mask=exists, other=0.0)
        if AGGREGATE:
            sums += tl.dot(share, v, input_precision=PRECISION)
            masses += tl.sum(share.to(tl.float32), 1)
    if AGGREGATE:
        row = cell.to(tl.int64) * 9
        at = total + row * C + k[:, None] * C + c[None, :]
        tl.store(at, sums, mask=(k < 9)[:, None] & (c < C)[None, :])
        tl.store(mass + row + k, masses, mask=k < 9)


@triton.jit(do_not_specialize=SIZES)
def fold(
    partial, partial_mass, s, mass, cells, hh, ww,
    C: tl.constexpr, MEAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """For each super token the sum of its 9 cells' partial sums, divided by the mass if MEAN, and the mass."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    i, j = t // ww % hh, t % ww
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    weight = tl.zeros((BLOCK_T,), tl.float32)
    for k in tl.static_range(9):
        # This super token is neighbour k of the cell at (i + 1 - k // 3, j + 1 - k % 3).
        y, x = i + 1 - k // 3, j + 1 - k % 3
        inside = (t < cells) & (y >= 0) & (y < hh) & (x >= 0) & (x < ww)
        row = (t + (1 - k // 3) * ww + 1 - k % 3) * 9 + k
        total += tl.load(partial + row[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        weight += tl.load(partial_mass + row, mask=inside, other=0.0)
    if MEAN:
        total = total / (weight + 1e-12)[:, None]
    at = s + t[:, None] * C + c[None, :]
    tl.store(at, total.to(s.dtype.element_ty), mask=(t < cells)[:, None] & (c < C)[None, :])
    tl.store(mass + t, weight, mask=t < cells)


@triton.jit
def spread_cell(near, q, cell, k, p, P: tl.constexpr, factor, MEAN: tl.constexpr):
    """Pixels p (P, C), float32: the sums of 9 super tokens weighted by q, or by q times factor (16) if MEAN."""
    at, exists = shares(q, cell, k, p, P)
    share = tl.load(at, mask=exists, other=0.0)
    if MEAN:
        share = (share.to(tl.float32) * factor[:, None]).to(near.dtype)
    return tl.dot(tl.trans(share), near, input_precision=PRECISION)


@triton.jit
def inverse_mass(mass, cell, k, i, j, hh, ww):
    """1 / mass (16) of the super tokens around a cell.

    It multiplies the shares in q: each is a part of the mass, so the result is at most 1. Super tokens times it might
    overflow.
    """
    offset, inside = neighbour(k, i, j, hh, ww)
    return 1.0 / (tl.load(mass + cell.to(tl.int64) + offset, mask=inside, other=1.0) + 1e-12)


@triton.jit(do_not_specialize=SIZES)
def spread(
    s, q, mass, residual, y, H, W, hh, ww,
    C: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr, MEAN: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (B, H, W, C): for each pixel the sum of its 9 super tokens weighted by q, plus the residual if RESIDUAL."""
    cell = tl.program_id(0)
    b, i, j = cell_of(cell, hh, ww)
    c = tl.arange(0, BLOCK_C)
    k = tl.arange(0, 16)
    near = load_neighbours(s, cell, k, i, j, hh, ww, c, C)
    factor = inverse_mass(mass, cell, k, i, j, hh, ww) if MEAN else None
    for start in range(0, CELL_H * CELL_W, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        first, offset, inside = pixels_of(b, i, j, p, H, W, CELL_H, CELL_W)
        v = spread_cell(near, q, cell, k, p, CELL_H * CELL_W, factor, MEAN)
        if RESIDUAL:
            v += load_map(residual, first, offset, inside, c, C).to(tl.float32)
        at = y + first * C + offset[:, None] * C + c[None, :]
        tl.store(at, v.to(y.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=SIZES)
def norm_sample_backward(
    grad, x, q, mass, weight, dx, dnorm, eps, H, W, hh, ww,
    C: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx: the gradient of the super tokens, upsampled to the pixels, and then through the layer norm.

    dnorm (B, hh, ww, 2, C), float32: the cell's part of the gradients of the norm's weight and bias.
    """
    cell = tl.program_id(0)
    b, i, j = cell_of(cell, hh, ww)
    c = tl.arange(0, BLOCK_C)
    k = tl.arange(0, 16)
    near = load_neighbours(grad, cell, k, i, j, hh, ww, c, C)
    factor = inverse_mass(mass, cell, k, i, j, hh, ww)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, CELL_H * CELL_W, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        first, offset, inside = pixels_of(b, i, j, p, H, W, CELL_H, CELL_W)
        g = spread_cell(near, q, cell, k, p, CELL_H * CELL_W, factor, True)
        g = tl.where(inside[:, None], g, 0.0)  # the padding is zero after the norm, so it has no gradient
        v, rstd = center(load_map(x, first, offset, inside, c, C).to(tl.float32), c, C, eps)
        v *= tl.where(inside, rstd, 0.0)[:, None]  # with eps = 0 the norm of zeros is NaN
        dweight += tl.sum(g * v, 0)
        dbias += tl.sum(g, 0)
        g *= w[None, :]
        g = (g - (tl.sum(g, 1) * (1.0 / C))[:, None] - v * (tl.sum(g * v, 1) * (1.0 / C))[:, None]) * rstd[:, None]
        at = dx + first * C + offset[:, None] * C + c[None, :]
        tl.store(at, g.to(dx.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])
    at = dnorm + cell.to(tl.int64) * 2 * C + c
    tl.store(at, dweight, mask=c < C)
    tl.store(at + C, dbias, mask=c < C)


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
    # One stage: to prefetch a large cell's pixels takes more shared memory than some GPUs have.
    return dict(C=C, CELL_H=h, CELL_W=w, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps, num_stages=1)


def cell_settings(kernel: str, block_c: int, P: int, itemsize: int) -> tuple[int, int]:
    """Pixels at a time and warps of a super-token kernel, for cells of P pixels."""
    block_p = max(min(triton.next_power_of_2(P), CELL_TILE // itemsize // block_c), 16)
    if kernel in PIXELS_AS_ROWS:
        block_p = 16
    warps = block_p * block_c * itemsize // WARP_TILE
    if kernel == "norm_sample_backward" or (kernel == "associate_aggregate" and itemsize == 4):
        warps *= 2  # a gradient beside the pixels, or products of three parts, take twice the registers
    return block_p, min(max(warps, 1), 8)


def grid(x: Tensor, cell: list[int]) -> tuple[int, int]:
    return -(-x.shape[1] // cell[0]), -(-x.shape[2] // cell[1])


def launch_associate(x: Tensor, s: Tensor, cell: list[int]) -> Tensor:
    B, H, W, C = x.shape
    hh, ww = grid(x, cell)
    q = x.new_empty(B, hh, ww, 9, cell[0] * cell[1])
    _kernels.launch(
        associate_aggregate, B * hh * ww, x,
        x, s, q, None, None, None, None, 0.0, C**-0.5, H, W, hh, ww,
        NORM=False, ASSOCIATE=True, AGGREGATE=False, **cell_launch("associate_aggregate", x, cell),
    )  # fmt: skip
    return q


def prepare_fold(partial: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int, dict[str, int]]:
    """Empty super tokens and mass for `fold` to write, and its number of programs and constants."""
    B, hh, ww, _, C = partial.shape
    constants = fold_constants(C, dtype.itemsize)
    s, mass = partial.new_empty(B, hh, ww, C, dtype=dtype), partial.new_empty(B, hh, ww)
    return s, mass, -(-B * hh * ww // constants["BLOCK_T"]), constants


@functools.cache
def fold_constants(C: int, itemsize: int) -> dict[str, int]:
    block_c = triton.next_power_of_2(C)
    return dict(C=C, BLOCK_T=max(128 * 16 // itemsize // block_c, 1), BLOCK_C=block_c, num_warps=4)


def partial_sums(q: Tensor, C: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:4], C, dtype=torch.float32), q.new_empty(q.shape[:4], dtype=torch.float32)


def launch_aggregate(x: Tensor, q: Tensor, cell: list[int]) -> tuple[Tensor, Tensor]:
    B, H, W, C = x.shape
    hh, ww = grid(x, cell)
    total, mass = partial_sums(q, C)
    _kernels.launch(
        associate_aggregate, B * hh * ww, x,
        x, None, q, total, mass, None, None, 0.0, 0.0, H, W, hh, ww,
        NORM=False, ASSOCIATE=False, AGGREGATE=True, **cell_launch("associate_aggregate", x, cell),
    )  # fmt: skip
    s, folded_mass, programs, constants = prepare_fold(total, torch.float32)
    _kernels.launch(fold, programs, s, total, mass, s, folded_mass, B * hh * ww, hh, ww, MEAN=False, **constants)
    return s, folded_mass


def launch_sample(
    x: Tensor, cell: list[int], n_iter: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, C = x.shape
    hh, ww = grid(x, cell)
    norm = weight is not None
    parameters = cell_launch("associate_aggregate", x, cell)
    s = x.new_empty(B, hh, ww, C)
    q = x.new_empty(B, hh, ww, 9, cell[0] * cell[1])
    total, mass = partial_sums(q, C)
    _kernels.launch(
        cell_mean, B * hh * ww, x,
        x, s, weight, bias, eps, H, W, hh, ww, NORM=norm, **cell_launch("cell_mean", x, cell),
    )  # fmt: skip
    for _ in range(n_iter):
        _kernels.launch(
            associate_aggregate, B * hh * ww, x,
            x, s, q, total, mass, weight, bias, eps, C**-0.5, H, W, hh, ww,
            NORM=norm, ASSOCIATE=True, AGGREGATE=True, **parameters,
        )  # fmt: skip
        s, folded_mass, programs, constants = prepare_fold(total, x.dtype)
        _kernels.launch(fold, programs, s, total, mass, s, folded_mass, B * hh * ww, hh, ww, MEAN=True, **constants)
    return s, q, folded_mass


def launch_sample_backward(
    grad: Tensor, x: Tensor, q: Tensor, mass: Tensor, cell: list[int], weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if weight is None:
        return launch_spread(grad, q, cell, x.shape[1:3], None, mass), mass.new_empty(0), mass.new_empty(0)
    B, H, W, C = x.shape
    hh, ww = grid(x, cell)
    dx = torch.empty_like(x)
    dnorm = mass.new_empty(B * hh * ww, 2, C)
    _kernels.launch(
        norm_sample_backward, B * hh * ww, x,
        grad, x, q, mass, weight, dx, dnorm, eps, H, W, hh, ww,
        **cell_launch("norm_sample_backward", x, cell),
    )  # fmt: skip
    dweight, dbias = dnorm.sum(0)
    return dx, dweight.clone(), dbias.clone()


def launch_spread(
    s: Tensor, q: Tensor, cell: list[int], size: Sequence[int], residual: Tensor | None, mass: Tensor | None = None
) -> Tensor:
    """With `mass`, the shares in q are divided by the mass of their super tokens."""
    B, hh, ww, C = s.shape
    H, W = size
    y = s.new_empty(B, H, W, C, dtype=s.dtype if residual is None else residual.dtype)
    _kernels.launch(
        spread, B * hh * ww, s,
        s, q, mass, residual, y, H, W, hh, ww,
        MEAN=mass is not None, RESIDUAL=residual is not None, **cell_launch("spread", s, cell),
    )  # fmt: skip
    return y
