"""What the ops cost, for PyTorch's FlopCounterMode, which knows its own operations only.

The products alone, as the reference's operations count, a multiply-accumulate as 2: norms, softmax and sums are left
out. (A tool that traces a model, as fvcore does, sees the reference's operations.)
"""

from math import prod

from torch.utils.flop_counter import register_flop_formula

from .library import grid, ops


def products(q: tuple[int, ...], C: int) -> int:
    """Of associating, aggregating or spreading: each one product between 9 super tokens and a cell's pixels."""
    return 2 * prod(q) * C


@register_flop_formula(ops.associate)
def associate_flops(x, s, cell, backend=None, *, out_shape, **_) -> int:
    return products(out_shape, x[-1])


@register_flop_formula(ops.aggregate)
def aggregate_flops(x, q, cell, backend=None, **_) -> int:
    return products(q, x[-1])


@register_flop_formula(ops.spread)
def spread_flops(s, q, cell, size, residual, backend=None, **_) -> int:
    return products(q, s[-1])


@register_flop_formula(ops.sample)
def sample_flops(x, cell, n_iter, weight, bias, eps, backend=None, *, out_shape, **_) -> int:
    return 2 * n_iter * products(out_shape[1], x[-1])


@register_flop_formula(ops.sample_backward)
def sample_backward_flops(grad, x, q, mass, cell, weight, eps, backend=None, **_) -> int:
    return products(q, x[-1])


@register_flop_formula(ops.depthwise3x3)
def depthwise_flops(x, weight, bias, gelu, backend=None, **_) -> int:
    return 2 * 9 * prod(x)


@register_flop_formula(ops.depthwise3x3_backward)
def depthwise_backward_flops(grad, x, weight, gelu, backend=None, **_) -> int:
    return 2 * 2 * 9 * prod(x)


@register_flop_formula(ops.super_token_attention)
def attention_flops(x, cell, norm_weight, norm_bias, eps, qkv, qkv_bias, proj, proj_bias, *_, **__) -> int:
    B, H, W, C = x
    hh, ww = grid(H, W, cell)
    tokens = hh * ww
    sampling = 3 * products((B, tokens, 9, cell[0] * cell[1]), C)  # associating, aggregating, spreading
    return sampling + 2 * B * tokens * (prod(qkv) + prod(proj) + 2 * tokens * C)


@register_flop_formula(ops.conv_ffn)
def conv_ffn_flops(x, residual, weight1, bias1, depthwise_weight, depthwise_bias, weight2, *_, **__) -> int:
    B, H, W, C = x
    return 2 * B * H * W * (prod(weight1) + prod(depthwise_weight) + prod(weight2))
