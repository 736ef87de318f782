"""The attention half as an op of `torch.ops.svit`: schema, shapes of the results, gradient, FLOPs, implementations.

y = x + scale * attention(norm(x)). With `keep`, the op also returns the tensors that its backward needs.
"""

from math import prod
from typing import Any

import torch
from torch import Size, Tensor
from torch.library import register_autograd, register_fake

from svit.ops import _dispatch, cuda
from svit.ops._numerics import accumulation_dtype
from svit.ops._registration import define, flop_formula, grid, ops, refuse_second_derivative

from . import check_attention, reference, self_check  # noqa: F401
from . import cuda as kernels

define(
    "super_token_attention(Tensor x, int[] cell, Tensor norm_weight, Tensor norm_bias, float eps, Tensor qkv_weight, "
    "Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias, Tensor? scale, int num_heads, bool keep) "
    "-> (Tensor y, Tensor s, Tensor q, Tensor mass)",
    lambda x, *args: check_attention(x, *args[:-1]),
    lambda x, cell, *args: {"cell": cell, "num_heads": args[-2]},
    composite=True,
)


@register_fake("svit::super_token_attention")
def _(
    x: Tensor,
    cell: list[int],
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    scale: Tensor | None,
    num_heads: int,
    keep: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, W, C = x.shape
    hh, ww = grid(H, W, cell)
    dtype = accumulation_dtype(x.dtype)
    y = x.new_empty(x.shape)
    if not keep:
        return y, x.new_empty(0), x.new_empty(0), x.new_empty(0, dtype=dtype)
    q = x.new_empty(B, hh, ww, 9, cell[0] * cell[1])
    return y, x.new_empty(B, hh, ww, C), q, x.new_empty(B, hh, ww, dtype=dtype)


def attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    (x, ctx.cell, norm_weight, norm_bias, ctx.eps, qkv_weight, qkv_bias, proj_weight, proj_bias, scale, ctx.num_heads,
     ctx.keep, _) = inputs  # fmt: skip
    _, s, q, mass = output
    ctx.mark_non_differentiable(s, q, mass)
    ctx.norm_bias_dtype = norm_bias.dtype
    ctx.save_for_backward(x, s, q, mass, norm_weight, qkv_weight, qkv_bias, proj_weight, proj_bias, scale)


def attention_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients of its primitives in reverse: upsampling, attention among the super tokens, sampling."""
    if not ctx.keep:
        raise RuntimeError("svit::super_token_attention saves no tensors for a backward with keep=False")
    # s is a constant here, so a second derivative would silently lack a term.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (grad, *ctx.saved_tensors)):
        refuse_second_derivative("super_token_attention")(ctx, grad)
    x, s, q, mass, norm_weight, qkv_weight, qkv_bias, proj_weight, proj_bias, scale = ctx.saved_tensors
    parameters = qkv_weight, qkv_bias, proj_weight, proj_bias
    with torch.autocast(x.device.type, enabled=False):
        ds = ops.aggregate(grad.to(q.dtype), q, ctx.cell)[0]
        ds, *dparameters, dfactors = reference.attend_backward(ds, s, *parameters, scale, ctx.num_heads)
        dx, dnorm_weight, dnorm_bias = ops.sample_backward(ds.to(x.dtype), x, q, mass, ctx.cell, norm_weight, ctx.eps)
    dparameters = [d.to(p.dtype) for d, p in zip(dparameters, parameters, strict=True)]
    dnorm = dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(ctx.norm_bias_dtype)
    dscale = None if scale is None else dfactors.to(scale.dtype)
    return grad.to(x.dtype) + dx, None, *dnorm, None, *dparameters, dscale, None, None, None


register_autograd("svit::super_token_attention", attention_gradients, setup_context=attention_context)


@flop_formula(ops.super_token_attention)
def attention_flops(
    x: Size,
    cell: list[int],
    norm_weight: Size,
    norm_bias: Size,
    eps: float,
    qkv: Size,
    qkv_bias: Size,
    proj: Size,
    proj_bias: Size,
    *_: Any,
    **__: Any,
) -> int:
    B, H, W, C = x
    hh, ww = grid(H, W, cell)
    tokens = hh * ww
    sampling = 3 * 2 * B * tokens * 9 * cell[0] * cell[1] * C  # association, aggregation, upsampling
    return sampling + 2 * B * tokens * (prod(qkv) + prod(proj) + 2 * tokens * C)


_dispatch.REFERENCE.implement(super_token_attention=reference.super_token_attention)
cuda.BACKEND.implement(super_token_attention=kernels.super_token_attention)
