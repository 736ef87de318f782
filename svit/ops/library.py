"""The ops of `torch.ops.svit`: schemas, shapes of the results, gradients. What computes them is chosen at each call.

They take and give contiguous NHWC maps. The functions that users call stand in functional.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from . import backends, checks, reference

LIBRARY = Library("svit", "DEF")
ops = torch.ops.svit


def define(
    schema: str,
    check: Callable[..., None] = lambda *_: None,
    sizes: Callable[..., dict] = lambda *_: {},
) -> None:
    """Defines an op whose last argument is `str? backend` and whose first is the map that the choice depends on.

    `check` takes the others and raises a ValueError if they do not fit together; kernels trust their arguments. `sizes`
    takes them too and gives what else the choice depends on.
    """
    name, _, rest = schema.partition("(")
    arguments, _, returns = rest.rpartition(") -> ")
    LIBRARY.define(f"{name}({arguments}, str? backend=None) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))

    def implementation(*args):
        *args, backend = args if len(args) > arguments.count(",") + 1 else (*args, None)  # a default does not come
        args = [a.contiguous() if isinstance(a, Tensor) else a for a in args]
        check(*args)
        # The first argument has the dtype, device and channels that the choice depends on.
        return backends.run(name, backend, sizes(*args), args[0], *args)

    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")


def grid(H: int, W: int, cell: list[int]) -> tuple[int, int]:
    return (H + cell[0] - 1) // cell[0], (W + cell[1] - 1) // cell[1]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Association: no gradient.


define("associate(Tensor x, Tensor s, int[] cell) -> Tensor", checks.check_associate)


@register_fake("svit::associate")
def _(x, s, cell, backend=None):
    B, H, W, C = x.shape
    return x.new_empty(B, *grid(H, W, cell), 9, cell[0] * cell[1])


register_autograd("svit::associate", lambda ctx, grad: (None,) * 4)

# Aggregation and spreading: each the other's adjoint. q is a constant.


def check_spread(s, q, cell, size, residual):
    checks.expect_map(s, "s")
    checks.expect_cell(cell)
    checks.expect_size(size, s, cell)
    checks.expect(q, "q", (*s.shape[:3], 9, cell[0] * cell[1]), s, s.dtype)
    if residual is not None:
        checks.expect(residual, "residual", (s.shape[0], *size, s.shape[3]), s)


define("aggregate(Tensor x, Tensor q, int[] cell) -> (Tensor, Tensor)", checks.check_aggregate)
define("spread(Tensor s, Tensor q, int[] cell, SymInt[] size, Tensor? residual) -> Tensor", check_spread)


@register_fake("svit::aggregate")
def _(x, q, cell, backend=None):
    B, hh, ww = q.shape[:3]
    dtype = wide(x.dtype)
    return x.new_empty(B, hh, ww, x.shape[3], dtype=dtype), x.new_empty(B, hh, ww, dtype=dtype)


@register_fake("svit::spread")
def _(s, q, cell, size, residual, backend=None):
    dtype = s.dtype if residual is None else residual.dtype
    return s.new_empty(s.shape[0], *size, s.shape[3], dtype=dtype)


def aggregate_context(ctx, inputs, output):
    x, q, ctx.cell, ctx.backend = inputs
    ctx.size, ctx.dtype = x.shape[1:3], x.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q)


def aggregate_backward(ctx, grad, _):
    (q,) = ctx.saved_tensors
    return ops.spread(grad.to(ctx.dtype), q, ctx.cell, ctx.size, None, ctx.backend), None, None, None


def spread_context(ctx, inputs, output):
    s, q, ctx.cell, size, residual, ctx.backend = inputs
    ctx.dtype, ctx.residual_dtype = s.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(q)


def spread_backward(ctx, grad):
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
    checks.check_sample,
)
define(
    "sample_backward(Tensor grad, Tensor x, Tensor q, Tensor mass, int[] cell, Tensor? weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    checks.check_sample_backward,
)


@register_fake("svit::sample")
def _(x, cell, n_iter, weight, bias, eps, backend=None):
    B, H, W, C = x.shape
    hh, ww = grid(H, W, cell)
    return (
        x.new_empty(B, hh, ww, C),
        x.new_empty(B, hh, ww, 9, cell[0] * cell[1]),
        x.new_empty(B, hh, ww, dtype=wide(x.dtype)),
    )


@register_fake("svit::sample_backward")
def _(grad, x, q, mass, cell, weight, eps, backend=None):
    C = 0 if weight is None else x.shape[3]
    return x.new_empty(x.shape), mass.new_empty(C), mass.new_empty(C)


def sample_context(ctx, inputs, output):
    x, ctx.cell, _, weight, bias, ctx.eps, ctx.backend = inputs
    _, q, mass = output
    ctx.mark_non_differentiable(q, mass)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, q, mass, weight)


def sample_gradients(ctx, grad, *_):
    x, q, mass, weight = ctx.saved_tensors
    dx, dweight, dbias = ops.sample_backward(grad.to(x.dtype), x, q, mass, ctx.cell, weight, ctx.eps, ctx.backend)
    if weight is None:
        return dx, None, None, None, None, None, None
    return dx, None, None, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None


register_autograd("svit::sample", sample_gradients, setup_context=sample_context)

# x + depthwise 3x3 convolution, of x or of GELU(x).


define("depthwise3x3(Tensor x, Tensor weight, Tensor bias, bool gelu) -> Tensor", checks.check_depthwise)
define(
    "depthwise3x3_backward(Tensor grad, Tensor x, Tensor weight, bool gelu) -> (Tensor, Tensor, Tensor)",
    checks.check_depthwise_backward,
)


@register_fake("svit::depthwise3x3")
def _(x, weight, bias, gelu, backend=None):
    return x.new_empty(x.shape)


@register_fake("svit::depthwise3x3_backward")
def _(grad, x, weight, gelu, backend=None):
    dtype = wide(x.dtype)
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=dtype), weight.new_empty(x.shape[3], dtype=dtype)


def depthwise_context(ctx, inputs, output):
    x, weight, bias, ctx.gelu, ctx.backend = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight)


def depthwise_gradients(ctx, grad):
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = ops.depthwise3x3_backward(grad.to(x.dtype), x, weight, ctx.gelu, ctx.backend)
    return dx, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None


register_autograd("svit::depthwise3x3", depthwise_gradients, setup_context=depthwise_context)


def refuse_second_derivative(name: str):
    def backward(ctx, *grads):
        raise RuntimeError(f"svit::{name} has no second derivative; use backend='reference' for double backward")

    return backward


for _name in ("sample", "depthwise3x3"):
    register_autograd(f"svit::{_name}_backward", refuse_second_derivative(_name))

# What follows a convolution of the stem, at inference: its bias, GELU, and BatchNorm as scale and shift.


define(
    "bias_gelu_affine(Tensor x, Tensor bias, Tensor scale, Tensor shift) -> Tensor",
    checks.check_bias_gelu_affine,
)


@register_fake("svit::bias_gelu_affine")
def _(x, bias, scale, shift, backend=None):
    return x.new_empty(x.shape)


def refuse_gradient(name: str):
    def backward(ctx, *grads):
        raise RuntimeError(f"svit::{name} is for inference and has no gradient")

    return backward


register_autograd("svit::bias_gelu_affine", refuse_gradient("bias_gelu_affine"))

# A block's halves as wholes. Attention: y = x + scale * attention(norm(x)), and what its backward wants if `keep`.


define(
    "super_token_attention(Tensor x, int[] cell, Tensor norm_weight, Tensor norm_bias, float eps, Tensor qkv_weight, "
    "Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias, Tensor? scale, int num_heads, bool keep) "
    "-> (Tensor y, Tensor s, Tensor q, Tensor mass)",
    lambda x, *args: checks.check_attention(x, *args[:-1]),
    lambda x, cell, *args: {"cell": cell, "num_heads": args[-2]},
)
define(
    "conv_ffn(Tensor x, Tensor residual, Tensor weight1, Tensor bias1, Tensor depthwise_weight, "
    "Tensor depthwise_bias, Tensor weight2, Tensor bias2) -> Tensor",
    checks.check_conv_ffn,
    lambda x, residual, weight1, *_: {"hidden": weight1.shape[0]},
)


@register_fake("svit::super_token_attention")
def _(x, cell, norm_weight, norm_bias, eps, qkv_weight, qkv_bias, proj_weight, proj_bias, scale, num_heads, keep,
      backend=None):  # fmt: skip
    B, H, W, C = x.shape
    hh, ww = grid(H, W, cell)
    dtype = wide(x.dtype)
    y = x.new_empty(x.shape)
    if not keep:
        return y, x.new_empty(0), x.new_empty(0), x.new_empty(0, dtype=dtype)
    q = x.new_empty(B, hh, ww, 9, cell[0] * cell[1])
    return y, x.new_empty(B, hh, ww, C), q, x.new_empty(B, hh, ww, dtype=dtype)


@register_fake("svit::conv_ffn")
def _(x, residual, weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2, backend=None):
    return residual.new_empty(residual.shape)


def attention_context(ctx, inputs, output):
    (x, ctx.cell, norm_weight, norm_bias, ctx.eps, qkv_weight, qkv_bias, proj_weight, proj_bias, scale, ctx.num_heads,
     ctx.keep, _) = inputs  # fmt: skip
    _, s, q, mass = output
    ctx.mark_non_differentiable(s, q, mass)
    ctx.norm_bias_dtype = norm_bias.dtype
    ctx.save_for_backward(x, s, q, mass, norm_weight, qkv_weight, qkv_bias, proj_weight, proj_bias, scale)


def attention_gradients(ctx, grad, *_):
    """Of the parts that the whole is made of: spreading, attention among the super tokens, sampling."""
    if not ctx.keep:
        raise RuntimeError("svit::super_token_attention keeps nothing for a backward with keep=False")
    # s is a constant here, so a second derivative would silently lack a part.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (grad, *ctx.saved_tensors)):
        refuse_second_derivative("super_token_attention")(ctx, grad)
    x, s, q, mass, norm_weight, *parameters, scale = ctx.saved_tensors
    with torch.autocast(x.device.type, enabled=False):
        ds = ops.aggregate(grad.to(q.dtype), q, ctx.cell)[0]
        ds, *dparameters, dscale = reference.attend_backward(ds, s, *parameters, scale, ctx.num_heads)
        dx, dnorm_weight, dnorm_bias = ops.sample_backward(ds.to(x.dtype), x, q, mass, ctx.cell, norm_weight, ctx.eps)
    dparameters = [d.to(p.dtype) for d, p in zip(dparameters, parameters, strict=True)]
    dnorm = dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(ctx.norm_bias_dtype)
    dscale = None if scale is None else dscale.to(scale.dtype)
    return grad.to(x.dtype) + dx, None, *dnorm, None, *dparameters, dscale, None, None, None


register_autograd("svit::super_token_attention", attention_gradients, setup_context=attention_context)


register_autograd("svit::conv_ffn", refuse_gradient("conv_ffn"))
