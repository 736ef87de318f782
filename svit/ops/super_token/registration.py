"""The super-token ops of `torch.ops.svit`: schemas, shapes of the results, gradients, FLOPs, implementations."""

from math import prod
from typing import Any

from torch import Size, Tensor
from torch.library import register_autograd, register_fake

from svit.ops import _dispatch, triton
from svit.ops._numerics import accumulation_dtype
from svit.ops._registration import define, flop_formula, grid, ops, refuse_second_derivative

from . import check_aggregate, check_associate, check_sample, check_sample_backward, check_spread, reference, self_check  # noqa: F401

# The association has no gradient.


define("associate(Tensor x, Tensor s, int[] cell) -> Tensor", check_associate)


@register_fake("svit::associate")
def _(x: Tensor, s: Tensor, cell: list[int], backend: str | None = None) -> Tensor:
    B, H, W, C = x.shape
    return x.new_empty(B, *grid(H, W, cell), 9, cell[0] * cell[1])


register_autograd("svit::associate", lambda ctx, grad: (None,) * 4)

# Aggregation and upsampling: each is the adjoint of the other. q is a constant.


define("aggregate(Tensor x, Tensor q, int[] cell) -> (Tensor, Tensor)", check_aggregate)
define("spread(Tensor s, Tensor q, int[] cell, SymInt[] size, Tensor? residual) -> Tensor", check_spread)


@register_fake("svit::aggregate")
def _(x: Tensor, q: Tensor, cell: list[int], backend: str | None = None) -> tuple[Tensor, Tensor]:
    B, hh, ww = q.shape[:3]
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(B, hh, ww, x.shape[3], dtype=dtype), x.new_empty(B, hh, ww, dtype=dtype)


@register_fake("svit::spread")
def _(
    s: Tensor, q: Tensor, cell: list[int], size: list[int], residual: Tensor | None, backend: str | None = None
) -> Tensor:
    dtype = s.dtype if residual is None else residual.dtype
    return s.new_empty(s.shape[0], *size, s.shape[3], dtype=dtype)


def aggregate_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, q, ctx.cell, ctx.backend = inputs
    ctx.size, ctx.dtype = x.shape[1:3], x.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q)


def aggregate_backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    (q,) = ctx.saved_tensors
    return ops.spread(grad.to(ctx.dtype), q, ctx.cell, ctx.size, None, ctx.backend), None, None, None


def spread_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    s, q, ctx.cell, size, residual, ctx.backend = inputs
    ctx.dtype, ctx.residual_dtype = s.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(q)


def spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (q,) = ctx.saved_tensors
    ds = dresidual = None
    if ctx.needs_input_grad[0]:
        ds = ops.aggregate(grad.to(q.dtype), q, ctx.cell, ctx.backend)[0].to(ctx.dtype)
    if ctx.residual_dtype is not None:
        dresidual = grad.to(ctx.residual_dtype)
    return ds, None, None, None, dresidual, None


register_autograd("svit::aggregate", aggregate_backward, setup_context=aggregate_context)
register_autograd("svit::spread", spread_backward, setup_context=spread_context)

# Sampling: layer norm (if weight and bias are given), cell means, then `n_iter` times association and aggregation.


define(
    "sample(Tensor x, int[] cell, int n_iter, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor s, Tensor q, Tensor mass)",
    check_sample,
)
define(
    "sample_backward(Tensor grad, Tensor x, Tensor q, Tensor mass, int[] cell, Tensor? weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    check_sample_backward,
)


@register_fake("svit::sample")
def _(
    x: Tensor,
    cell: list[int],
    n_iter: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, C = x.shape
    hh, ww = grid(H, W, cell)
    return (
        x.new_empty(B, hh, ww, C),
        x.new_empty(B, hh, ww, 9, cell[0] * cell[1]),
        x.new_empty(B, hh, ww, dtype=accumulation_dtype(x.dtype)),
    )


@register_fake("svit::sample_backward")
def _(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    mass: Tensor,
    cell: list[int],
    weight: Tensor | None,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    C = 0 if weight is None else x.shape[3]
    return x.new_empty(x.shape), mass.new_empty(C), mass.new_empty(C)


def sample_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, ctx.cell, _, weight, bias, ctx.eps, ctx.backend = inputs
    _, q, mass = output
    ctx.mark_non_differentiable(q, mass)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, q, mass, weight)


def sample_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, q, mass, weight = ctx.saved_tensors
    dx, dweight, dbias = ops.sample_backward(grad.to(x.dtype), x, q, mass, ctx.cell, weight, ctx.eps, ctx.backend)
    if weight is None:
        return dx, None, None, None, None, None, None
    return dx, None, None, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None


register_autograd("svit::sample", sample_gradients, setup_context=sample_context)
register_autograd("svit::sample_backward", refuse_second_derivative("sample"))


def products(q: tuple[int, ...], C: int) -> int:
    """FLOPs of one association, aggregation or upsampling: a product of 9 super tokens and a cell's pixels."""
    return 2 * prod(q) * C


@flop_formula(ops.associate)
def associate_flops(x: Size, s: Size, cell: list[int], backend: str | None = None, *, out_shape: Size, **_: Any) -> int:
    return products(out_shape, x[-1])


@flop_formula(ops.aggregate)
def aggregate_flops(x: Size, q: Size, cell: list[int], backend: str | None = None, **_: Any) -> int:
    return products(q, x[-1])


@flop_formula(ops.spread)
def spread_flops(
    s: Size, q: Size, cell: list[int], size: list[int], residual: Size | None, backend: str | None = None, **_: Any
) -> int:
    return products(q, s[-1])


@flop_formula(ops.sample)
def sample_flops(
    x: Size,
    cell: list[int],
    n_iter: int,
    weight: Size | None,
    bias: Size | None,
    eps: float,
    backend: str | None = None,
    *,
    out_shape: tuple[Size, ...],
    **_: Any,
) -> int:
    return 2 * n_iter * products(out_shape[1], x[-1])


@flop_formula(ops.sample_backward)
def sample_backward_flops(
    grad: Size,
    x: Size,
    q: Size,
    mass: Size,
    cell: list[int],
    weight: Size | None,
    eps: float,
    backend: str | None = None,
    **_: Any,
) -> int:
    return products(q, x[-1])


_dispatch.REFERENCE.implement(
    associate=reference.associate,
    aggregate=reference.aggregate,
    spread=reference.spread,
    sample=reference.sample,
    sample_backward=reference.sample_backward,
)
triton.implement(f"{__package__}.triton", "associate", "aggregate", "spread", "sample", "sample_backward")
