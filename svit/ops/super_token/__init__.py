"""Super-token sampling and upsampling (paper: section 3.2). README.md has the maths.

`sample` runs rounds of `associate` and `aggregate`: from a map to super tokens. `spread` is the upsampling: from super
tokens to a map.

Letters of the shapes: B batch, H x W pixels, C channels, hh x ww cells of P pixels with one super token each, 9 the
3 x 3 super tokens around a pixel's own cell, row-major from the top left.

`backend` is None for the best backend that serves the input (`svit.ops.info()` prints it), or the name of one that must
serve it. On every backend softmax, mass and sums run in float32 at least, and q is a constant to autograd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from svit.ops._checks import checked, expect, expect_cell, expect_map, positive_int
from svit.ops._dispatch import choose
from svit.ops._numerics import to_autocast_dtype

from . import reference

# TorchScript can only run the reference, so a function that it compiles begins with that case.


def associate(x: Tensor, s: Tensor, cell: tuple[int, int], backend: str | None = None) -> Tensor:
    """Softly associates each pixel with the 9 super tokens around its cell (paper: section 3.2). No gradient.

    q is the softmax of `<pixel, super token> / sqrt(C)` over the 9. A super token outside the grid is a zero vector:
    its logit is 0, and its share of the pixel is lost.

    Args:
        x: map (B, H, W, C); zero-padded on the right and the bottom to whole cells.
        s: super tokens (B, hh, ww, C), same dtype.
        cell: height and width of a cell in pixels.
        backend: see above.

    Returns:
        q (B, hh, ww, 9, P), in the dtype of x (under autocast: autocast's).

    Raises:
        ValueError: an argument of another shape, dtype or device, or a backend that does not serve them.
    """
    expect_cell(cell)
    if checked():
        check_associate(x, s, cell)
    x, s = to_autocast_dtype(x.detach()), to_autocast_dtype(s.detach())
    if choose("associate", x, backend) == "reference":
        return reference.associate(x, s, cell)
    return torch.ops.svit.associate(x, s, cell, backend)


def aggregate(x: Tensor, q: Tensor, cell: tuple[int, int], backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Sums the pixels of the 9 cells around each super token, weighted by q. The mass is the sum of the weights.

    It is linear in x and the adjoint of `spread`.

    Args:
        x: map (B, H, W, C).
        q: association (B, hh, ww, 9, P), same dtype; a constant.
        cell: height and width of a cell in pixels.
        backend: see above.

    Returns:
        total (B, hh, ww, C) and mass (B, hh, ww), float32 (float64 for float64). The super token is
        total / (mass + 1e-12).

    Raises:
        ValueError: an argument of another shape, dtype or device, a q that requires grad (only
            `backend="reference"` differentiates by q), or a backend that does not serve them.
    """
    expect_cell(cell)
    expect_constant(q, backend)
    if checked():
        check_aggregate(x, q, cell)
    x, q = to_autocast_dtype(x), to_autocast_dtype(q)
    if choose("aggregate", x, backend) == "reference":
        return reference.aggregate(x, q, cell)
    return torch.ops.svit.aggregate(x, q, cell, backend)


def spread(
    s: Tensor,
    q: Tensor,
    cell: tuple[int, int],
    size: tuple[int, int],
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Upsamples super tokens to pixels: each pixel gets the sum of its 9 super tokens, weighted by q.

    A super token outside the grid adds zero. The function is linear in s and the adjoint of `aggregate`.

    Args:
        s: super tokens (B, hh, ww, C).
        q: association (B, hh, ww, 9, P); a constant.
        cell: height and width of a cell in pixels.
        size: H and W of the map; hh x ww cells cover it.
        residual: map (B, H, W, C) to add.
        backend: see above.

    Returns:
        map (B, H, W, C), in the dtype of the residual, or without one that of s (under autocast: autocast's).

    Raises:
        ValueError: an argument of another shape or device, a q that requires grad (see `aggregate`), or a backend that
            does not serve them.
    """
    if torch.jit.is_scripting():
        return reference.spread(s, q, cell, size, residual)
    else:
        expect_cell(cell)
        expect_constant(q, backend)
        if checked():
            expect_map(s, "s")
            expect_size(size, s, cell)
            expect(q, "q", (s.shape[0], s.shape[1], s.shape[2], 9, cell[0] * cell[1]), s)
            if residual is not None:
                expect(residual, "residual", (s.shape[0], size[0], size[1], s.shape[3]), s)
        s = to_autocast_dtype(s)
        if choose("spread", s, backend) == "reference":
            return reference.spread(s, q, cell, size, residual)
        return torch.ops.svit.spread(s, q.to(s.dtype), cell, size, residual, backend)


def sample(
    x: Tensor,
    cell: tuple[int, int],
    n_iter: int = 1,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    differentiable: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples super tokens from a map (paper: section 3.2): cell means, then `n_iter` rounds of `associate` and
    `aggregate`.

    Args:
        x: map (B, H, W, C).
        cell: height and width of a cell in pixels.
        n_iter: rounds of association, at least 1.
        weight: (C,) of a layer norm over the channels that is applied to x first, or None for no norm. The padding is
            zero after the norm.
        bias: (C,) of that norm, or None without one.
        eps: of that norm.
        differentiable: pass gradients through the association too. Only the reference does.
        backend: see above.

    Returns:
        super tokens (B, hh, ww, C) and association q (B, hh, ww, 9, P), in the dtype of x. Under autocast a fused
        backend returns them in autocast's dtype.

    Raises:
        ValueError: an argument of another shape, dtype or device, or a backend that does not serve them.
    """
    if torch.jit.is_scripting():
        s, q, _ = reference.sample(x, cell, n_iter, weight, bias, eps, differentiable)
        return s, q
    else:
        expect_cell(cell)
        positive_int(n_iter, "n_iter")
        if checked():
            check_sample(x, cell, n_iter, weight, bias, eps)
        if differentiable:
            expect_reference(backend)
            backend = "reference"
        y = to_autocast_dtype(x)
        if choose("sample", y, backend) == "reference":
            s, q, _ = reference.sample(x, cell, n_iter, weight, bias, eps, differentiable)
        else:
            s, q, _ = torch.ops.svit.sample(y, cell, n_iter, weight, bias, eps, backend)
        return s, q


def expect_constant(q: Tensor, backend: str | None) -> None:
    if q.requires_grad and torch.is_grad_enabled() and backend != "reference":
        raise ValueError("q: expected a constant, got a tensor that requires grad, which takes backend='reference'")


def expect_grid(t: Tensor, name: str, x: Tensor, cell: Sequence[int], last: tuple[int, ...]) -> None:
    """t is (B, hh, ww, *last) for the cells of the map x, in its dtype."""
    hh, ww = -(-x.shape[1] // cell[0]), -(-x.shape[2] // cell[1])
    expect(t, name, (x.shape[0], hh, ww, *last), x, x.dtype)


def expect_norm(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> None:
    if (weight is None) != (bias is None):
        raise ValueError("weight, bias: expected both or none, got one")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            expect(t, name, (x.shape[3],), x)


def expect_size(size: Sequence[int], s: Tensor, cell: Sequence[int]) -> None:
    if len(size) != 2 or min(size) < 1 or [-(-n // c) for n, c in zip(size, cell, strict=True)] != list(s.shape[1:3]):
        raise ValueError(f"size: expected H, W of {list(s.shape[1:3])} cells of {list(cell)}, got {list(size)}")


def expect_reference(backend: str | None) -> None:
    if backend not in (None, "reference"):
        raise ValueError(f"backend: expected 'reference' or None with differentiable=True, got {backend!r}")


def check_associate(x: Tensor, s: Tensor, cell: Sequence[int]) -> None:
    expect_map(x)
    expect_cell(cell)
    expect_grid(s, "s", x, cell, (x.shape[3],))


def check_aggregate(x: Tensor, q: Tensor, cell: Sequence[int]) -> None:
    expect_map(x)
    expect_cell(cell)
    expect_grid(q, "q", x, cell, (9, cell[0] * cell[1]))


def check_sample(
    x: Tensor, cell: Sequence[int], n_iter: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    expect_map(x)
    expect_cell(cell)
    positive_int(n_iter, "n_iter")
    expect_norm(weight, bias, x)


def check_sample_backward(
    grad: Tensor, x: Tensor, q: Tensor, mass: Tensor, cell: Sequence[int], weight: Tensor | None, eps: float
) -> None:
    expect_map(x)
    expect_cell(cell)
    expect_grid(grad, "grad", x, cell, (x.shape[3],))
    expect_grid(q, "q", x, cell, (9, cell[0] * cell[1]))
    expect(mass, "mass", q.shape[:3], x)
    expect_norm(weight, weight, x)


def check_spread(s: Tensor, q: Tensor, cell: Sequence[int], size: Sequence[int], residual: Tensor | None) -> None:
    expect_map(s, "s")
    expect_cell(cell)
    expect_size(size, s, cell)
    expect(q, "q", (*s.shape[:3], 9, cell[0] * cell[1]), s, s.dtype)
    if residual is not None:
        expect(residual, "residual", (s.shape[0], *size, s.shape[3]), s)
