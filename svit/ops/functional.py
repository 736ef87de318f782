"""The functions that users call. They differentiate, follow autocast, check their arguments and choose the backend.

Letters of the shapes: B batch, H x W pixels, C channels, hh x ww cells of P pixels with one super token each, 9 the
3 x 3 super tokens around a pixel's own cell, row-major from the top left. docs/ops.md has the maths.

`backend` is None for the best one that serves the input (svit.ops.info() tells which), or a name, which must serve it.
Whatever the backend: softmax, mass and sums run in float32 at least, and q is a constant to autograd.
"""

import torch
from torch import Tensor

from . import checks, reference
from .backends import choose
from .reference import autocasts

# TorchScript knows no other backend than the reference: each function begins with its part.


def in_compute_dtype(x: Tensor) -> Tensor:
    """x in the dtype that autocast asks for."""
    if autocasts(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def checked() -> bool:
    """Whether to look at shapes: under a compiler or tracer the comparisons would become part of the program."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def associate(x: Tensor, s: Tensor, cell: tuple[int, int], backend: str | None = None) -> Tensor:
    """Soft association of each pixel with the 9 super tokens around its cell (paper: section 3.2). No gradient.

    q = softmax over the 9 of `<pixel, super token> / sqrt(C)`. A super token outside the grid is a zero vector: its
    logit is 0 and it takes its share.

    Args:
        x: map (B, H, W, C); zero-padded on the right and the bottom to whole cells.
        s: super tokens (B, hh, ww, C), same dtype.
        cell: height and width of a cell in pixels.
        backend: see above.

    Returns:
        q (B, hh, ww, 9, P), in the dtype of x.

    Raises:
        ValueError: an argument of another shape, dtype or device, or a backend that does not serve them.
    """
    checks.expect_cell(cell)
    if checked():
        checks.check_associate(x, s, cell)
    x, s = in_compute_dtype(x.detach()), in_compute_dtype(s.detach())
    if choose("associate", x, backend) == "reference":
        return reference.associate(x, s, cell)
    return torch.ops.svit.associate(x, s, cell, backend)


def aggregate(x: Tensor, q: Tensor, cell: tuple[int, int], backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Per super token the q-weighted sum of the pixels of its 9 cells, and the mass, which is the sum of the weights.

    Linear in x and the adjoint of `spread`.

    Args:
        x: map (B, H, W, C).
        q: association (B, hh, ww, 9, P), same dtype; a constant.
        cell: height and width of a cell in pixels.
        backend: see above.

    Returns:
        total (B, hh, ww, C) and mass (B, hh, ww), float32 (float64 for float64). The super token is
        total / (mass + 1e-12).

    Raises:
        ValueError: an argument of another shape, dtype or device, a q that requires grad (the reference, asked
            by name, differentiates by it), or a backend that does not serve them.
    """
    checks.expect_cell(cell)
    checks.expect_constant(q, backend)
    if checked():
        checks.check_aggregate(x, q, cell)
    x, q = in_compute_dtype(x), in_compute_dtype(q)
    if choose("aggregate", x, backend) == "reference":
        return reference.aggregate(x, q, cell)
    return torch.ops.svit.aggregate(x, q, cell, backend)


def spread(
    s: Tensor,
    q: Tensor,
    cell: tuple[int, int],
    size: tuple[int, int],
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each pixel gets the q-weighted sum of its 9 super tokens; one outside the grid adds zero.

    Linear in s and the adjoint of `aggregate`.

    Args:
        s: super tokens (B, hh, ww, C).
        q: association (B, hh, ww, 9, P); a constant.
        cell: height and width of a cell in pixels.
        size: H and W of the map; hh x ww cells cover it.
        residual: map (B, H, W, C) to add.
        backend: see above.

    Returns:
        map (B, H, W, C), in the dtype of the residual if there is one, else of s.

    Raises:
        ValueError: an argument of another shape or device, a q that requires grad (see `aggregate`), or a backend that
            does not serve them.
    """
    if torch.jit.is_scripting():
        return reference.spread(s, q, cell, size, residual)
    else:
        checks.expect_cell(cell)
        checks.expect_constant(q, backend)
        if checked():
            checks.expect_map(s, "s")
            checks.expect_size(size, s, cell)
            checks.expect(q, "q", (s.shape[0], s.shape[1], s.shape[2], 9, cell[0] * cell[1]), s)
            if residual is not None:
                checks.expect(residual, "residual", (s.shape[0], size[0], size[1], s.shape[3]), s)
        if choose("spread", s, backend) == "reference":
            return reference.spread(s, q, cell, size, residual)
        s = in_compute_dtype(s)
        return torch.ops.svit.spread(s, q.to(s.dtype), cell, size, residual, backend)


def sample(
    x: Tensor,
    cell: tuple[int, int],
    n_iter: int = 1,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    differentiable: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Super-token sampling (paper: section 3.2): cell means, then `n_iter` times `associate` and `aggregate`.

    Args:
        x: map (B, H, W, C).
        cell: height and width of a cell in pixels.
        n_iter: rounds of association, at least 1.
        weight: (C,), or None. With it x is layer-normed over its channels first; the padding is zero after the norm.
        bias: (C,), or None where `weight` is.
        eps: of that norm.
        differentiable: lets the gradient through the association too, which only the reference does.
        backend: see above.

    Returns:
        super tokens (B, hh, ww, C) and association q (B, hh, ww, 9, P), in the dtype of x; under autocast a fused
        backend gives them in its dtype.

    Raises:
        ValueError: an argument of another shape, dtype or device, or a backend that does not serve them.
    """
    if torch.jit.is_scripting():
        s, q, _ = reference.sample(x, cell, n_iter, weight, bias, eps, differentiable)
        return s, q
    else:
        checks.expect_cell(cell)
        checks.expect_rounds(n_iter)
        if checked():
            checks.check_sample(x, cell, n_iter, weight, bias, eps)
        if differentiable:
            checks.expect_reference(backend)
            backend = "reference"
        y = in_compute_dtype(x)
        if choose("sample", y, backend) == "reference":
            s, q, _ = reference.sample(x, cell, n_iter, weight, bias, eps, differentiable)
        else:
            s, q, _ = torch.ops.svit.sample(y, cell, n_iter, weight, bias, eps, backend)
        return s, q


def depthwise3x3(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False, backend: str | None = None) -> Tensor:
    """u + depthwise 3x3 convolution of u, zero-padded, with u = x, or u = GELU(x) (exact) if `gelu`.

    Args:
        x: map (B, H, W, C).
        weight: (C, 1, 3, 3).
        bias: (C,).
        gelu: apply the GELU first.
        backend: see above.

    Returns:
        map (B, H, W, C), in the dtype of x.

    Raises:
        ValueError: an argument of another shape or device, or a backend that does not serve them.
    """
    if torch.jit.is_scripting():
        return reference.depthwise3x3(x, weight, bias, gelu)
    else:
        if checked():
            checks.check_depthwise(x, weight, bias, gelu)
        # Autocast has no say: the sum is a residual's, and keeps the dtype of x on every backend.
        if choose("depthwise3x3", x, backend) == "reference":
            return reference.depthwise3x3(x, weight, bias, gelu)
        return torch.ops.svit.depthwise3x3(x, weight, bias, gelu, backend)


def bias_gelu_affine(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, backend: str | None = None) -> Tensor:
    """GELU(x + bias) * scale + shift, channel by channel: what follows a convolution of the stem at inference.

    The bias is the convolution's, scale and shift are the BatchNorm's: weight / sqrt(var + eps) and
    bias - mean * scale. A fused backend does it in one pass; where gradients are wanted, the reference runs.

    Args:
        x: map (B, H, W, C), the result of a convolution without its bias.
        bias, scale, shift: (C,).
        backend: see above.

    Returns:
        map (B, H, W, C), in the dtype of x; computed in float32 at least.

    Raises:
        ValueError: an argument of another shape or device, or a backend that does not serve them.
    """
    if torch.jit.is_scripting():
        return reference.bias_gelu_affine(x, bias, scale, shift)
    else:
        if checked():
            checks.check_bias_gelu_affine(x, bias, scale, shift)
        differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in (x, bias, scale, shift))
        if choose("bias_gelu_affine", x, backend) == "reference" or differentiates:
            return reference.bias_gelu_affine(x, bias, scale, shift)
        return torch.ops.svit.bias_gelu_affine(x, bias, scale, shift, backend)


def super_token_attention(
    x: Tensor,
    cell: tuple[int, int],
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    num_heads: int,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x + scale * attention(norm(x)): the first half of a block, with one round of association (paper: section 3.2).

    Where no backend has it as a whole it is made of `sample` and `spread`.

    Args:
        x: map (B, H, W, C).
        cell: height and width of a cell in pixels.
        norm_weight, norm_bias: (C,), of the layer norm.
        eps: of that norm.
        qkv_weight, qkv_bias: (3C, C) and (3C,); outputs come head by head, in each the queries, keys, values.
        proj_weight, proj_bias: (C, C) and (C,).
        num_heads: a divisor of C.
        scale: (B, C), factors of the result before it is added (layer scale, drop path), or None.
        backend: see above.

    Returns:
        map (B, H, W, C), in the dtype of x.

    Raises:
        ValueError: an argument of another shape or device, or a backend that does not serve them.
    """
    parameters = qkv_weight, qkv_bias, proj_weight, proj_bias
    if checked():
        checks.check_attention(x, cell, norm_weight, norm_bias, eps, *parameters, scale, num_heads)
    sizes = {"cell": cell, "num_heads": num_heads}
    if choose("super_token_attention", x, backend, **sizes) == "reference":
        s, q = sample(x, cell, 1, norm_weight, norm_bias, eps, backend=backend)
        s = reference.attend(s, *parameters, num_heads)
        if scale is not None:
            s = s * scale[:, None, None].to(s.dtype)
        return spread(s, q, cell, (x.shape[1], x.shape[2]), residual=x, backend=backend)
    tensors = x, norm_weight, norm_bias, *parameters, scale
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    op = torch.ops.svit.super_token_attention
    return op(x, cell, norm_weight, norm_bias, eps, *parameters, scale, num_heads, keep, backend)[0]


def conv_ffn(
    x: Tensor,
    residual: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    backend: str | None = None,
) -> Tensor:
    """residual + conv-FFN of x, the second half of a block: 1x1 conv, GELU, u + depthwise conv of u, 1x1 conv.

    Where no backend has it as a whole, and where gradients are wanted, it is made of `depthwise3x3` and products.

    Args:
        x: map (B, H, W, C), normalised (BatchNorm is folded into `weight1`, or was applied).
        residual: map to add, same shape and dtype.
        weight1, bias1: (hidden, C) and (hidden,).
        depthwise_weight, depthwise_bias: (hidden, 1, 3, 3) and (hidden,).
        weight2, bias2: (C, hidden) and (C,).
        backend: see above.

    Returns:
        map (B, H, W, C), in the dtype of x.

    Raises:
        ValueError: an argument of another shape or device, or a backend that does not serve them.
    """
    tensors = x, residual, weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2
    if checked():
        checks.check_conv_ffn(*tensors)
    differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if differentiates or choose("conv_ffn", x, backend, hidden=weight1.shape[0]) == "reference":
        u = torch.nn.functional.linear(x, weight1.to(x.dtype), bias1.to(x.dtype))
        u = depthwise3x3(u, depthwise_weight, depthwise_bias, gelu=True, backend=backend)
        return residual + torch.nn.functional.linear(u, weight2.to(x.dtype), bias2.to(x.dtype))
    return torch.ops.svit.conv_ffn(*tensors, backend)
