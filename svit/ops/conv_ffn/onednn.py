"""The conv-FFN for inference on a CPU, through oneDNN.

Its hidden map is four times as large as its input. As a whole it passes through memory six times, each time in newly
allocated memory with its page faults. In tiles of rows it stays in the cache. The first convolution applies the GELU,
the second one adds the residual.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from svit.ops._numerics import autocast_dtype
from svit.ops.onednn import BACKEND, PackedWeight, convolution, usable  # noqa: F401

from .composition import conv_ffn_half

# Elements of the hidden map in one tile: 8 MiB in float32, 4 in bfloat16, the best sizes tried (docs/performance.md).
TILE = 2**21

# Below this number of pixels in a tile, oneDNN takes longer to reorder a plain weight than it saves.
FEW = 256


def conv_ffn(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    depthwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    residual: torch.Tensor | None = None,
    packed: Sequence[PackedWeight] | None = None,
) -> torch.Tensor:
    """1x1 conv, exact GELU, u + depthwise 3x3 conv of u, 1x1 conv, plus the residual if there is one.

    It is not differentiable.

    Args:
        x: map (B, C, H, W).
        weight1, bias1: (hidden, C, 1, 1) and (hidden,).
        depthwise_weight, depthwise_bias: (hidden, 1, 3, 3) and (hidden,).
        weight2, bias2: (C, hidden, 1, 1) and (C,).
        residual: map (B, C, H, W) to add, or None.
        packed: keep `weight1` and `weight2` in oneDNN's layout from call to call, or None.

    Returns:
        map (B, C, H, W), channels-last, in the dtype of the residual, or of x (under autocast: autocast's) without one.
    """
    dtype = autocast_dtype(x)
    x = x.to(dtype, memory_format=torch.channels_last)
    bias1, bias2, depthwise_bias = bias1.to(dtype), bias2.to(dtype), depthwise_bias.to(dtype)
    B, C, H, W = x.shape
    hidden = weight1.shape[0]
    rows = max(TILE // (hidden * W), 4)
    images, rows = min(max(rows // H, 1), max(B, 1)), min(rows, H)
    alike = rows == H and B % images == 0  # all tiles have one shape
    packed1 = packed2 = None
    if packed is not None and alike and weight1.dtype == weight2.dtype == dtype:
        packed1, packed2 = packed
    weight1, weight2 = weight1.to(dtype), weight2.to(dtype)
    taps = depthwise_weight.to(dtype)
    if dtype == torch.float32:  # the centre tap includes the residual; in 16 bit 1 + t would lose digits of t
        taps = taps + F.pad(taps.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
    depthwise = partial(F.conv2d, weight=taps, bias=depthwise_bias, padding=1, groups=hidden)
    expand = partial(convolution, weight=weight1, bias=bias1, gelu=True, packed=packed1)
    project = partial(convolution, weight=weight2, bias=bias2, packed=packed2)
    if images * rows * W < FEW and packed1 is None:
        expand, project = partial(product, weight1, bias1, True), partial(product, weight2, bias2, False)
    depthwise_of_gelu = depthwise if dtype == torch.float32 else lambda u: depthwise(u) + u
    joins = residual is None or residual.dtype == dtype

    if rows == H and images == B and joins:
        return conv_ffn_half(x, None, expand, depthwise_of_gelu, partial(project, residual=residual))
    out = torch.empty(
        B, weight2.shape[0], H, W,
        dtype=dtype if residual is None else residual.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    for image in range(0, B, images):
        for row in range(0, H, rows):
            first = max(row - 1, 0)  # the depthwise convolution reads one row beyond the tile, on both sides
            tile = x[image : image + images, :, first : row + rows + 1]
            inside = slice(None), slice(None), slice(row - first, row - first + rows)
            here = slice(image, image + images), slice(None), slice(row, row + rows)
            added = None if residual is None else residual[here]
            project_tile = partial(project_rows, project, inside, added if joins else None)
            out[here] = conv_ffn_half(tile, None if joins else added, expand, depthwise_of_gelu, project_tile)
    return out


def project_rows(
    project: Callable[..., Any], rows: tuple[slice, ...], residual: torch.Tensor | None, u: torch.Tensor
) -> torch.Tensor:
    return project(u[rows], residual=residual)


def product(
    weight: torch.Tensor, bias: torch.Tensor, gelu: bool, x: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes what `convolution` does as a matrix product, for a plain weight and few pixels; channels-last."""
    y = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    y = F.gelu(y) if gelu else y
    return y if residual is None else residual + y


def run_conv_ffn(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    depthwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    """The op: maps (B, H, W, C), weights of the 1x1 convolutions as matrices. A layer may set their `packed`."""
    packed: list[Any] = [getattr(weight, "packed", None) for weight in (weight1, weight2)]
    y = conv_ffn(
        x.permute(0, 3, 1, 2), weight1[:, :, None, None], bias1, depthwise_weight, depthwise_bias,
        weight2[:, :, None, None], bias2, None if residual is None else residual.permute(0, 3, 1, 2),
        None if None in packed else packed,
    )  # fmt: skip
    return y.permute(0, 2, 3, 1)
