"""Counts the parameters and multiply-accumulates (MACs) of a model with fvcore. docs/flops.md says what counts.

fvcore counts an unknown operation as 0. `HANDLES` adds operations that multiply matrices. `UNCOUNTED` names those that
count as 0 on purpose. Any other unknown operation is reported with the result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from svit.layers.checks import pair

if TYPE_CHECKING:
    from fvcore.nn import FlopCountAnalysis

__all__ = ["HANDLES", "UNCOUNTED", "Count", "analysis", "count"]

Handle = Callable[[list[Any], list[Any]], int]


def matmul_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of a @ b with operands of any rank. fvcore's own handle refuses vectors and misses the broadcasting of a."""
    return prod(outputs[0].type().sizes()) * inputs[0].type().sizes()[-1]


def attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of q k^T and attn v: L * S * (d + e) for each head, with q (..., L, d), k (..., S, d), v (..., S, e).

    A mask changes nothing.
    """
    q, k = (value.type().sizes() for value in inputs[:2])
    *rows, e = outputs[0].type().sizes()
    return prod(rows) * k[-2] * (q[-1] + e)


def nothing(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


HANDLES: dict[str, Handle] = {
    "aten::matmul": matmul_macs,
    "aten::scaled_dot_product_attention": attention_macs,
    # mmcv's RoIAlign interpolates maps in regions. fvcore cannot ignore a Python function by name.
    "prim::PythonOp.RoIAlignFunction": nothing,
}
"""Operation of a `torch.jit` trace -> function from its inputs and outputs (`torch._C.Value`) to its MACs. fvcore and
mmengine take this form."""

# fvcore's names of the operations of convolution and linear layers.
LAYERS = frozenset({"conv", "linear", "addmm"})

_MOVES = (
    "clone expand_as im2col meshgrid new_ones ones_like pad pixel_shuffle pixel_unshuffle repeat repeat_interleave "
    "reshape_as unfold"
)
_ELEMENTWISE = (
    "abs add ceil clamp_max clamp_min cos div exp log log2 maximum minimum mul neg pow reciprocal rsqrt rsub sign sin "
    "sqrt square sub where"
)
_ACTIVATIONS = (
    "elu gelu hardsigmoid hardswish hardtanh leaky_relu log_softmax mish prelu relu6 sigmoid silu softmax softplus tanh"
)
_REDUCTIONS = "amax amin linalg_vector_norm mean norm std sum var var_mean"
_POOLS = "adaptive_max_pool2d avg_pool1d avg_pool2d max_pool2d"

UNCOUNTED: frozenset[str] = frozenset(
    f"aten::{name}{suffix}"
    for names in (_MOVES, _ELEMENTWISE, _ACTIVATIONS, _REDUCTIONS, _POOLS)
    for name in names.split()
    for suffix in ("", "_")
)
"""Operations that count as 0 on purpose, in addition to fvcore's own list: moving data takes no arithmetic, and the
others take a few operations for each value."""


@dataclass(frozen=True)
class Count:
    """The result of `count`.

    Attributes:
        params: trainable parameters.
        macs: multiply-accumulates of one image.
        by_module: MACs of each module by its name in the model, '' for the model.
        by_operator: MACs of each kind of operation.
        unsupported: unknown operations, which count as 0 in `macs` -> how often they ran.
    """

    params: int
    macs: int
    by_module: dict[str, int]
    by_operator: dict[str, int]
    unsupported: dict[str, int]


def analysis(model: nn.Module, inputs: torch.Tensor | tuple[torch.Tensor, ...]) -> "FlopCountAnalysis":
    """fvcore's FlopCountAnalysis of `model(*inputs)` with `HANDLES` and `UNCOUNTED`, without its logging.

    Raises:
        ModuleNotFoundError: fvcore is not installed.
    """
    from fvcore.nn import FlopCountAnalysis  # here, so that the handles serve mmengine without fvcore

    flops = FlopCountAnalysis(model, inputs)
    flops.set_op_handle(**HANDLES, **dict.fromkeys(UNCOUNTED))
    return flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def count(
    model: nn.Module, img_size: int | tuple[int, int], in_chans: int = 3, attention_products: bool = True
) -> Count:
    """Counts the parameters and MACs of `model` in eval mode for one image (1, in_chans, H, W).

    It runs the model once on the device of its parameters, with the memory and time of one inference. (On the meta
    device a convolution cannot be traced.)

    Args:
        model: any module that takes an image. It is not changed.
        img_size: height and width of the image: an int or a pair.
        in_chans: channels of the image.
        attention_products: False counts convolution and linear layers alone, without attention, association and norms.
            The paper does so for detection and segmentation.

    Raises:
        ModuleNotFoundError: fvcore is not installed.
        ValueError: `img_size` is not a positive int or a pair of them.
    """
    like = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, in_chans, *pair(img_size, "img_size"), device=like.device, dtype=like.dtype)
    flops = analysis(model, image)
    with evaluating(model), without_new_hooks(model), torch.no_grad():
        found = flops.by_module_and_operator()
    found = {
        name: {op: int(n) for op, n in ops.items() if attention_products or op in LAYERS} for name, ops in found.items()
    }
    return Count(
        params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        macs=sum(found[""].values()),
        by_module={name: sum(ops.values()) for name, ops in found.items()},
        by_operator=found[""],
        unsupported=dict(flops.unsupported_ops()),
    )


@contextmanager
def without_new_hooks(model: nn.Module) -> Iterator[None]:
    """Removes at the end the hooks that were registered inside. After an error fvcore leaves its own."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    before = [(getattr(module, kind), set(getattr(module, kind))) for module in model.modules() for kind in kinds]
    try:
        yield
    finally:
        for hooks, known in before:
            for key in set(hooks) - known:
                del hooks[key]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets eval mode, and restores the mode of each module at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
