"""The conv-FFN half of a block, for inference: residual + conv-FFN(x). README.md has the maths.

It is a composite of `depthwise3x3` and matrix products. The CUDA library runs it as one kernel, oneDNN in tiles.
"""

from functools import partial

import torch
from torch import Tensor

from svit.ops._checks import checked, expect, expect_map
from svit.ops._dispatch import choose
from svit.ops.depthwise import depthwise3x3

from . import reference


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
    """Computes residual + conv-FFN(x), the second half of a block: 1x1 conv, GELU, u + depthwise conv of u, 1x1 conv.

    A backend that has it runs it fused. Otherwise, and if a tensor requires grad, it runs as `depthwise3x3` and matrix
    products.

    Args:
        x: map (B, H, W, C), after the BatchNorm unless that is folded into `weight1`.
        residual: map to add, same shape and dtype.
        weight1: (hidden, C).
        bias1: (hidden,).
        depthwise_weight: (hidden, 1, 3, 3).
        depthwise_bias: (hidden,).
        weight2: (C, hidden).
        bias2: (C,).
        backend: None for the best backend that serves the input, or the name of one that must serve it.

    Returns:
        map (B, H, W, C), in the dtype of x.

    Raises:
        ValueError: an argument of another shape or device, or a backend that does not serve them.
    """
    tensors = x, residual, weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2
    if checked():
        check_conv_ffn(*tensors)
    differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if differentiates or choose("conv_ffn", x, backend, hidden=weight1.shape[0]) == "reference":
        return reference.conv_ffn(*tensors, depthwise=partial(depthwise3x3, backend=backend)).to(x.dtype)
    return torch.ops.svit.conv_ffn(*tensors, backend)


def check_conv_ffn(
    x: Tensor,
    residual: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> None:
    expect_map(x)
    expect(residual, "residual", x.shape, x, x.dtype)
    C, hidden = x.shape[3], weight1.shape[0]
    expect(weight1, "weight1", (hidden, C), x)
    expect(bias1, "bias1", (hidden,), x)
    expect(depthwise_weight, "depthwise_weight", (hidden, 1, 3, 3), x)
    expect(depthwise_bias, "depthwise_bias", (hidden,), x)
    expect(weight2, "weight2", (C, hidden), x)
    expect(bias2, "bias2", (C,), x)
