import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from svit.ops import aggregate, sample, spread
from svit.ops.reference import from_cells, neighbours, sum_neighbours, to_cells

SHAPES = [  # cell, H x W: whole grids, padding on one side and on both, one cell, one row of cells, odd cells
    ((4, 4), (8, 12)),
    ((4, 4), (7, 12)),
    ((3, 5), (10, 11)),
    ((8, 8), (3, 5)),
    ((2, 3), (2, 13)),
    ((1, 2), (5, 4)),
]
IDS = [f"cell{h}x{w}-H{H}xW{W}" for (h, w), (H, W) in SHAPES]


def sample_pixel_by_pixel(x: torch.Tensor, cell: tuple[int, int], n_iter: int):
    """The definition, one by one: x (H, W, C) to s {super token: (C,)} and q {pixel: {super token: share}}."""
    (h, w), (H, W, C) = cell, x.shape
    hh, ww = math.ceil(H / h), math.ceil(W / w)
    padded = x.new_zeros(hh * h, ww * w, C)
    padded[:H, :W] = x
    s = {(i, j): padded[i * h : (i + 1) * h, j * w : (j + 1) * w].mean((0, 1)) for i in range(hh) for j in range(ww)}
    for _ in range(n_iter):
        q = {}
        for y in range(hh * h):
            for z in range(ww * w):
                near = [(y // h + i, z // w + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                logits = torch.stack([padded[y, z] @ s.get(k, torch.zeros_like(padded[y, z])) for k in near]) * C**-0.5
                q[y, z] = dict(zip(near, logits.softmax(0), strict=True))
        s = {
            k: sum(share[k] * padded[p] for p, share in q.items() if k in share)
            / (sum(share[k] for share in q.values() if k in share) + 1e-12)
            for k in s
        }
    return s, q


@pytest.mark.parametrize("n_iter", [1, 3])
@pytest.mark.parametrize(("cell", "size"), SHAPES, ids=IDS)
def test_sample_and_spread_equal_their_definition(cell, size, n_iter):
    x = torch.randn(2, *size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s, q = sample(x, cell, n_iter)
    tokens = torch.randn(s.shape, dtype=torch.float64)
    y = spread(tokens, q, cell, size)
    for b in range(2):
        expected_s, expected_q = sample_pixel_by_pixel(x[b], cell, n_iter)
        for (i, j), token in expected_s.items():
            torch.testing.assert_close(s[b, i, j], token, rtol=1e-10, atol=1e-12)
        for i in range(size[0]):
            for j in range(size[1]):
                inside = {k: share for k, share in expected_q[i, j].items() if k in expected_s}
                expected = sum(share * tokens[b][k] for k, share in inside.items())
                torch.testing.assert_close(y[b, i, j], expected, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(h=st.integers(1, 5), w=st.integers(1, 5), H=st.integers(1, 12), W=st.integers(1, 12), B=st.integers(0, 2))
def test_cells_hold_the_map_and_zeros(h, w, H, W, B):
    x = torch.arange(1.0, B * H * W * 3 + 1).reshape(B, H, W, 3)
    cells = to_cells(x, (h, w))
    assert cells.shape == (B, math.ceil(H / h), math.ceil(W / w), h * w, 3)
    assert cells.sum() == x.sum()
    assert torch.equal(from_cells(cells, (h, w), (H, W)), x)
    if B and h < H:  # the first pixel of the second row of cells
        assert torch.equal(cells[0, 1, 0, 0], x[0, h, 0])


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 2)])
def test_sum_neighbours_is_the_adjoint_of_neighbours(grid):
    a = torch.randn(2, *grid, 5, dtype=torch.float64)
    b = torch.randn(2, *grid, 9, 5, dtype=torch.float64)
    torch.testing.assert_close((neighbours(a) * b).sum(), (a * sum_neighbours(b)).sum())
    assert torch.equal(neighbours(a)[:, :, :, 4], a)
    assert not neighbours(a)[:, 0, :, :3].any()  # nothing above the first row


def test_shares_sum_to_one_and_the_missing_neighbours_take_theirs():
    _, q = sample(torch.randn(1, 8, 8, 4), (4, 4))
    torch.testing.assert_close(q.sum(3), torch.ones(1, 2, 2, 16))
    # A corner cell has 5 missing neighbours, all with logit 0 and so the same share, above 0.
    missing = q[0, 0, 0, [0, 1, 2, 3, 6]]
    assert missing.min() > 0
    torch.testing.assert_close(missing, missing[:1].expand(5, -1))


def test_association_gets_no_gradient_unless_asked():
    x = torch.randn(1, 4, 6, 3, dtype=torch.float64, requires_grad=True)
    s, q = sample(x, (2, 3), 2)
    assert not q.requires_grad
    assert s.requires_grad
    # With q fixed the super tokens are linear in x: the gradient is that of the weighted means alone.
    (grad,) = torch.autograd.grad(s.sum(), x)
    total, mass = aggregate(x, q, (2, 3))
    (expected,) = torch.autograd.grad((total / (mass + 1e-12).unsqueeze(-1)).sum(), x)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)
    _, q = sample(x, (2, 3), 2, differentiable=True)
    assert q.requires_grad


@pytest.mark.parametrize("n_iter", [1, 2])
def test_gradients_of_the_differentiable_association(n_iter):
    x = torch.randn(1, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: sample(x, (2, 2), n_iter, differentiable=True), x)


def test_gradients_with_fixed_association():
    q = torch.rand(1, 2, 3, 9, 4, dtype=torch.float64)
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    s = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: aggregate(x, q, (2, 2)), x)
    assert gradcheck(lambda s, x: spread(s, q, (2, 2), (3, 5), residual=x), (s, x))


def test_aggregate_and_spread_are_adjoint():
    x = torch.randn(2, 7, 8, 6, dtype=torch.float64)
    s, q = sample(x, (3, 4))
    (total, _), y = aggregate(x, q, (3, 4)), spread(s, q, (3, 4), (7, 8))
    torch.testing.assert_close((total * s).sum(), (x * y).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_run_in_float32(dtype):
    # 9 cells of 32 x 32 pixels of 90: a sum far above float16's 65504, whose mean is exact in both types.
    x = torch.full((1, 96, 96, 8), 90.0, dtype=dtype)
    s, q = sample(x, (32, 32))
    assert (s.dtype, q.dtype) == (dtype, dtype)
    assert torch.equal(s, torch.full_like(s, 90.0))
    total, mass = aggregate(x, q, (32, 32))
    assert (total.dtype, mass.dtype) == (torch.float32, torch.float32)
    assert total.max() > 65504
    with torch.autocast("cpu", dtype):
        s, q = sample(x.float(), (32, 32))
    assert q.dtype == torch.float32
    torch.testing.assert_close(s.float(), torch.full((1, 3, 3, 8), 90.0), rtol=1e-6, atol=0)
