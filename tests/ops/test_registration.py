"""The registered ops on the CPU, where the reference computes them."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from svit.ops import reference

ops = torch.ops.svit
CELL = [3, 4]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, NORM_WEIGHT, NORM_BIAS = random(2, 7, 6, 8), 1 + 0.3 * random(8, seed=1), 0.3 * random(8, seed=2)
TAPS, BIAS = random(8, 1, 3, 3, seed=3), random(8, seed=4)
S, Q, MASS = ops.sample(X, CELL, 1, NORM_WEIGHT, NORM_BIAS, 1e-6)


def leaf(t: torch.Tensor) -> torch.Tensor:
    return t.clone().requires_grad_()


CALLS = {
    "associate": (X, S, CELL),
    "aggregate": (leaf(X), Q, CELL),
    "spread": (leaf(S), Q, CELL, [7, 6], None),
    "spread with residual": (leaf(S), Q, CELL, [7, 6], leaf(X)),
    "sample": (leaf(X), CELL, 1, None, None, 1e-6),
    "sample with norm": (leaf(X), CELL, 3, leaf(NORM_WEIGHT), leaf(NORM_BIAS), 1e-6),
    "sample_backward": (S, X, Q, MASS, CELL, None, 1e-6),
    "sample_backward with norm": (S, X, Q, MASS, CELL, NORM_WEIGHT, 1e-6),
    "depthwise3x3": (leaf(X), leaf(TAPS), leaf(BIAS), False),
    "depthwise3x3 with gelu": (leaf(X), leaf(TAPS), leaf(BIAS), True),
    "depthwise3x3_backward": (X, X, TAPS, False),
    "depthwise3x3_backward with gelu": (X, X, TAPS, True),
    "bias_gelu_affine": (X, BIAS, NORM_WEIGHT, NORM_BIAS),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    opcheck(getattr(ops, name.split()[0]).default, CALLS[name])


@pytest.mark.parametrize("size", [(7, 6), (1, 1), (12, 8), (4, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_results_on_a_gpu_are_contiguous_and_of_the_true_shape(dtype, size):
    H, W = size
    hh, ww = -(-H // 3), -(-W // 4)
    with FakeTensorMode():
        x = torch.empty(2, H, W, 8, device="cuda", dtype=dtype)
        taps = torch.empty(8, 1, 3, 3, device="cuda")
        parameter = torch.empty(8, device="cuda")
        s, q, mass = ops.sample(x, CELL, 1, parameter, parameter, 1e-6)
        found = {
            "s": (s, (2, hh, ww, 8), dtype),
            "q": (q, (2, hh, ww, 9, 12), dtype),
            "mass": (mass, (2, hh, ww), torch.float32),
            "associate": (ops.associate(x, s, CELL), (2, hh, ww, 9, 12), dtype),
            "total": (ops.aggregate(x, q, CELL)[0], (2, hh, ww, 8), torch.float32),
            "y": (ops.spread(s, q, CELL, [H, W], None), (2, H, W, 8), dtype),
            "sum": (ops.spread(s, q, CELL, [H, W], x.float()), (2, H, W, 8), torch.float32),
            "dx": (ops.sample_backward(s, x, q, mass, CELL, parameter, 1e-6)[0], (2, H, W, 8), dtype),
            "dweight": (ops.sample_backward(s, x, q, mass, CELL, parameter, 1e-6)[1], (8,), torch.float32),
            "depthwise": (
                ops.depthwise3x3(x, taps, parameter, True),
                (2, H, W, 8),
                dtype,
            ),
            "affine": (ops.bias_gelu_affine(x, parameter, parameter, parameter), (2, H, W, 8), dtype),
        }
    for name, (tensor, shape, expected) in found.items():
        assert (tuple(tensor.shape), tensor.dtype, tensor.device.type) == (shape, expected, "cuda"), name
        assert tensor.is_contiguous(), name


@pytest.mark.parametrize("name", [n for n in CALLS if "backward" not in n and not n.startswith(("associate", "bias"))])
def test_gradients_are_those_of_the_reference(name):
    """In float64; the reference's own are checked by gradcheck in test_reference.py, this one by autograd."""
    args = CALLS[name]
    op, plain = getattr(ops, name.split()[0]), getattr(reference, name.split()[0])
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    first = [y[0] if isinstance(y, tuple) else y for y in (op(*args), plain(*args))]
    torch.testing.assert_close(*first, rtol=1e-12, atol=1e-12)
    weight = random(*first[0].shape, seed=5)
    for actual, expected in zip(*(torch.autograd.grad(y, leaves, weight) for y in first), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_gradcheck_with_q_fixed():
    assert gradcheck(lambda x: ops.aggregate(x, Q, CELL)[0], leaf(X))
    assert gradcheck(lambda s, x: ops.spread(s, Q, CELL, [7, 6], x), (leaf(S), leaf(X)))


@pytest.mark.parametrize("gelu", [False, True])
def test_gradcheck_of_depthwise(gelu):
    inputs = leaf(random(1, 3, 4, 2)), leaf(random(2, 1, 3, 3)), leaf(random(2))
    assert gradcheck(lambda *args: ops.depthwise3x3(*args, gelu), inputs)


@pytest.mark.parametrize("name", ["sample with norm", "depthwise3x3 with gelu"])
def test_double_backward_is_refused(name):
    args = CALLS[name]
    y = getattr(ops, name.split()[0])(*args)
    y = y[0] if isinstance(y, tuple) else y
    (grad,) = torch.autograd.grad(y.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"svit::\w+ has no second derivative; use backend='reference'"):
        grad.sum().backward()


def test_gradient_of_an_op_for_inference_is_refused():
    y = ops.bias_gelu_affine(leaf(X), BIAS, NORM_WEIGHT, NORM_BIAS)
    with pytest.raises(RuntimeError, match="svit::bias_gelu_affine is for inference and has no gradient"):
        y.sum().backward()


class Ops(nn.Module):
    """All of them, as a fused backend runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(NORM_WEIGHT.clone()), nn.Parameter(NORM_BIAS.clone())
        self.taps = nn.Parameter(TAPS.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s, q, _ = ops.sample(x, CELL, 2, self.weight, self.bias, 1e-6)
        x = ops.spread(s, q, CELL, x.shape[1:3], x)
        return ops.depthwise3x3(x, self.taps, self.bias, True)


def test_compiles_to_one_graph():
    module = Ops()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for size in ((7, 6), (9, 11), (3, 4)):
        x = random(2, *size, 8)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-12, atol=1e-12)
        actual, expected = (torch.autograd.grad(f(x).sum(), list(module.parameters())) for f in (compiled, module))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_exports_with_any_size(tmp_path):
    module = Ops()
    dim = torch.export.Dim.DYNAMIC
    program = torch.export.export(module, (random(2, 7, 6, 8),), dynamic_shapes=({1: dim, 2: dim},))
    assert "svit.sample" in program.graph_module.code
    torch.export.save(program, tmp_path / "ops.pt2")
    loaded = torch.export.load(tmp_path / "ops.pt2").module()
    for size in ((7, 6), (9, 11)):
        x = random(2, *size, 8)
        torch.testing.assert_close(loaded(x), module(x), rtol=1e-12, atol=1e-12)


def flops(function, *args, backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        y = function(*args)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def test_flops_are_those_of_the_plain_operations():
    def attention(sample, spread, *last):
        s, q, _ = sample(leaf(X), CELL, 2, NORM_WEIGHT, NORM_BIAS, 1e-6)
        total, _ = last[0](leaf(X), q, CELL)
        return spread(s, q, CELL, [7, 6], leaf(X)) + last[1](X, total.detach(), CELL).sum()

    plain = flops(attention, reference.sample, reference.spread, reference.aggregate, reference.associate)
    # 7 products forward, 2 backward, each of 2 images, 6 cells, 9 super tokens, 12 pixels, 8 channels
    assert flops(attention, ops.sample, ops.spread, ops.aggregate, ops.associate) == plain == 9 * 2 * 2 * 6 * 9 * 12 * 8

    args = leaf(X), leaf(TAPS), leaf(BIAS), True
    convolution = 2 * 9 * X.numel()
    assert flops(ops.depthwise3x3, *args, backward=False) == convolution
    assert flops(reference.depthwise3x3, *args, backward=False) == convolution
    assert flops(ops.depthwise3x3, *args) == 3 * convolution  # PyTorch's formula takes no notice of the groups here
