"""What the conv-FFN half is made of. The reference, the fused primitives and the layers are ways through this."""

from collections.abc import Callable

from torch import Tensor


def conv_ffn_half(
    x: Tensor,
    residual: Tensor | None,
    expand: Callable[[Tensor], Tensor],
    depthwise_of_gelu: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
) -> Tensor:
    """residual + project(depthwise_of_gelu(expand(x))).

    Args:
        x: map, normalised.
        residual: map to add, or None.
        expand: the 1x1 convolution to the hidden channels.
        depthwise_of_gelu: u + depthwise convolution of u, with u the GELU of its argument.
        project: the 1x1 convolution back.
    """
    y = project(depthwise_of_gelu(expand(x)))
    return y if residual is None else residual + y
