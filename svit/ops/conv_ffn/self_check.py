"""The self-check's case of the conv-FFN half."""

from typing import Any

from svit.ops._self_check import PUBLISHED_CELLS, Comparisons, Inputs, add

from . import reference


def check_conv_ffn(kernels: Any, given: Inputs) -> Comparisons:
    C = given.case.channels
    tensors = [
        given.map(1, 2, 15, 17, C),
        given.map(2, 2, 15, 17, C),
        given.map(8, 4 * C, C, scale=C**-0.5),
        given.parameter(9, 4 * C, scale=0.3),
        given.parameter(7, 4 * C, 1, 3, 3, scale=0.4),
        given.parameter(5, 4 * C, scale=0.3),
        given.map(10, C, 4 * C, scale=0.5 * C**-0.5),
        given.parameter(11, C, scale=0.3),
    ]
    ours, exact = zip(*tensors, strict=True)
    yield "y", kernels.conv_ffn(*ours), reference.conv_ffn(*exact)


add(
    "conv_ffn",
    compare=check_conv_ffn,
    published=[(C, None, "") for C in PUBLISHED_CELLS],
    sizes=lambda case: {"hidden": 4 * case.channels},
)
