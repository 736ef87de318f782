"""The conv-FFN half as one kernel of the CUDA library."""

import torch
from torch import Tensor

from svit.ops import cuda

cuda.LIBRARY.define(
    "conv_ffn(Tensor x, Tensor residual, Tensor weight1, Tensor bias1, Tensor taps, Tensor depthwise_bias, "
    "Tensor weight2, Tensor bias2, Tensor(a!) y) -> ()"
)


def conv_ffn(
    x: Tensor,
    residual: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    x = cuda.aligned(x)
    y = torch.empty_like(x)
    torch.ops.svit_cuda.conv_ffn(
        x, cuda.aligned(residual), cuda.weight(weight1, x), cuda.parameter(bias1, x),
        cuda.parameter(depthwise_weight, x), cuda.parameter(depthwise_bias, x),
        cuda.weight(weight2, x), cuda.parameter(bias2, x), y,
    )  # fmt: skip
    return y
