"""The depthwise ops of `torch.ops.svit`: schemas, shapes of the results, gradients, FLOPs, implementations."""

from math import prod
from typing import Any

from torch import Size, Tensor
from torch.library import register_autograd, register_fake

from svit.ops import _dispatch, triton
from svit.ops._numerics import accumulation_dtype
from svit.ops._registration import define, flop_formula, ops, refuse_gradient, refuse_second_derivative

from . import check_bias_gelu_affine, check_depthwise, check_depthwise_backward, reference, self_check  # noqa: F401

# x + depthwise 3x3 convolution, of x or of GELU(x).


define("depthwise3x3(Tensor x, Tensor weight, Tensor bias, bool gelu) -> Tensor", check_depthwise)
define(
    "depthwise3x3_backward(Tensor grad, Tensor x, Tensor weight, bool gelu) -> (Tensor, Tensor, Tensor)",
    check_depthwise_backward,
)


@register_fake("svit::depthwise3x3")
def _(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, backend: str | None = None) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("svit::depthwise3x3_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, gelu: bool, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=dtype), weight.new_empty(x.shape[3], dtype=dtype)


def depthwise_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.gelu, ctx.backend = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight)


def depthwise_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = ops.depthwise3x3_backward(grad.to(x.dtype), x, weight, ctx.gelu, ctx.backend)
    return dx, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None


register_autograd("svit::depthwise3x3", depthwise_gradients, setup_context=depthwise_context)


register_autograd("svit::depthwise3x3_backward", refuse_second_derivative("depthwise3x3"))

# The stem's epilogue at inference: a convolution's bias, GELU, and BatchNorm as scale and shift.


define(
    "bias_gelu_affine(Tensor x, Tensor bias, Tensor scale, Tensor shift) -> Tensor",
    check_bias_gelu_affine,
)


@register_fake("svit::bias_gelu_affine")
def _(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, backend: str | None = None) -> Tensor:
    return x.new_empty(x.shape)


register_autograd("svit::bias_gelu_affine", refuse_gradient("bias_gelu_affine"))


@flop_formula(ops.depthwise3x3)
def depthwise_flops(x: Size, weight: Size, bias: Size, gelu: bool, backend: str | None = None, **_: Any) -> int:
    return 2 * 9 * prod(x)


@flop_formula(ops.depthwise3x3_backward)
def depthwise_backward_flops(
    grad: Size, x: Size, weight: Size, gelu: bool, backend: str | None = None, **_: Any
) -> int:
    return 2 * 2 * 9 * prod(x)


_dispatch.REFERENCE.implement(
    depthwise3x3=reference.depthwise3x3,
    depthwise3x3_backward=reference.depthwise3x3_backward,
    bias_gelu_affine=reference.bias_gelu_affine,
)
triton.implement(f"{__package__}.triton", "depthwise3x3", "depthwise3x3_backward", "bias_gelu_affine")
