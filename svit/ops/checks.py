"""Checks of the arguments of the ops: a ValueError that names the argument, what came and what is expected."""

import torch
from torch import Tensor


def expect_map(x: Tensor, name: str = "x") -> None:
    if x.dim() != 4 or x.shape[1] < 1 or x.shape[2] < 1 or not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point map (B, H, W, C), got {list(x.shape)} {x.dtype}")


def expect_cell(cell: tuple[int, int]) -> None:
    if len(cell) != 2 or not all(isinstance(n, int) and n >= 1 for n in cell):
        raise ValueError(f"cell: expected a height and a width of at least 1, got {cell!r}")


def expect(t: Tensor, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> None:
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {list(shape)}, got {list(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected it on {like.device} like the rest, got {t.device}")
    if dtype is not None and t.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {t.dtype}")


def expect_constant(q: Tensor, backend: str | None) -> None:
    if q.requires_grad and torch.is_grad_enabled() and backend != "reference":
        raise ValueError("q: expected a constant, got a tensor that requires grad, which takes backend='reference'")


def expect_grid(t: Tensor, name: str, x: Tensor, cell: tuple[int, int], last: tuple[int, ...]) -> None:
    """t is (B, hh, ww, *last) for the cells of the map x, in its dtype."""
    hh, ww = -(-x.shape[1] // cell[0]), -(-x.shape[2] // cell[1])
    expect(t, name, (x.shape[0], hh, ww, *last), x, x.dtype)


def expect_norm(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> None:
    if (weight is None) != (bias is None):
        raise ValueError("weight, bias: expected both or none, got one")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            expect(t, name, (x.shape[3],), x)


def expect_size(size: tuple[int, int], s: Tensor, cell: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1 or [-(-n // c) for n, c in zip(size, cell, strict=True)] != list(s.shape[1:3]):
        raise ValueError(f"size: expected H, W of {list(s.shape[1:3])} cells of {list(cell)}, got {list(size)}")


def expect_rounds(n_iter: int) -> None:
    if n_iter < 1:
        raise ValueError(f"n_iter: expected at least 1, got {n_iter}")


def expect_reference(backend: str | None) -> None:
    if backend not in (None, "reference"):
        raise ValueError(f"backend: expected 'reference' or None with differentiable=True, got {backend!r}")


def check_associate(x, s, cell):
    expect_map(x)
    expect_cell(cell)
    expect_grid(s, "s", x, cell, (x.shape[3],))


def check_aggregate(x, q, cell):
    expect_map(x)
    expect_cell(cell)
    expect_grid(q, "q", x, cell, (9, cell[0] * cell[1]))


def check_sample(x, cell, n_iter, weight, bias, eps):
    expect_map(x)
    expect_cell(cell)
    expect_rounds(n_iter)
    expect_norm(weight, bias, x)


def check_sample_backward(grad, x, q, mass, cell, weight, eps):
    expect_map(x)
    expect_cell(cell)
    expect_grid(grad, "grad", x, cell, (x.shape[3],))
    expect_grid(q, "q", x, cell, (9, cell[0] * cell[1]))
    expect(mass, "mass", q.shape[:3], x)
    expect_norm(weight, weight, x)


def check_depthwise(x, weight, bias, gelu):
    expect_map(x)
    expect(weight, "weight", (x.shape[3], 1, 3, 3), x)
    expect(bias, "bias", (x.shape[3],), x)


def check_depthwise_backward(grad, x, weight, gelu):
    expect_map(x)
    expect(grad, "grad", x.shape, x, x.dtype)
    expect(weight, "weight", (x.shape[3], 1, 3, 3), x)


def check_bias_gelu_affine(x, bias, scale, shift):
    expect_map(x)
    for name, t in (("bias", bias), ("scale", scale), ("shift", shift)):
        expect(t, name, (x.shape[3],), x)


def expect_linear(weight, bias, name, outputs: int, inputs: int, x) -> None:
    expect(weight, f"{name}_weight", (outputs, inputs), x)
    expect(bias, f"{name}_bias", (outputs,), x)


def check_attention(
    x, cell, norm_weight, norm_bias, eps, qkv_weight, qkv_bias, proj_weight, proj_bias, scale, num_heads
):
    expect_map(x)
    expect_cell(cell)
    C = x.shape[3]
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        expect(t, name, (C,), x)
    if num_heads < 1 or C % num_heads:
        raise ValueError(f"num_heads: expected a divisor of {C} channels, got {num_heads}")
    expect_linear(qkv_weight, qkv_bias, "qkv", 3 * C, C, x)
    expect_linear(proj_weight, proj_bias, "proj", C, C, x)
    if scale is not None:
        expect(scale, "scale", (x.shape[0], C), x)


def check_conv_ffn(x, residual, weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2):
    expect_map(x)
    expect(residual, "residual", x.shape, x, x.dtype)
    C, hidden = x.shape[3], weight1.shape[0]
    expect(weight1, "weight1", (hidden, C), x)
    expect(bias1, "bias1", (hidden,), x)
    expect(depthwise_weight, "depthwise_weight", (hidden, 1, 3, 3), x)
    expect(depthwise_bias, "depthwise_bias", (hidden,), x)
    expect(weight2, "weight2", (C, hidden), x)
    expect(bias2, "bias2", (C,), x)
