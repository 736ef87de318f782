"""The residual depthwise convolution and the stem's epilogue in plain PyTorch: the oracle of every other backend."""

import torch
import torch.nn.functional as F

from svit.ops._numerics import computes_in_16_bit, widen


def depthwise3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    x, weight, bias = x.permute(0, 3, 1, 2), weight.to(x.dtype), bias.to(x.dtype)
    if gelu:
        x = F.gelu(x)
    if computes_in_16_bit(x) or torch.jit.is_tracing():  # a trace would not know that kernel's shape
        y = x + F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    else:
        # The centre tap takes the residual in, which saves a pass; in 16 bit it would lose digits to the 1.
        identity = F.pad(weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        y = F.conv2d(x, weight + identity, bias, padding=1, groups=x.shape[1])
    return y.permute(0, 2, 3, 1)


def depthwise3x3_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gelu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias; the last two float32 at least."""
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
    """GELU(x + bias) * scale + shift, float32 at least, to the dtype of x."""
    u = widen(x)
    u = F.gelu(u + bias.to(u.dtype))
    return (u * scale.to(u.dtype) + shift.to(u.dtype)).to(x.dtype)
