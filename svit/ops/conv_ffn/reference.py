"""The conv-FFN half of a block in plain PyTorch. Other backends are tested against it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from svit.ops.depthwise.reference import depthwise3x3

from .composition import conv_ffn_half


def conv_ffn(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    depthwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    depthwise: Callable[..., torch.Tensor] = depthwise3x3,
) -> torch.Tensor:
    """residual + 1x1 conv of u + depthwise conv of u, with u = GELU(1x1 conv of x)."""
    return conv_ffn_half(
        x,
        residual,
        expand=lambda x: F.linear(x, weight1.to(x.dtype), bias1.to(x.dtype)),
        depthwise_of_gelu=lambda u: depthwise(u, depthwise_weight, depthwise_bias, gelu=True),
        project=lambda u: F.linear(u, weight2.to(x.dtype), bias2.to(x.dtype)),
    )
