"""The attention half of a block: x + scale * attention(norm(x)). README.md has the maths.

It is a composite of `sample` and `spread`. The CUDA library runs it as one kernel.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from svit.ops._checks import checked, expect, expect_cell, expect_map
from svit.ops._dispatch import choose
from svit.ops.super_token import sample, spread

from . import reference
from .composition import attention_half


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
    """Computes x + scale * attention(norm(x)), the attention half of a block, with one round of association (paper:
    section 3.2).

    A backend that has it runs it as one kernel. Otherwise it runs as `sample` and `spread`.

    Args:
        x: map (B, H, W, C).
        cell: height and width of a cell in pixels.
        norm_weight: (C,), of the layer norm.
        norm_bias: (C,), of the layer norm.
        eps: of that norm.
        qkv_weight: (3C, C). Outputs are in the order of the heads: queries, keys and values of each.
        qkv_bias: (3C,).
        proj_weight: (C, C).
        proj_bias: (C,).
        num_heads: a divisor of C.
        scale: (B, C), factors of the attention's result (layer scale, drop path), or None.
        backend: None for the best backend that serves the input, or the name of one that must serve it.

    Returns:
        map (B, H, W, C), in the dtype of x.

    Raises:
        ValueError: an argument of another shape or device, or a backend that does not serve them.
    """
    parameters = qkv_weight, qkv_bias, proj_weight, proj_bias
    if checked():
        check_attention(x, cell, norm_weight, norm_bias, eps, *parameters, scale, num_heads)
    if choose("super_token_attention", x, backend, cell=cell, num_heads=num_heads) == "reference":
        return attention_half(
            x, cell, 1, norm_weight, norm_bias, eps,
            attend=lambda s: reference.attend(s, *parameters, num_heads),
            scale=None if scale is None else lambda s: s * scale[:, None, None].to(s.dtype),
            residual=x, sample=partial(sample, backend=backend), spread=partial(spread, backend=backend),
        )[0]  # fmt: skip
    tensors = x, norm_weight, norm_bias, *parameters, scale
    save_for_backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    op = torch.ops.svit.super_token_attention
    return op(x, cell, norm_weight, norm_bias, eps, *parameters, scale, num_heads, save_for_backward, backend)[0]


def expect_linear(weight: Tensor, bias: Tensor, name: str, outputs: int, inputs: int, x: Tensor) -> None:
    expect(weight, f"{name}_weight", (outputs, inputs), x)
    expect(bias, f"{name}_bias", (outputs,), x)


def check_attention(
    x: Tensor,
    cell: Sequence[int],
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    scale: Tensor | None,
    num_heads: int,
) -> None:
    expect_map(x)
    expect_cell(cell)
    C = x.shape[3]
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        expect(t, name, (C,), x)
    if num_heads < 1 or C % num_heads:
        raise ValueError(f"num_heads: expected a divisor of {C} channels, got {num_heads}")
    expect_linear(qkv_weight, qkv_bias, "qkv", 3 * C, C, x)
    expect_linear(proj_weight, proj_bias, "proj", C, C, x)
    if scale is not None:
        expect(scale, "scale", (x.shape[0], C), x)
