"""The composition of the conv-FFN half. The reference, the primitives of a backend and oneDNN's tiles call it."""

from collections.abc import Callable

from torch import Tensor


def conv_ffn_half(
    x: Tensor,
    residual: Tensor | None,
    expand: Callable[[Tensor], Tensor],
    depthwise_of_gelu: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
) -> Tensor:
    """Computes residual + project(depthwise_of_gelu(expand(x))).

    Args:
        x: map, normalised.
        residual: map to add, or None.
        expand: the 1x1 convolution to the hidden channels.
        depthwise_of_gelu: computes u + depthwise convolution of u, where u is the GELU of its argument.
        project: the 1x1 convolution back.
    """
    y = project(depthwise_of_gelu(expand(x)))
    return y if residual is None else residual + y
