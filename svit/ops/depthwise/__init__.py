"""The residual depthwise 3x3 convolution, and the stem's bias, GELU and BatchNorm in one pass. README.md has the maths.

Letters of the shapes: B batch, H x W pixels, C channels. `backend` is None for the best backend that serves the input
(`svit.ops.info()` prints it), or the name of one that must serve it.
"""

import torch
from torch import Tensor

from svit.ops._checks import checked, expect, expect_map
from svit.ops._dispatch import choose

from . import reference


def depthwise3x3(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False, backend: str | None = None) -> Tensor:
    """Adds to u its depthwise 3x3 convolution, zero-padded, with u = x, or u = GELU(x) if `gelu`.

    The GELU is exact. In 16 bit a fused backend computes it with an error of at most 2.6e-5 before rounding.

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
            check_depthwise(x, weight, bias, gelu)
        # The result is a residual stream's, so it keeps the dtype of x on every backend, also under autocast.
        if choose("depthwise3x3", x, backend) == "reference":
            return reference.depthwise3x3(x, weight, bias, gelu).to(x.dtype)
        return torch.ops.svit.depthwise3x3(x, weight, bias, gelu, backend)


def bias_gelu_affine(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, backend: str | None = None) -> Tensor:
    """Computes GELU(x + bias) * scale + shift for each channel: what follows a convolution of the stem at inference.

    The bias is the convolution's. Scale and shift are the BatchNorm's: weight / sqrt(var + eps) and
    bias - mean * scale. A fused backend runs it in one pass. If a tensor requires grad, the reference runs.

    Args:
        x: map (B, H, W, C), the result of a convolution without its bias.
        bias: (C,).
        scale: (C,).
        shift: (C,).
        backend: see above.

    Returns:
        map (B, H, W, C), in the dtype of x. The computation runs in float32 at least.

    Raises:
        ValueError: an argument of another shape or device, or a backend that does not serve them.
    """
    if torch.jit.is_scripting():
        return reference.bias_gelu_affine(x, bias, scale, shift)
    else:
        if checked():
            check_bias_gelu_affine(x, bias, scale, shift)
        differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in (x, bias, scale, shift))
        if choose("bias_gelu_affine", x, backend) == "reference" or differentiates:
            return reference.bias_gelu_affine(x, bias, scale, shift)
        return torch.ops.svit.bias_gelu_affine(x, bias, scale, shift, backend)


def check_depthwise(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> None:
    expect_map(x)
    expect(weight, "weight", (x.shape[3], 1, 3, 3), x)
    expect(bias, "bias", (x.shape[3],), x)


def check_depthwise_backward(grad: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> None:
    expect_map(x)
    expect(grad, "grad", x.shape, x, x.dtype)
    expect(weight, "weight", (x.shape[3], 1, 3, 3), x)


def check_bias_gelu_affine(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> None:
    expect_map(x)
    for name, t in (("bias", bias), ("scale", scale), ("shift", shift)):
        expect(t, name, (x.shape[3],), x)
