"""The attention half of a block in plain PyTorch. Other backends are tested against it. Letters as in super_token."""

import torch
import torch.nn.functional as F

from svit.ops._dispatch import transformed
from svit.ops._numerics import widen
from svit.ops.super_token.reference import sample, spread

from .composition import attention_half


def attend(
    s: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Self-attention among all super tokens of an image: (B, hh, ww, C) to the same shape. qkv is ordered by heads.

    It is differentiable any number of times, forward and backward.
    """
    B, hh, ww, C = s.shape
    qkv = F.linear(s.flatten(1, 2), qkv_weight.to(s.dtype), qkv_bias.to(s.dtype))
    q, k, v = qkv.reshape(B, hh * ww, num_heads, 3, C // num_heads).transpose(1, 2).unbind(3)
    if transformed() or (torch.is_grad_enabled() and qkv.requires_grad):
        # PyTorch's fused attention has no jvp and no second derivative.
        result = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    else:
        result = F.scaled_dot_product_attention(q, k, v)
    result = result.transpose(1, 2).reshape(B, hh, ww, C)
    return F.linear(result, proj_weight.to(s.dtype), proj_bias.to(s.dtype))


def attend_backward(
    grad: torch.Tensor,
    s: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    scale: torch.Tensor | None,
    num_heads: int,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `attend(s, ...) * scale`: of s, the four parameters and scale (B, C), in float32 at least.

    It runs inside a backward, where compilers cannot differentiate, so the formulas are written out.
    """
    B, hh, ww, C = s.shape
    d = C // num_heads
    s, qkv_weight, qkv_bias, proj_weight, proj_bias = map(widen, (s, qkv_weight, qkv_bias, proj_weight, proj_bias))
    s, grad = s.flatten(1, 2), widen(grad).flatten(1, 2)  # (B, N, C)
    q, k, v = F.linear(s, qkv_weight, qkv_bias).reshape(B, -1, num_heads, 3, d).transpose(1, 2).unbind(3)
    weights = (q @ k.transpose(-1, -2) * d**-0.5).softmax(-1)  # (B, heads, N, N)
    result = (weights @ v).transpose(1, 2).reshape(B, -1, C)
    dscale = (grad * F.linear(result, proj_weight, proj_bias)).sum(1)
    if scale is not None:
        grad = grad * widen(scale).unsqueeze(1)
    dproj = torch.einsum("bno,bni->oi", grad, result), grad.sum((0, 1))
    dresult = (grad @ proj_weight).reshape(B, -1, num_heads, d).transpose(1, 2)
    dweights = dresult @ v.transpose(-1, -2)
    dlogits = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * d**-0.5
    dqkv = torch.stack([dlogits @ k, dlogits.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dresult], dim=3)
    dqkv = dqkv.transpose(1, 2).reshape(B, -1, 3 * C)
    ds = (dqkv @ qkv_weight).reshape(B, hh, ww, C)
    return ds, torch.einsum("bno,bni->oi", dqkv, s), dqkv.sum((0, 1)), *dproj, dscale


def super_token_attention(
    x: torch.Tensor,
    cell: tuple[int, int],
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    scale: torch.Tensor | None,
    num_heads: int,
    save_for_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x + scale * attention(norm(x)), and s, q and mass of the sampling. They are empty without `save_for_backward`."""
    y, s, q, mass = attention_half(
        x, cell, 1, norm_weight, norm_bias, eps,
        attend=lambda s: attend(s, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads),
        scale=None if scale is None else lambda s: s * scale[:, None, None].to(s.dtype),
        residual=x, sample=sample, spread=spread,
    )  # fmt: skip
    return (y, s, q, mass) if save_for_backward else (y, s.new_empty(0), q.new_empty(0), mass.new_empty(0))
