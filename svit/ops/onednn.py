"""The conv-FFN for inference on a CPU, through oneDNN.

Its hidden map is four times its input. In one piece it goes through memory six times and, being fresh memory at each
step, costs as many page faults; in tiles of rows it stays in the cache, and the GELU runs inside the first convolution.
"""

import torch
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .backends import transformed
from .reference import autocasts, depthwise3x3

# Elements of the hidden map in one tile: 8 MiB in float32, 4 in bfloat16, the best sizes tried (docs/performance.md).
TILE = 2**21


def usable(x: torch.Tensor, *weights: torch.Tensor) -> tuple[bool, str]:
    """Whether `conv_ffn` serves a map x, with these weights if they are given, and if not, why."""
    if type(x) is not torch.Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False, "x is traced"
    if torch.is_grad_enabled():
        return False, "autograd is on"
    if transformed():
        return False, "torch.func or forward-mode AD is at work"
    if x.device.type != "cpu":
        return False, f"x is on {x.device.type}"
    if compute_dtype(x) not in (torch.float32, torch.bfloat16):
        return False, f"it computes in float32 and bfloat16, not in {compute_dtype(x)}"
    if not (torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False, "this PyTorch has no oneDNN, or it is switched off"
    if torch._C._len_torch_dispatch_stack() > 0:
        return False, "a dispatch mode (a FLOP counter, say) wants to see each operation"
    if watched():
        return False, "a mode of __torch_function__ wants to see each operation"
    for weight in weights:
        if weight.device != x.device:
            return False, f"a weight is on {weight.device}"
        if weight.dtype != x.dtype and not autocasts("cpu"):
            return False, f"a weight is {weight.dtype}, x is {x.dtype}"
    return True, ""


def watched() -> bool:
    """Whether a mode of `__torch_function__` is on, other than that of `torch.device`, which all factories know."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type) else x.dtype


def conv_ffn(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    depthwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    """1x1 conv, exact GELU, u + depthwise 3x3 conv of u, 1x1 conv.

    x (B, C, H, W); weights (4C, C, 1, 1), (4C, 1, 3, 3), (C, 4C, 1, 1) for a ratio of 4, biases to match; to
    (B, C, H, W), channels-last. Not differentiable.
    """
    dtype = compute_dtype(x)
    x, weight1, bias1 = x.to(dtype), weight1.to(dtype), bias1.to(dtype)
    B, C, H, W = x.shape
    rows = max(TILE // (weight1.shape[0] * W), 4)
    images = max(rows // H, 1)
    rows = min(rows, H)
    out = torch.empty(B, weight2.shape[0], H, W, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    for image in range(0, B, images):
        for row in range(0, H, rows):
            first = max(row - 1, 0)  # the depthwise convolution looks one row beyond the tile, on both sides
            tile = x[image : image + images, :, first : row + rows + 1]
            u = torch.ops.mkldnn._convolution_pointwise(
                tile, weight1, bias1, [0, 0], [1, 1], [1, 1], 1, "gelu", [], "none"
            )
            u = depthwise3x3(u.permute(0, 2, 3, 1), depthwise_weight, depthwise_bias).permute(0, 3, 1, 2)
            u = u[:, :, row - first : row - first + rows]
            out[image : image + images, :, row : row + rows] = F.conv2d(u, weight2, bias2)
    return out
