"""The self-check's cases of the super-token ops."""

from typing import Any

from svit.ops._self_check import PUBLISHED_CELLS, Comparisons, Inputs, add

from . import reference


def check_associate(kernels: Any, given: Inputs) -> Comparisons:
    C, cell = given.case.channels, given.cell
    H, W, hh, ww = given.grid()
    x, x64 = given.map(1, 2, H, W, C)
    s, s64 = given.map(2, 2, hh, ww, C)
    yield "q", kernels.associate(x, s, cell), reference.associate(x64, s64, cell)


def check_aggregate(kernels: Any, given: Inputs) -> Comparisons:
    H, W, _, _ = given.grid()
    cell = given.cell
    x, x64 = given.map(1, 2, H, W, given.case.channels)
    q, q64 = given.association()
    yield from zip(("total", "mass"), kernels.aggregate(x, q, cell), reference.aggregate(x64, q64, cell), strict=True)


def check_spread(kernels: Any, given: Inputs) -> Comparisons:
    C, cell = given.case.channels, given.cell
    H, W, hh, ww = given.grid()
    s, s64 = given.map(2, 2, hh, ww, C)
    q, q64 = given.association()
    residual, residual64 = given.map(1, 2, H, W, C) if given.case.form == "residual" else (None, None)
    y = kernels.spread(s, q, cell, [H, W], residual)
    yield "y", y, reference.spread(s64, q64, cell, (H, W), residual64)


def check_sample(kernels: Any, given: Inputs) -> Comparisons:
    C, cell, eps = given.case.channels, given.cell, 1e-6
    H, W, hh, ww = given.grid()
    x, x64 = given.map(1, 2, H, W, C)
    weight = weight64 = bias = bias64 = None
    if given.case.form == "norm":
        weight, weight64 = given.parameter(4, C, scale=0.2, plus=1)
        bias, bias64 = given.parameter(5, C, scale=0.2)
    results = kernels.sample(x, cell, 2, weight, bias, eps)
    expected = reference.sample(x64, cell, 2, weight64, bias64, eps)
    yield from zip(("s", "q", "mass"), results, expected, strict=True)
    grad, grad64 = given.map(6, 2, hh, ww, C)
    q, mass = (t.to(given.device, r.dtype) for t, r in zip(expected[1:], results[1:], strict=True))
    gradients = kernels.sample_backward(grad, x, q, mass, cell, weight, eps)
    expected = reference.sample_backward(grad64, x64, q.double().cpu(), mass.double().cpu(), cell, weight64, eps)
    yield from zip(("dx", "dweight", "dbias"), gradients, expected, strict=True)


def published(*forms: str) -> list[tuple[Any, ...]]:
    return [(C, cell, form) for C, cell in PUBLISHED_CELLS.items() for form in forms]


add("associate", cell=2, compare=check_associate, published=published(""))
add("aggregate", cell=2, compare=check_aggregate, published=published(""))
add("spread", cell=2, form=(4, "residual"), compare=check_spread, published=published("", "residual"))
add("sample", cell=1, form=(3, "norm"), compare=check_sample, published=published("", "norm"))
add("sample_backward", map=1, cell=4, form=(5, "norm"), forward="sample")
