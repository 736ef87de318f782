"""The self-check's case of the attention half."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from svit.ops._self_check import PUBLISHED_CELLS, PUBLISHED_HEADS, Comparisons, Inputs, add

from . import reference


def check_super_token_attention(kernels: Any, given: Inputs) -> Comparisons:
    C, (h, w) = given.case.channels, given.cell
    x, x64 = given.map(1, 2, 3 * h, 2 * w, C)
    parameters = [
        given.parameter(4, C, scale=0.2, plus=1),
        given.parameter(5, C, scale=0.2),
        given.parameter(8, 3 * C, C, scale=C**-0.5),
        given.parameter(9, 3 * C, scale=0.3),
        given.parameter(10, C, C, scale=C**-0.5),
        given.parameter(11, C, scale=0.3),
        given.map(12, 2, C, scale=0.3, plus=1),
    ]
    heads = PUBLISHED_HEADS[C]

    def run(function: Callable[..., Any], x: Tensor, which: int) -> tuple[Tensor, ...]:
        weight, bias, qkv, qkv_bias, proj, proj_bias, scale = (p[which] for p in parameters)
        return function(x, [h, w], weight, bias, 1e-6, qkv, qkv_bias, proj, proj_bias, scale, heads, True)

    results, expected = run(kernels.super_token_attention, x, 0), run(reference.super_token_attention, x64, 1)
    yield from zip(("y", "s", "q", "mass"), results, expected, strict=True)


add(
    "super_token_attention",
    cell=1,
    compare=check_super_token_attention,
    published=[(C, cell, "") for C, cell in PUBLISHED_CELLS.items()],
    sizes=lambda case: {"cell": case.cell, "num_heads": PUBLISHED_HEADS[case.channels]},
)
