"""The public functions under torch.func, forward-mode AD and twice differentiated, on a CPU."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

from svit import ops

B, H, W, C, HIDDEN = 2, 5, 6, 4, 6
CELL, GRID = (2, 3), (3, 2)
NORM = (C,), (C,)
LINEAR = (3 * C, C), (3 * C,), (C, C), (C,)
FFN = (HIDDEN, C), (HIDDEN,), (HIDDEN, 1, 3, 3), (HIDDEN,), (C, HIDDEN), (C,)
MAP, TOKENS, Q = (B, H, W, C), (B, *GRID, C), (B, *GRID, 9, CELL[0] * CELL[1])


def association(dtype: torch.dtype, n: int = B) -> torch.Tensor:
    g = torch.Generator().manual_seed(9)
    return torch.rand(Q, generator=g, dtype=torch.float64)[:n].softmax(3).to(dtype)


# name -> (function of tensors to one tensor, their shapes, how many of them are maps, whether differences of the first
# are its derivative; not so where the association, a constant to autograd, depends on it)
FUNCTIONS = {
    "aggregate": (lambda x: ops.aggregate(x, association(x.dtype, x.shape[0]), CELL)[0], (MAP,), 1, True),
    "spread": (
        lambda s, x: ops.spread(s, association(s.dtype, s.shape[0]), CELL, (H, W), x), (TOKENS, MAP), 2, True,
    ),
    "sample": (lambda x, *norm: ops.sample(x, CELL, 2, *norm)[0], (MAP, *NORM), 1, False),
    "sample, differentiable": (
        lambda x, *norm: ops.sample(x, CELL, 2, *norm, differentiable=True)[0], (MAP, *NORM), 1, True,
    ),
    "depthwise3x3": (ops.depthwise3x3, (MAP, (C, 1, 3, 3), (C,)), 1, True),
    "depthwise3x3, gelu": (
        lambda *tensors: ops.depthwise3x3(*tensors, gelu=True), (MAP, (C, 1, 3, 3), (C,)), 1, True,
    ),
    "bias_gelu_affine": (ops.bias_gelu_affine, (MAP, (C,), (C,), (C,)), 1, True),
    "super_token_attention": (
        lambda x, scale, weight, bias, *linear: ops.super_token_attention(
            x, CELL, weight, bias, 1e-6, *linear, 2, scale
        ),
        (MAP, (B, C), *NORM, *LINEAR), 2, False,
    ),
    "conv_ffn": (ops.conv_ffn, (MAP, MAP, *FFN), 2, True),
}  # fmt: skip
CASES = pytest.mark.parametrize("name", FUNCTIONS)


def inputs(name: str, dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in FUNCTIONS[name][1]]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


@CASES
@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
def test_vmap(name, enabled):
    f, _, maps, _ = FUNCTIONS[name]
    tensors = inputs(name, torch.float32)
    expected = f(*inputs(name))
    with torch.set_grad_enabled(enabled):
        shared = (0,) * maps + (None,) * (len(tensors) - maps)
        split = [t[:, None] for t in tensors[:maps]] + tensors[maps:]
        if name in ("aggregate", "spread"):  # whose association is that of each image
            singles = vmap(lambda q, *t: reference_of(name)(q, *t), (0, *shared))(
                association(torch.float32)[:, None], *split
            )
        else:
            singles = vmap(f, shared)(*split)
    close(singles[:, 0], expected, 1e-5)


def reference_of(name: str):
    if name == "aggregate":
        return lambda q, x: ops.aggregate(x, q, CELL)[0]
    return lambda q, s, x: ops.spread(s, q, CELL, (H, W), x)


@CASES
@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
def test_forward_mode_is_the_transpose_of_backward(name, enabled):
    f = FUNCTIONS[name][0]
    leaves = [t.requires_grad_() for t in inputs(name)]
    out = f(*leaves)
    v = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    steps = inputs(name, seed=4)
    expected = sum((d * u).sum() for d, u in zip(torch.autograd.grad(out, leaves, v), steps, strict=True))
    tensors, tangents = inputs(name, torch.float32), tuple(u.float() for u in steps)
    with torch.set_grad_enabled(enabled):
        y, tangent = jvp(f, tuple(tensors), tangents)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, tensors, tangents)))
    close(y, out, 1e-5)
    close(dual.primal, out, 1e-5)
    close(dual.tangent, tangent, 1e-6)
    assert abs((tangent * v).sum() - expected) < 1e-5 * (tangent.double() * v).abs().sum()


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "sample"])
def test_derivatives_are_those_of_differences(name):
    """First and second ones, forward and backward, along random directions (`fast_mode`)."""
    f, _, _, whole = FUNCTIONS[name]
    tensors = [t.requires_grad_() for t in inputs(name)]
    function = f
    if not whole:  # x and the norm shape the association: they are fixed
        x, scale, *norm = (t.detach() for t in tensors[:4])
        function, tensors = lambda scale, *linear: f(x, scale, *norm, *linear), tensors[1:2] + tensors[4:]
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, fast_mode=True)


@CASES
def test_second_derivatives_agree(name):
    """Backward twice by `create_graph`, by torch.func, and forward over backward: <w, H u>."""
    f = FUNCTIONS[name][0]
    tensors, u = inputs(name), inputs(name, seed=5)
    loss = lambda *t: f(*t).sin().square().sum()  # noqa: E731
    every = tuple(range(len(tensors)))
    leaves = [t.clone().requires_grad_() for t in tensors]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    along = sum((d * step).sum() for d, step in zip(first, u, strict=True))
    twice = torch.autograd.grad(along, leaves)
    by_func = grad(lambda *t: sum((d * s).sum() for d, s in zip(grad(loss, every)(*t), u, strict=True)), every)(
        *tensors
    )
    for a, b in zip(by_func, twice, strict=True):
        close(a, b, 1e-9)
    forward = jvp(grad(loss, every), tuple(tensors), tuple(u))[1]
    if FUNCTIONS[name][3]:  # else the Hessian, with a constant in it, is not symmetric
        for a, b in zip(forward, twice, strict=True):
            close(a, b, 1e-9)
    else:
        w = inputs(name, seed=6)
        left = sum((a * b).sum() for a, b in zip(forward, w, strict=True))
        along = sum(
            (d * step).sum()
            for d, step in zip(torch.autograd.grad(loss(*leaves), leaves, create_graph=True), w, strict=True)
        )
        right = sum((d * s).sum() for d, s in zip(torch.autograd.grad(along, leaves), u, strict=True))
        close(left, right, 1e-9)


def test_the_association_is_a_constant():
    x, s = torch.randn(MAP, dtype=torch.float64), torch.randn(TOKENS, dtype=torch.float64)
    f = lambda x, s: ops.associate(x, s, CELL)  # noqa: E731
    y, tangent = jvp(f, (x, s), (x, s))
    close(y, f(x, s), 1e-12)
    assert tangent.count_nonzero() == 0
    assert all(d.count_nonzero() == 0 for d in grad(lambda *t: f(*t).square().sum(), (0, 1))(x, s))
    close(vmap(f)(x[:, None], s[:, None])[:, 0], y, 1e-12)
