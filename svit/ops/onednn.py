"""The oneDNN backend: inference on a CPU.

This module says what it serves, and keeps weights in oneDNN's own layout. conv_ffn/onednn.py has the conv-FFN.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _dispatch

# Without AVX512 or the like oneDNN refuses what PyTorch's own convolution computes.
BFLOAT16 = hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def usable(
    op: str, x: torch.Tensor, hidden: int = 0, residual: bool = True, weights: Sequence[torch.Tensor] = ()
) -> tuple[bool, str]:
    """Whether this backend serves `op` on the map x (B, H, W, C) with these weights, and if not, why."""
    if type(x) is not torch.Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False, "x is traced"
    if torch.is_grad_enabled():
        return False, "autograd is on"
    # `transformed` and `autocast_dtype` are inlined: every step of a model calls this.
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False, "torch.func or forward-mode AD is at work"
    if x.device.type != "cpu":
        return False, f"x is on {x.device.type}"
    autocasts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if autocasts else x.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return False, f"it computes in float32 and bfloat16, not in {dtype}"
    if dtype == torch.bfloat16 and not BFLOAT16:
        return False, "this CPU has no instructions for bfloat16"
    if not (torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False, "this PyTorch has no oneDNN, or it is switched off"
    if torch._C._len_torch_dispatch_stack() > 0:
        return False, "a dispatch mode (a FLOP counter, say) wants to see each operation"
    if torch._C._len_torch_function_stack() and _dispatch.has_function_mode():
        return False, "a mode of __torch_function__ wants to see each operation"
    for weight in weights:
        if weight.device != x.device:
            return False, f"a weight is on {weight.device}"
        if weight.dtype != x.dtype and not autocasts:
            return False, f"a weight is {weight.dtype}, x is {x.dtype}"
    return True, ""


BACKEND = _dispatch.add_backend("onednn", usable)


class PackedWeight:
    """Keeps a convolution's weight in oneDNN's layout for maps of one shape.

    Given a plain weight, oneDNN converts it at every call. For a small map that takes longer than the convolution. This
    object converts it at the first call, and again if the weight or the shape of the map changes. (The layout for one
    shape can be 50 times as slow on another.) Copies and files hold no converted weight.
    """

    def __init__(self) -> None:
        self.kept: tuple[tuple[Any, ...], torch.Tensor, torch.Tensor] | None = None  # key, some values, the layout

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        return PackedWeight()

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, ()


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    gelu: bool = False,
    residual: torch.Tensor | None = None,
    packed: PackedWeight | None = None,
) -> torch.Tensor:
    """Convolves a map (B, C, H, W), without groups, and applies the exact GELU or adds a residual in the same pass.

    Args:
        x: map (B, C, H, W).
        weight: (C', C, kernel height, kernel width).
        bias: (C',) or None.
        stride, padding: of the convolution.
        gelu: apply the GELU.
        residual: map (B, C', H', W') to add, in the dtype of x, or None.
        packed: keeps the weight in oneDNN's layout. It notices a change of the weight by its version. It notices a
            change through `weight.data` only if the first value of an output channel changes.

    Returns:
        map (B, C', H', W'), channels-last if x is.
    """
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    if packed is not None and dense and not weight.is_inference() and x.numel() and weight.numel():
        key = weight.data_ptr(), weight._version, weight.dtype, x.shape
        values = weight.as_strided((weight.shape[0],), (weight.stride(0),))  # the first of each output channel
        kept = packed.kept
        if kept is None or kept[0] != key or not torch.equal(kept[1], values):
            weight = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]  # its stub lacks the last
                weight.detach().to_mkldnn(), list(padding), list(stride), [1, 1], 1, list(x.shape)
            )
            packed.kept = key, values.detach().clone(), weight
        else:
            weight = kept[2]
    where = list(padding), list(stride), [1, 1], 1
    # With one channel or one pixel the strides fit every memory format, and PyTorch would not convert the residual.
    adds = residual is not None and (residual.shape[1] == 1 or residual.shape[2] * residual.shape[3] == 1)
    if residual is not None and not adds:
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, weight, bias, *where, "add", None, None, [], None
        )
    y = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *where, "gelu" if gelu else "none", [], "none")
    return residual + y if adds else y
