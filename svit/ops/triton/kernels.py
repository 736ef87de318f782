"""The kernels. Maps are contiguous NHWC; sums run in float32; no atomics, so results are the same bit by bit.

Super-token kernels: a program owns one cell. It reads the cell's pixels (P, C) and the 9 super tokens around it, padded
to 16 for the tensor cores, and keeps q as (16, P), its softmax running over the 9. What it has for the 9 super tokens
it writes as partial sums, which `fold` gathers.

Products of float32 run on the tensor cores too, as three of TF32 ("tf32x3": 21 bits of the operands, where plain TF32
keeps 10); AMD's GPUs have no such mode.

Depthwise kernels: a program owns a strip of the map, some columns wide and some channels deep, and walks down its rows.
Each row is read once, and its GELU computed once, for the three rows of results that need it.

Offsets of a cell or a strip from the start of the map are 64 bit wide; those inside it must fit into 32.
"""

import torch
import triton
import triton.language as tl

PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")

# Triton compiles a kernel anew for a size of 1 and for multiples of 16, unless told not to. What there is to gain from
# that lies in C, a constant, and a detector sees many sizes.
SIZES = ("H", "W", "hh", "ww", "cells")


@triton.jit
def cell_of(program, hh, ww):
    """Image, row and column of the program's cell."""
    hh, ww, program = (
        hh.to(tl.uint32),
        ww.to(tl.uint32),
        program.to(tl.uint32),
    )  # a division of signed numbers is longer
    row = program // ww
    b = row // hh
    return b.to(tl.int32), (row - b * hh).to(tl.int32), (program - row * ww).to(tl.int32)


@triton.jit
def pixels_of(b, i, j, p, H, W, CELL_H: tl.constexpr, CELL_W: tl.constexpr):
    """First pixel of cell (i, j), offsets of its pixels p from it, and which of them lie inside the map."""
    y, x = p // CELL_W, p % CELL_W
    first = (b.to(tl.int64) * H + i * CELL_H) * W + j * CELL_W
    inside = (p < CELL_H * CELL_W) & (i * CELL_H + y < H) & (j * CELL_W + x < W)
    return first, y * W + x, inside


@triton.jit
def load_map(x, first, offset, inside, c, C: tl.constexpr):
    """Pixels (P, C) of a map, 0 outside it."""
    at = x + first * C + offset[:, None] * C + c[None, :]
    return tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def center(v, c, C: tl.constexpr, eps):
    """Pixels (P, C), float32, less their mean over the channels, and 1 / standard deviation."""
    mean = tl.sum(v, 1) * (1.0 / C)
    v = tl.where((c < C)[None, :], v - mean[:, None], 0.0)
    return v, tl.rsqrt(tl.sum(v * v, 1) * (1.0 / C) + eps)


@triton.jit
def load_pixels(x, weight, bias, eps, first, offset, inside, c, C: tl.constexpr, NORM: tl.constexpr):
    """Pixels (P, C), float32, layer-normed if asked; 0 outside the map, after the norm."""
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
    """Super token k of the 9 around cell (i, j): its place relative to the cell's own, and whether there is one."""
    y, x = i + k // 3 - 1, j + k % 3 - 1
    inside = (k < 9) & (y >= 0) & (y < hh) & (x >= 0) & (x < ww)
    return (k // 3 - 1) * ww + k % 3 - 1, inside


@triton.jit
def load_neighbours(s, cell, k, i, j, hh, ww, c, C: tl.constexpr):
    """The super tokens (16, C) around a cell, 0 where there is none."""
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
    if NORM:  # of the sum, not of each pixel; the padding has no bias
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
    """q (B, hh, ww, 9, P), computed from s or read; partial sums (B, hh, ww, 9, C) and masses (B, hh, ww, 9) of it."""
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
    """Per super token the sum of what its 9 cells hold for it, and the mass; the sum divided by the mass if MEAN."""
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
    """Pixels p (P, C), float32: the q-weighted sums of 9 super tokens; their weights times factor (16) if MEAN."""
    at, exists = shares(q, cell, k, p, P)
    share = tl.load(at, mask=exists, other=0.0)
    if MEAN:
        share = (share.to(tl.float32) * factor[:, None]).to(near.dtype)
    return tl.dot(tl.trans(share), near, input_precision=PRECISION)


@triton.jit
def inverse_mass(mass, cell, k, i, j, hh, ww):
    """1 / mass (16) of the super tokens around a cell.

    It multiplies shares, which are part of the mass: the result is at most 1, that of super tokens may overflow.
    """
    offset, inside = neighbour(k, i, j, hh, ww)
    return 1.0 / (tl.load(mass + cell.to(tl.int64) + offset, mask=inside, other=1.0) + 1e-12)


@triton.jit(do_not_specialize=SIZES)
def spread(
    s, q, mass, residual, y, H, W, hh, ww,
    C: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr, MEAN: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (B, H, W, C): per pixel the q-weighted sum of its 9 super tokens, plus the residual if there is one."""
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
    """dx: the gradient of the super tokens spread over the pixels and taken back through the layer norm.

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
        g = tl.where(inside[:, None], g, 0.0)  # the padding is a constant zero, not the norm of anything
        v, rstd = center(load_map(x, first, offset, inside, c, C).to(tl.float32), c, C, eps)
        v *= tl.where(inside, rstd, 0.0)[:, None]  # with eps = 0 the norm of zeros is not a number
        dweight += tl.sum(g * v, 0)
        dbias += tl.sum(g, 0)
        g *= w[None, :]
        g = (g - (tl.sum(g, 1) * (1.0 / C))[:, None] - v * (tl.sum(g * v, 1) * (1.0 / C))[:, None]) * rstd[:, None]
        at = dx + first * C + offset[:, None] * C + c[None, :]
        tl.store(at, g.to(dx.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])
    at = dnorm + cell.to(tl.int64) * 2 * C + c
    tl.store(at, dweight, mask=c < C)
    tl.store(at + C, dbias, mask=c < C)


@triton.jit
def upper_tail(v):
    """1 - Phi(|v|), Phi the normal distribution, to 1e-7 (Abramowitz and Stegun 7.1.26), and exp(-v^2 / 2).

    A GELU of 24 instructions a value instead of 33 with erf (sm_90), in a kernel whose arithmetic takes about as long
    as its memory; the derivative needs the exponential anyway.
    """
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(v))
    e = tl.exp(-0.5 * v * v)
    poly = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t
    return poly * e, e


@triton.jit
def gelu_of(v):
    """Exact GELU, v Phi(v)."""
    tail, _ = upper_tail(v)
    return tl.maximum(v, 0.0) - tl.abs(v) * tail


@triton.jit
def gelu_slope(v):
    """Derivative of the exact GELU, Phi(v) + v Phi'(v)."""
    tail, e = upper_tail(v)
    return tl.where(v > 0, 1.0 - tail, tail) + v * e * 0.3989422804014327


@triton.jit
def strip_of(H, W, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's image, first row, first column and channels; channels vary fastest, then columns, then rows."""
    program = tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    blocks_w = (W + COLUMNS - 1) // COLUMNS
    strips = (H + ROWS - 1) // ROWS
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // blocks_c
    x = program % blocks_w * COLUMNS
    program = program // blocks_w
    return program // strips, program % strips * ROWS, x, c


@triton.jit
def load_row(x, row, y, columns, c, H, W, C: tl.constexpr):
    """Pixels (columns, C) of row y, which begins at pixel `row` of the map; 0 outside it."""
    inside = (y >= 0) & (y < H) & (columns >= 0) & (columns < W)
    return load_map(x, row, columns, inside, c, C)


@triton.jit
def tap(weight, c, k: tl.constexpr, C: tl.constexpr, FLIP: tl.constexpr):
    """Tap k of the 9, (1, C), float32; counted from the other end if FLIP."""
    place: tl.constexpr = 8 - k if FLIP else k
    return tl.load(weight + c * 9 + place, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=SIZES)
def depthwise(
    x, weight, bias, hidden, y, H, W,
    C: tl.constexpr, GELU: tl.constexpr, BACKWARD: tl.constexpr, SLOPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = u + convolution of u + bias, u = x or GELU(x), in strips of BLOCK_W - 2 columns and one more on each side.

    BACKWARD turns the taps round and has no bias: y is then the gradient that comes in as x; SLOPE multiplies it with
    the derivative of the GELU at `hidden`.
    """
    b, first, column, c = strip_of(H, W, C, ROWS, BLOCK_W - 2, BLOCK_C)
    n = tl.arange(0, BLOCK_W)
    columns = column + n - 1
    ours = (n > 0) & (n < BLOCK_W - 1) & (columns < W)
    to_left = tl.broadcast_to(tl.maximum(n - 1, 0)[:, None], (BLOCK_W, BLOCK_C))
    to_right = tl.broadcast_to(tl.minimum(n + 1, BLOCK_W - 1)[:, None], (BLOCK_W, BLOCK_C))
    w0, w1, w2 = tap(weight, c, 0, C, BACKWARD), tap(weight, c, 1, C, BACKWARD), tap(weight, c, 2, C, BACKWARD)
    w3, w4, w5 = tap(weight, c, 3, C, BACKWARD), tap(weight, c, 4, C, BACKWARD), tap(weight, c, 5, C, BACKWARD)
    w6, w7, w8 = tap(weight, c, 6, C, BACKWARD), tap(weight, c, 7, C, BACKWARD), tap(weight, c, 8, C, BACKWARD)
    w4 += 1.0  # the residual; in float32 it costs no digits
    start = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    if not BACKWARD:
        start += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    above, here = start, start  # what the rows r - 1 and r have got so far
    row = (b.to(tl.int64) * H + first - 1) * W
    coming = load_row(x, row, first - 1, columns, c, H, W, C)
    for i in range(0, ROWS + 2):
        r = first + i - 1
        mid = coming.to(tl.float32)
        coming = load_row(x, row + W, r + 1, columns, c, H, W, C)  # on its way while this row is worked on
        if GELU:
            mid = gelu_of(mid)
        left = tl.gather(mid, to_left, 0)
        right = tl.gather(mid, to_right, 0)
        above += left * w6 + mid * w7 + right * w8
        # Row r - 1 has now seen all of its three rows.
        inside = (i >= 2) & (r - 1 < H) & ours
        if SLOPE:
            above *= gelu_slope(load_map(hidden, row - W, columns, inside, c, C).to(tl.float32))
        at = y + (row - W) * C + columns[:, None] * C + c[None, :]
        tl.store(at, above.to(y.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])
        above = here + left * w3 + mid * w4 + right * w5
        here = start + left * w0 + mid * w1 + right * w2
        row += W


@triton.jit(do_not_specialize=SIZES)
def depthwise_taps(
    grad, x, partial, H, W,
    C: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial (strips of all images, 10, C), float32: the strip's part of the gradients of the 9 taps and the bias."""
    b, first, column, c = strip_of(H, W, C, ROWS, BLOCK_W, BLOCK_C)
    columns = column + tl.arange(0, BLOCK_W)
    d0 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    d1, d2, d3, d4, d5, d6, d7, d8, dbias = d0, d0, d0, d0, d0, d0, d0, d0, d0
    row = (b.to(tl.int64) * H + first) * W
    above = load_row(x, row - W, first - 1, columns, c, H, W, C).to(tl.float32)
    here = load_row(x, row, first, columns, c, H, W, C).to(tl.float32)
    if GELU:
        above = gelu_of(above)
        here = gelu_of(here)
    for i in range(0, ROWS):
        r = first + i
        below = load_row(x, row + W, r + 1, columns, c, H, W, C).to(tl.float32)
        if GELU:
            below = gelu_of(below)
        # A gradient of row r belongs to inputs of the rows r - 1, r, r + 1. A strip's last rows may lie below the map.
        right = load_row(grad, row, r, columns + 1, c, H, W, C).to(tl.float32)
        d0 += above * right
        d3 += here * right
        d6 += below * right
        mid = load_row(grad, row, r, columns, c, H, W, C).to(tl.float32)
        d1 += above * mid
        d4 += here * mid
        d7 += below * mid
        dbias += mid
        left = load_row(grad, row, r, columns - 1, c, H, W, C).to(tl.float32)
        d2 += above * left
        d5 += here * left
        d8 += below * left
        above = here
        here = below
        row += W
    at = partial + (tl.program_id(0) // ((C + BLOCK_C - 1) // BLOCK_C)).to(tl.int64) * 10 * C + c
    tl.store(at, tl.sum(d0, 0), mask=c < C)
    tl.store(at + C, tl.sum(d1, 0), mask=c < C)
    tl.store(at + 2 * C, tl.sum(d2, 0), mask=c < C)
    tl.store(at + 3 * C, tl.sum(d3, 0), mask=c < C)
    tl.store(at + 4 * C, tl.sum(d4, 0), mask=c < C)
    tl.store(at + 5 * C, tl.sum(d5, 0), mask=c < C)
    tl.store(at + 6 * C, tl.sum(d6, 0), mask=c < C)
    tl.store(at + 7 * C, tl.sum(d7, 0), mask=c < C)
    tl.store(at + 8 * C, tl.sum(d8, 0), mask=c < C)
    tl.store(at + 9 * C, tl.sum(dbias, 0), mask=c < C)
