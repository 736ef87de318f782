"""The Triton kernels of the residual depthwise convolution and of the stem's epilogue, and a launch for each op.

A program of the convolution owns a strip of the map, a few columns and channels, and walks down its rows. It reads each
row once, and computes its GELU once, for the three rows of results that need it.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from svit.ops import _kernels
from svit.ops._kernels import SIZES, load_map

# Settings that override the rule of `strip_constants`, because they are measured to be faster:
# (kernel, C, bytes of an element) -> (columns, warps, rows) of a strip, on maps that are large enough.
STRIP_SETTINGS: dict[tuple[str, int, int], tuple[int, int, int]] = {}

# Columns and warps of a strip, if the map has as many columns and channels. With 168 registers a thread, a
# multiprocessor holds 12 warps. Rows of a strip, least and most: with more rows, fewer rows are read twice, each load
# of the taps (or, in their gradient, each sum over the strip) serves more results, and there are fewer programs. With
# several warps, `depthwise` would exchange columns through shared memory in Triton 3.8.
COLUMNS, STRIP_WARPS = 16, {"depthwise": 1, "depthwise_taps": 4}
ROWS = {"depthwise": (4, 28), "depthwise_taps": (16, 128)}

# The most registers of a thread. NVIDIA's assembler stops at 168 by default, and some versions then spill one.
REGISTERS = {} if torch.version.hip else {"maxnreg": 192}

# The least number of warps of all programs, more than a large GPU holds. Strips get shorter to reach it.
LAUNCHED_WARPS = 2560

# Bytes and channels of a program's tile in `bias_gelu_affine`: four times 16 bytes for each of 128 threads.
PIXEL_TILE, PIXEL_CHANNELS = 4 * 128 * 16, 128


@triton.jit
def upper_tail(v):
    """1 - Phi(|v|), Phi the normal distribution, to 1e-7 (Abramowitz and Stegun 7.1.26), and exp(-v^2 / 2).

    With it a GELU takes 24 instructions for a value instead of 33 with erf (sm_90), in a kernel whose arithmetic takes
    about as long as its memory. The derivative needs the exponential anyway.
    """
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(v))
    e = tl.exp(-0.5 * v * v)
    poly = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t
    return poly * e, e


@triton.jit
def cheap_cdf(v):
    """Phi(v) as the sigmoid of an odd polynomial in v, and v^2, at most 64.

    v Phi(v) has an error of at most 2.6e-5, the largest in the tail below -1.5. That is less than half a unit in the
    last place of bfloat16 if |v Phi(v)| >= 2^-7, of float16 if it is >= 2^-4, and of both for all v >= 0. It takes ten
    instructions for a value instead of 24. Its derivative differs from the exact one by 1.1e-4 at most.
    """
    square = tl.minimum(v * v, 64.0)  # beyond it the sigmoid is 0 or 1, and the polynomial would change its sign
    e = tl.exp2(v * (-2.3011214 + square * (-0.10677572 + square * 0.0010142631)))
    root = tl.rsqrt(1.0 + e)  # a division takes seven instructions
    return root * root, square


@triton.jit
def gelu_of(v, EXACT: tl.constexpr):
    """GELU, v Phi(v): exact, or to the precision of 16 bit."""
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
    """Pixels (columns, C) of the row that begins at pixel `row` of the map, 0 outside the map or if not `exists`."""
    return load_map(x, row, columns, exists & (columns >= 0) & (columns < W), c, C)


@triton.jit
def load_pair(x, row, exists, even, c, W, C: tl.constexpr):
    """Pixels (pairs, groups, V) of the row that begins at pixel `row` of the map, in the columns `even` and in those to
    their right. 0 outside the map or if not `exists`."""
    at = x + row * C + even[:, None, None] * C + c[None]
    left, right = exists & (even >= 0) & (even < W), exists & (even + 1 >= 0) & (even + 1 < W)
    channels = (c < C)[None]
    left = tl.load(at, mask=left[:, None, None] & channels, other=0.0)
    return left, tl.load(at + C, mask=right[:, None, None] & channels, other=0.0)


@triton.jit
def load_taps(weight, bias, c, k, C: tl.constexpr, BACKWARD: tl.constexpr):
    """Taps k (k, groups, V), float32: the 9 and then the bias; with BACKWARD the 9 in reverse and then 0."""
    k, channels = k[:, None, None], (c < C)[None]
    at = weight + c[None] * 9 + (8 - k if BACKWARD else k)
    taps = tl.load(at, mask=(k < 9) & channels, other=0.0).to(tl.float32)
    if not BACKWARD:
        taps += tl.load(bias + c[None] + 0 * k, mask=(k == 9) & channels, other=0.0).to(tl.float32)
    return taps


@triton.jit
def tap(t0, t1, t2, zero, k: tl.constexpr):
    """Tap k for all pixels. Each table holds as many taps as there are pairs of columns, at least 4."""
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
    """y = u + convolution of u + bias, with u = x or GELU(x).

    A strip has BLOCK_W - 2 columns and reads one more on each side. A map of fewer than BLOCK_W columns is one strip.

    BACKWARD reverses the taps and has no bias: from the gradient x of the result it computes that of u. SLOPE
    multiplies this with the derivative of the GELU at `hidden`.

    A thread has 16 bytes of channels in two neighbouring columns, and a warp has all columns of a strip. So the columns
    left of the even ones are the odd ones of the next thread, and one shuffle of a value shifts a row both ways.
    Tensors are (pairs of columns, groups of channels, V channels), and V channels fill 16 bytes. Then Triton shuffles
    (`tl.gather`) in the layout of its loads and stores, without a barrier.
    """
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    V: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    PAIRS: tl.constexpr = BLOCK_W // 2
    SHAPE: tl.constexpr = (PAIRS, BLOCK_C // V, V)

    # Channels vary fastest from program to program, so that neighbouring programs read the same cache lines.
    program = tl.program_id(0)
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C // V)[:, None] * V + tl.arange(0, V)[None, :]
    halo = (W >= BLOCK_W).to(tl.int32)
    width = BLOCK_W - 2 * halo
    b, first, left = strip_of(program // blocks_c, H, W, rows, width)
    right, end = tl.minimum(left + width, W), tl.minimum(first + rows, H)
    last = tl.minimum(end, H - 1)  # row that is read

    pair = tl.arange(0, PAIRS)
    even = left - halo + 2 * pair
    store_even, store_odd = (even >= left) & (even < right), (even + 1 >= left) & (even + 1 < right)
    # Wraps at the strip's ends: the value is a zero outside the map, or goes to a column of the halo.
    before = tl.broadcast_to(((pair + PAIRS - 1) % PAIRS)[:, None, None], SHAPE)
    after = tl.broadcast_to(((pair + 1) % PAIRS)[:, None, None], SHAPE)

    # Taps are shuffled too, PAIRS of them from one load. A plain load has another layout, and its taps would take twice
    # the registers: one copy for products with shuffled values, one for the others.
    zero, channels = tl.zeros(SHAPE, tl.int32), (c < C)[None]
    t0 = load_taps(weight, bias, c, pair, C, BACKWARD)
    t1 = load_taps(weight, bias, c, pair + PAIRS, C, BACKWARD)
    t2 = load_taps(weight, bias, c, pair + 2 * PAIRS, C, BACKWARD)
    w0, w1, w2 = tap(t0, t1, t2, zero, 0), tap(t0, t1, t2, zero, 1), tap(t0, t1, t2, zero, 2)
    w3, w4, w5 = tap(t0, t1, t2, zero, 3), tap(t0, t1, t2, zero, 4), tap(t0, t1, t2, zero, 5)
    w6, w7, w8 = tap(t0, t1, t2, zero, 6), tap(t0, t1, t2, zero, 7), tap(t0, t1, t2, zero, 8)
    w4 += 1.0  # the residual; in float32 the tap keeps its digits
    start = tl.zeros(SHAPE, tl.float32) if BACKWARD else tap(t0, t1, t2, zero, 9)

    # Sums of the rows r - 1 and r so far.
    above_even, above_odd, here_even, here_odd = start, start, start, start
    r = tl.maximum(first - 1, 0)
    row = (b.to(tl.int64) * H + r) * W
    next_even, next_odd = load_pair(x, row, r < H, even, c, W, C)
    while r <= end:
        in_even, in_odd = next_even.to(tl.float32), next_odd.to(tl.float32)
        # The next row loads while this one is computed.
        next_even, next_odd = load_pair(x, row + W, r < last, even, c, W, C)
        if SLOPE:
            hidden_even, hidden_odd = load_pair(hidden, row - W, r > first, even, c, W, C)
        if GELU:
            in_even, in_odd = gelu_of(in_even, EXACT), gelu_of(in_odd, EXACT)
        in_left, in_right = tl.gather(in_odd, before, 0), tl.gather(in_even, after, 0)
        # Sums begin with a shuffled value and so keep its layout.
        above_even = above_even + in_left * w6 + in_even * w7 + in_odd * w8
        above_odd = above_odd + in_right * w8 + in_odd * w7 + in_even * w6
        # Row r - 1 is complete: all three rows are in.
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

    All images are one map of `height` = B H rows, so a strip may hold several.
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
        more = r + 1 < end  # the next row loads while this one is computed
        next_below = load_row(x, row + W, more & (r + 2 < height), n, c, W, C)
        next_left, next_mid = load_row(grad, row, more, n - 1, c, W, C), load_row(grad, row, more, n, c, W, C)
        next_right = load_row(grad, row, more, n + 1, c, W, C)
        if GELU:
            below = gelu_of(below, EXACT)
        # A gradient meets inputs of its own row and of the rows above and below it in the same image.
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


def strip_launch(kernel: str, x: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Strips of all channels, programs, rows of a strip, and the constants of a depthwise kernel for a map x."""
    B, H, W, C = x.shape
    setting = STRIP_SETTINGS.get((kernel, C, x.element_size()))
    if kernel == "depthwise_taps":
        B, H = min(B, 1), B * H  # all images are one map
    return strip_constants(kernel, B, H, W, C, x.element_size(), setting)


@functools.lru_cache(maxsize=4096)
def strip_constants(
    kernel: str, B: int, H: int, W: int, C: int, itemsize: int, setting: tuple[int, int, int] | None
) -> tuple[int, int, int, dict[str, int]]:
    # A thread has 16 bytes of channels, in two columns if the kernel shifts them. Such a kernel reads a column more on
    # each side, unless the strip is wider than the map.
    pairs = kernel == "depthwise"
    columns, warps, rows = setting or (COLUMNS, STRIP_WARPS[kernel], None)
    columns = min(columns, max(8, triton.next_power_of_2(W + pairs)))
    width = columns - 2 if pairs and columns <= W else columns
    lane = (1 + pairs) * 32 // columns * 16 // itemsize  # channels of a warp
    while warps > 1 and C % (lane * warps):
        warps //= 2
    tiles = B * -(-W // width) * -(-C // (lane * warps))
    least, most = ROWS[kernel]
    rows = rows or min(max(H * tiles * warps // LAUNCHED_WARPS, least), most)
    strips = max(-(-H // rows), 1)
    rows = -(-H // strips)  # strips of about the same height
    constants = dict(C=C, BLOCK_W=columns, BLOCK_C=lane * warps, num_warps=warps, **REGISTERS)
    return B * strips * -(-W // width), tiles * strips, rows, constants


def launch_depthwise3x3(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    _, H, W, _ = x.shape
    y = torch.empty_like(x)
    _, programs, rows, constants = strip_launch("depthwise", x)
    _kernels.launch(
        depthwise, programs, x,
        x, weight, bias, None, y, H, W, rows, GELU=gelu, BACKWARD=False, SLOPE=False, **constants,
    )  # fmt: skip
    return y


def launch_depthwise3x3_backward(grad: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, C = x.shape
    dx = torch.empty_like(x)
    _, programs, rows, constants = strip_launch("depthwise", x)
    _kernels.launch(
        depthwise, programs, x,
        grad, weight, None, x, dx, H, W, rows, GELU=False, BACKWARD=True, SLOPE=gelu, **constants,
    )  # fmt: skip
    strips, programs, rows, constants = strip_launch("depthwise_taps", x)
    partial = x.new_empty(strips, 10, C, dtype=torch.float32)
    _kernels.launch(depthwise_taps, programs, x, grad, x, partial, H, W, B * H, rows, GELU=gelu, **constants)
    taps = partial.sum(0)
    return dx, taps[:9].t().reshape(C, 1, 3, 3).contiguous(), taps[9].clone()


def launch_bias_gelu_affine(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    B, H, W, C = x.shape
    y = torch.empty_like(x)
    programs, constants = pixel_constants(B * H * W, C, x.element_size())
    _kernels.launch(bias_gelu_affine, programs, x, x, bias, scale, shift, y, B * H * W, **constants)
    return y


@functools.lru_cache(maxsize=4096)
def pixel_constants(pixels: int, C: int, itemsize: int) -> tuple[int, dict[str, int]]:
    block_c = min(triton.next_power_of_2(C), PIXEL_CHANNELS)
    block_p = PIXEL_TILE // itemsize // block_c
    return -(-pixels // block_p) * -(-C // block_c), dict(C=C, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4)
