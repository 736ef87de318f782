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
def cheap_cdf(v):
    """Phi(v) as the sigmoid of an odd polynomial in v, and v^2, at most 64.

    v Phi(v) is right to 2.6e-5: less than half a unit in the last place of bfloat16 where |v Phi(v)| >= 2^-7, of
    float16 where it is >= 2^-4, and of both for all v >= 0. What it gets wrong is the tail below -1.5. Ten instructions
    a value instead of 24. The derivative of this very function differs from the exact one by 1.1e-4 at most.
    """
    square = tl.minimum(v * v, 64.0)  # the sigmoid is 0 or 1 from there on, where the polynomial would turn round
    e = tl.exp2(v * (-2.3011214 + square * (-0.10677572 + square * 0.0010142631)))
    root = tl.rsqrt(1.0 + e)  # a division takes seven instructions
    return root * root, square


@triton.jit
def gelu_of(v, EXACT: tl.constexpr):
    """GELU, v Phi(v): exact, or as right as 16 bit can tell."""
    if EXACT:
        tail, _ = upper_tail(v)
        return tl.maximum(v, 0.0) - tl.abs(v) * tail
    else:
        cdf, _ = cheap_cdf(v)
        return v * cdf


@triton.jit
def gelu_slope(v, EXACT: tl.constexpr):
    """Derivative of the GELU, Phi(v) + v Phi'(v)."""
    if EXACT:
        tail, e = upper_tail(v)
        return tl.where(v > 0, 1.0 - tail, tail) + v * e * 0.3989422804014327
    else:
        cdf, square = cheap_cdf(v)
        return cdf + v * cdf * (1.0 - cdf) * (1.5950158 + square * (0.22203388 + square * -0.0035151682))


@triton.jit
def strip_of(strip, H, W, rows, width):
    """Image, first row and first column of a strip, `rows` high and `width` wide; columns vary faster than rows."""
    blocks_w = (W + width - 1) // width
    strips = (H + rows - 1) // rows
    return strip // blocks_w // strips, strip // blocks_w % strips * rows, strip % blocks_w * width


@triton.jit
def load_row(x, row, exists, columns, c, W, C: tl.constexpr):
    """Pixels (columns, C) of the row that begins at pixel `row` of the map, if it exists; 0 outside the map."""
    return load_map(x, row, columns, exists & (columns >= 0) & (columns < W), c, C)


@triton.jit
def load_pair(x, row, exists, even, c, W, C: tl.constexpr):
    """Pixels (pairs, groups, V) of the row that begins at pixel `row` of the map, if it exists, in the columns `even`
    and in those to their right; 0 outside the map."""
    at = x + row * C + even[:, None, None] * C + c[None]
    left, right = exists & (even >= 0) & (even < W), exists & (even + 1 >= 0) & (even + 1 < W)
    channels = (c < C)[None]
    left = tl.load(at, mask=left[:, None, None] & channels, other=0.0)
    return left, tl.load(at + C, mask=right[:, None, None] & channels, other=0.0)


@triton.jit
def load_taps(weight, bias, c, k, C: tl.constexpr, BACKWARD: tl.constexpr):
    """Taps k (k, groups, V), float32: the 9 and then the bias, or the 9 from the last to the first and then 0."""
    k, channels = k[:, None, None], (c < C)[None]
    at = weight + c[None] * 9 + (8 - k if BACKWARD else k)
    taps = tl.load(at, mask=(k < 9) & channels, other=0.0).to(tl.float32)
    if not BACKWARD:
        taps += tl.load(bias + c[None] + 0 * k, mask=(k == 9) & channels, other=0.0).to(tl.float32)
    return taps


@triton.jit
def tap(t0, t1, t2, zero, k: tl.constexpr):
    """Tap k for all pixels, from tables that hold as many taps each as there are pairs of columns, at least 4."""
    ROWS: tl.constexpr = zero.shape[0]
    if k < ROWS:
        return tl.gather(t0, zero + k, 0)
    elif k < 2 * ROWS:
        return tl.gather(t1, zero + (k - ROWS), 0)
    else:
        return tl.gather(t2, zero + (k - 2 * ROWS), 0)


@triton.jit(do_not_specialize=(*SIZES, "rows"))
def depthwise(
    x, weight, bias, hidden, y, H, W, rows,
    C: tl.constexpr, GELU: tl.constexpr, BACKWARD: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = u + convolution of u + bias, u = x or GELU(x), in strips of BLOCK_W - 2 columns and one more on each side, or
    of all columns where BLOCK_W are more.

    BACKWARD turns the taps round and has no bias: y is then the gradient that comes in as x; SLOPE multiplies it with
    the derivative of the GELU at `hidden`.

    A thread has 16 bytes of channels in two neighbouring columns, and a warp all columns of a strip. So the columns
    left of the even ones are the odd ones of the thread beside it, and one shuffle a value shifts a row both ways. The
    tensors are (pairs of columns, groups of channels, V channels) with V filling 16 bytes, as Triton then shuffles
    (`tl.gather`) in the layout that it loads and stores in, without a barrier.
    """
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    V: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    PAIRS: tl.constexpr = BLOCK_W // 2
    SHAPE: tl.constexpr = (PAIRS, BLOCK_C // V, V)

    # Channels vary fastest from program to program, so that neighbours read the same lines at the same time.
    program = tl.program_id(0)
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C // V)[:, None] * V + tl.arange(0, V)[None, :]
    halo = (W >= BLOCK_W).to(tl.int32)
    width = BLOCK_W - 2 * halo
    b, first, left = strip_of(program // blocks_c, H, W, rows, width)
    right, end = tl.minimum(left + width, W), tl.minimum(first + rows, H)

    pair = tl.arange(0, PAIRS)
    even = left - halo + 2 * pair
    store_even, store_odd = (even >= left) & (even < right), (even + 1 >= left) & (even + 1 < right)
    # Round the strip's ends: what comes in there is a zero outside the map, or goes to a column of the halo.
    before = tl.broadcast_to(((pair + PAIRS - 1) % PAIRS)[:, None, None], SHAPE)
    after = tl.broadcast_to(((pair + 1) % PAIRS)[:, None, None], SHAPE)

    # Shuffles bring the taps too, PAIRS of them from one load. A plain load has a layout of its own, and its taps would
    # take twice the registers: once for what is multiplied with shuffled values, once for the rest.
    zero, channels = tl.zeros(SHAPE, tl.int32), (c < C)[None]
    t0 = load_taps(weight, bias, c, pair, C, BACKWARD)
    t1 = load_taps(weight, bias, c, pair + PAIRS, C, BACKWARD)
    t2 = load_taps(weight, bias, c, pair + 2 * PAIRS, C, BACKWARD)
    w0, w1, w2 = tap(t0, t1, t2, zero, 0), tap(t0, t1, t2, zero, 1), tap(t0, t1, t2, zero, 2)
    w3, w4, w5 = tap(t0, t1, t2, zero, 3), tap(t0, t1, t2, zero, 4), tap(t0, t1, t2, zero, 5)
    w6, w7, w8 = tap(t0, t1, t2, zero, 6), tap(t0, t1, t2, zero, 7), tap(t0, t1, t2, zero, 8)
    w4 += 1.0  # the residual; in float32 it costs no digits
    start = tl.zeros(SHAPE, tl.float32) if BACKWARD else tap(t0, t1, t2, zero, 9)

    # What the rows r - 1 and r have got so far.
    above_even, above_odd, here_even, here_odd = start, start, start, start
    r = tl.maximum(first - 1, 0)
    row = (b.to(tl.int64) * H + r) * W
    next_even, next_odd = load_pair(x, row, r < H, even, c, W, C)
    while r <= end:
        in_even, in_odd = next_even.to(tl.float32), next_odd.to(tl.float32)
        # The next row is on its way while this one is computed.
        next_even, next_odd = load_pair(x, row + W, (r < end) & (r + 1 < H), even, c, W, C)
        if SLOPE:
            hidden_even, hidden_odd = load_pair(hidden, row - W, r > first, even, c, W, C)
        if GELU:
            in_even, in_odd = gelu_of(in_even, EXACT), gelu_of(in_odd, EXACT)
        in_left, in_right = tl.gather(in_odd, before, 0), tl.gather(in_even, after, 0)
        # Sums begin with what was shuffled, and so stay in its layout.
        above_even = above_even + in_left * w6 + in_even * w7 + in_odd * w8
        above_odd = above_odd + in_right * w8 + in_odd * w7 + in_even * w6
        # Row r - 1 has now seen all of its three rows.
        if SLOPE:
            above_even *= gelu_slope(hidden_even.to(tl.float32), EXACT)
            above_odd *= gelu_slope(hidden_odd.to(tl.float32), EXACT)
        at = y + (row - W) * C + even[:, None, None] * C + c[None]
        tl.store(at, above_even.to(y.dtype.element_ty), mask=((r > first) & store_even)[:, None, None] & channels)
        tl.store(at + C, above_odd.to(y.dtype.element_ty), mask=((r > first) & store_odd)[:, None, None] & channels)
        above_even = here_even + in_left * w3 + in_even * w4 + in_odd * w5
        above_odd = here_odd + in_right * w5 + in_odd * w4 + in_even * w3
        here_even = start + in_left * w0 + in_even * w1 + in_odd * w2
        here_odd = start + in_right * w2 + in_odd * w1 + in_even * w0
        r += 1
        row += W


@triton.jit(do_not_specialize=(*SIZES, "rows"))
def depthwise_taps(
    grad, x, partial, H, W, height, rows,
    C: tl.constexpr, GELU: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial (strips, 10, C), float32: the strip's part of the gradients of the 9 taps and the bias.

    The images are one map here, `height` = B H rows high: a strip may hold several.
    """
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    _, first, column = strip_of(program // blocks_c, height, W, rows, BLOCK_W)
    n = column + tl.arange(0, BLOCK_W)
    end = tl.minimum(first + rows, height)
    d0 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    d1, d2, d3, d4, d5, d6, d7, d8, dbias = d0, d0, d0, d0, d0, d0, d0, d0, d0
    row = first.to(tl.int64) * W
    above = load_row(x, row - W, first % H > 0, n, c, W, C).to(tl.float32)
    here = load_row(x, row, first < end, n, c, W, C).to(tl.float32)
    if GELU:
        above, here = gelu_of(above, EXACT), gelu_of(here, EXACT)
    next_below = load_row(x, row + W, first + 1 < height, n, c, W, C)
    next_left, next_mid = load_row(grad, row, first < end, n - 1, c, W, C), load_row(grad, row, first < end, n, c, W, C)
    next_right = load_row(grad, row, first < end, n + 1, c, W, C)
    y = first % H
    r = first
    while r < end:
        below, left = next_below.to(tl.float32), next_left.to(tl.float32)
        mid, right = next_mid.to(tl.float32), next_right.to(tl.float32)
        row += W
        more = r + 1 < end  # rows, which come while this one is computed
        next_below = load_row(x, row + W, more & (r + 2 < height), n, c, W, C)
        next_left, next_mid = load_row(grad, row, more, n - 1, c, W, C), load_row(grad, row, more, n, c, W, C)
        next_right = load_row(grad, row, more, n + 1, c, W, C)
        if GELU:
            below = gelu_of(below, EXACT)
        # A gradient belongs to inputs of its own row and of those above and below, if they are of the same image.
        ends = y + 1 == H
        d0 += above * right
        d1 += above * mid
        d2 += above * left
        d3 += here * right
        d4 += here * mid
        d5 += here * left
        above = tl.where(ends, 0.0, here)
        here = below
        below = tl.where(ends, 0.0, below)
        d6 += below * right
        d7 += below * mid
        d8 += below * left
        dbias += mid
        y = tl.where(ends, 0, y + 1)
        r += 1
    at = partial + (program // blocks_c).to(tl.int64) * 10 * C + c
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


@triton.jit(do_not_specialize=("pixels",))
def bias_gelu_affine(
    x, bias, scale, shift, y, pixels, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """y = GELU(x + bias) * scale + shift."""
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_P
    inside = p + tl.arange(0, BLOCK_P) < pixels
    v = load_map(x, p, tl.arange(0, BLOCK_P), inside, c, C).to(tl.float32)
    v += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    v = gelu_of(v, x.dtype.element_ty == tl.float32)
    a = tl.load(scale + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    v = v * a + tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    at = y + p * C + tl.arange(0, BLOCK_P)[:, None] * C + c[None, :]
    tl.store(at, v.to(y.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])
