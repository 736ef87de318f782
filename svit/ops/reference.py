"""The reference: every op in plain PyTorch, from the operators' folders. The other backends are tested against it."""

from .attention.reference import attend, attend_backward, super_token_attention
from .conv_ffn.reference import conv_ffn
from .depthwise.reference import bias_gelu_affine, depthwise3x3, depthwise3x3_backward
from .super_token.reference import (
    aggregate,
    associate,
    from_cells,
    neighbours,
    sample,
    sample_backward,
    spread,
    sum_neighbours,
    to_cells,
)

__all__ = [
    "aggregate",
    "associate",
    "attend",
    "attend_backward",
    "bias_gelu_affine",
    "conv_ffn",
    "depthwise3x3",
    "depthwise3x3_backward",
    "from_cells",
    "neighbours",
    "sample",
    "sample_backward",
    "spread",
    "sum_neighbours",
    "super_token_attention",
    "to_cells",
]
