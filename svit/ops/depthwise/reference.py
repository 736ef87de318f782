"""The residual depthwise convolution and the stem's epilogue in plain PyTorch. Other backends are tested against it."""

import torch
import torch.nn.functional as F

from svit.ops._numerics import computes_in_16_bit, widen


def depthwise3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    """u + convolution of u + bias, with u = x or GELU(x): map (B, H, W, C) to the same shape."""
    x, weight, bias = x.permute(0, 3, 1, 2), weight.to(x.dtype), bias.to(x.dtype)
    if gelu:
        x = F.gelu(x)
    if computes_in_16_bit(x) or torch.jit.is_tracing():  # a trace would lose the shape of that kernel
        y = x + F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    else:
        # The centre tap includes the residual, which saves a pass. In 16 bit a tap of 1 + t would lose digits of t.
        identity = F.pad(weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        y = F.conv2d(x, weight + identity, bias, padding=1, groups=x.shape[1])
    return y.permute(0, 2, 3, 1)


def depthwise3x3_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gelu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias. The last two have float32 at least."""
    g, x = (widen(t.permute(0, 3, 1, 2)) for t in (grad, x))
    weight = weight.to(x.dtype)
    u = F.gelu(x) if gelu else x
    C = x.shape[1]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        g, u, weight, [C], [1, 1], [1, 1], [1, 1], False, [0, 0], C, [True, True, True]
    )
    dx = dx + g
    if gelu:
        dx = torch.ops.aten.gelu_backward(dx, x)
    return dx.permute(0, 2, 3, 1).to(grad.dtype), dweight, dbias


def bias_gelu_affine(x: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """GELU(x + bias) * scale + shift, computed in float32 at least, in the dtype of x."""
    u = widen(x)
    u = F.gelu(u + bias.to(u.dtype))
    return (u * scale.to(u.dtype) + shift.to(u.dtype)).to(x.dtype)
