"""The conv-FFN for inference on a CPU, through oneDNN.

Its hidden map is four times its input. In one piece it goes through memory six times and, being fresh memory at each
step, costs as many page faults; in tiles of rows it stays in the cache, and the GELU runs inside the first convolution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from svit.ops import _dispatch
from svit.ops._numerics import autocast_dtype, autocasts

# Elements of the hidden map in one tile: 8 MiB in float32, 4 in bfloat16, the best sizes tried (docs/performance.md).
TILE = 2**21


def usable(
    op: str, x: torch.Tensor, hidden: int = 0, residual: bool = True, weights: Sequence[torch.Tensor] = ()
) -> tuple[bool, str]:
    """Whether this backend serves `op` on the map x (B, H, W, C), with these weights if given, and if not, why."""
    if type(x) is not torch.Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False, "x is traced"
    if torch.is_grad_enabled():
        return False, "autograd is on"
    if _dispatch.transformed():
        return False, "torch.func or forward-mode AD is at work"
    if x.device.type != "cpu":
        return False, f"x is on {x.device.type}"
    if autocast_dtype(x) not in (torch.float32, torch.bfloat16):
        return False, f"it computes in float32 and bfloat16, not in {autocast_dtype(x)}"
    if not (torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False, "this PyTorch has no oneDNN, or it is switched off"
    if torch._C._len_torch_dispatch_stack() > 0:
        return False, "a dispatch mode (a FLOP counter, say) wants to see each operation"
    if torch._C._len_torch_function_stack() and _dispatch.has_function_mode():
        return False, "a mode of __torch_function__ wants to see each operation"
    for weight in weights:
        if weight.device != x.device:
            return False, f"a weight is on {weight.device}"
        if weight.dtype != x.dtype and not autocasts("cpu"):
            return False, f"a weight is {weight.dtype}, x is {x.dtype}"
    return True, ""


def conv_ffn(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    depthwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """1x1 conv, exact GELU, u + depthwise 3x3 conv of u, 1x1 conv, plus the residual if there is one.

    x and residual (B, C, H, W); weights (4C, C, 1, 1), (4C, 1, 3, 3), (C, 4C, 1, 1) for a ratio of 4, biases to match;
    to (B, C, H, W), channels-last, in the dtype of the residual if there is one. Not differentiable.
    """
    dtype = autocast_dtype(x)
    x, weight1, bias1 = x.to(dtype), weight1.to(dtype), bias1.to(dtype)
    taps, depthwise_bias = depthwise_weight.to(dtype), depthwise_bias.to(dtype)
    hidden = weight1.shape[0]
    in_taps = dtype == torch.float32  # the centre tap takes the sum in; in 16 bit it would lose digits to the 1
    if in_taps:
        taps = taps + F.pad(taps.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
    B, C, H, W = x.shape
    rows = max(TILE // (hidden * W), 4)
    images = max(rows // H, 1)
    rows = min(rows, H)
    out = torch.empty(
        B, weight2.shape[0], H, W,
        dtype=dtype if residual is None else residual.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    for image in range(0, B, images):
        for row in range(0, H, rows):
            first = max(row - 1, 0)  # the depthwise convolution looks one row beyond the tile, on both sides
            tile = x[image : image + images, :, first : row + rows + 1]
            u = torch.ops.mkldnn._convolution_pointwise(
                tile, weight1, bias1, [0, 0], [1, 1], [1, 1], 1, "gelu", [], "none"
            )
            v = F.conv2d(u, taps, depthwise_bias, padding=1, groups=hidden)
            v = v if in_taps else v + u
            y = F.conv2d(v[:, :, row - first : row - first + rows], weight2, bias2)
            here = (slice(image, image + images), slice(None), slice(row, row + rows))
            out[here] = y if residual is None else residual[here] + y
    return out


def run_conv_ffn(
    x: torch.Tensor, residual: torch.Tensor | None, weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2
) -> torch.Tensor:
    """The op: maps (B, H, W, C), weights of the 1x1 convolutions as matrices."""
    y = conv_ffn(
        x.permute(0, 3, 1, 2), weight1[:, :, None, None], bias1, depthwise_weight, depthwise_bias,
        weight2[:, :, None, None], bias2, None if residual is None else residual.permute(0, 3, 1, 2),
    )  # fmt: skip
    return y.permute(0, 2, 3, 1)


BACKEND = _dispatch.add_backend("onednn", usable)
