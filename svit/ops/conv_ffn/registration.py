"""The conv-FFN half as an op of `torch.ops.svit`: schema, shape of the result, FLOPs, implementations. No gradient."""

from math import prod
from typing import Any

from torch import Size, Tensor
from torch.library import register_autograd, register_fake

from svit.ops import _dispatch, cuda
from svit.ops._registration import define, flop_formula, ops, refuse_gradient

from . import check_conv_ffn, onednn, reference, self_check  # noqa: F401
from . import cuda as kernels

define(
    "conv_ffn(Tensor x, Tensor residual, Tensor weight1, Tensor bias1, Tensor depthwise_weight, "
    "Tensor depthwise_bias, Tensor weight2, Tensor bias2) -> Tensor",
    check_conv_ffn,
    lambda x, residual, weight1, *_: {"hidden": weight1.shape[0]},
    composite=True,
)


@register_fake("svit::conv_ffn")
def _(
    x: Tensor,
    residual: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    backend: str | None = None,
) -> Tensor:
    return residual.new_empty(residual.shape)


register_autograd("svit::conv_ffn", refuse_gradient("conv_ffn"))


@flop_formula(ops.conv_ffn)
def conv_ffn_flops(
    x: Size,
    residual: Size,
    weight1: Size,
    bias1: Size,
    depthwise_weight: Size,
    depthwise_bias: Size,
    weight2: Size,
    *_: Any,
    **__: Any,
) -> int:
    B, H, W, C = x
    return 2 * B * H * W * (prod(weight1) + prod(depthwise_weight) + prod(weight2))


_dispatch.REFERENCE.implement(conv_ffn=reference.conv_ffn)
cuda.BACKEND.implement(conv_ffn=kernels.conv_ffn)
_dispatch.BACKENDS["onednn"].implement(conv_ffn=onednn.run_conv_ffn)
