"""The self-check's cases of the depthwise ops."""

from typing import Any

from svit.ops._self_check import Comparisons, Inputs, add

from . import reference

# Of SViT-S, B and L: all stages, and their conv-FFN with the GELU; the stem.
PUBLISHED_DIMS = (64, 96, 128, 192, 320, 384, 448, 512, 640)
PUBLISHED_STEMS = (32, 48, 64, 96)


def check_depthwise3x3(kernels: Any, given: Inputs) -> Comparisons:
    C, gelu = given.case.channels, given.case.form == "gelu"
    # On a GPU the map has several strips of rows and columns. An interpreter would take seconds for that.
    shape = (2, 15, 17, C) if given.device.type == "cuda" else (1, 5, 7, C)
    x, x64 = given.map(1, *shape)
    weight, weight64 = given.parameter(7, C, 1, 3, 3)
    bias, bias64 = given.parameter(5, C)
    yield "y", kernels.depthwise3x3(x, weight, bias, gelu), reference.depthwise3x3(x64, weight64, bias64, gelu)
    grad, grad64 = given.map(6, *shape)
    gradients = kernels.depthwise3x3_backward(grad, x, weight, gelu)
    expected = reference.depthwise3x3_backward(grad64, x64, weight64, gelu)
    yield from zip(("dx", "dweight", "dbias"), gradients, expected, strict=True)


def check_bias_gelu_affine(kernels: Any, given: Inputs) -> Comparisons:
    C = given.case.channels
    x, x64 = given.map(1, 2, 15, 17, C)
    vectors = [given.parameter(seed, C) for seed in (5, 4, 11)]
    ours, exact = zip(*vectors, strict=True)
    yield "y", kernels.bias_gelu_affine(x, *ours), reference.bias_gelu_affine(x64, *exact)


add(
    "depthwise3x3",
    form=(3, "gelu"),
    compare=check_depthwise3x3,
    published=[*((C, None, "") for C in PUBLISHED_DIMS), *((4 * C, None, "gelu") for C in PUBLISHED_DIMS)],
)
add("depthwise3x3_backward", form=(3, "gelu"), forward="depthwise3x3")
add("bias_gelu_affine", compare=check_bias_gelu_affine, published=[(C, None, "") for C in PUBLISHED_STEMS])
