"""The public functions: arguments, choice of backend, autocast."""

import numpy as np
import pytest
import torch

from svit import ops
from svit.ops import aggregate, associate, bias_gelu_affine, depthwise3x3, sample, spread

X = torch.randn(2, 7, 9, 16, generator=torch.Generator().manual_seed(0))
CELL = (4, 4)
S, Q = sample(X, CELL)
WEIGHT, BIAS = torch.randn(16, 1, 3, 3), torch.randn(16)


def on_meta(t: torch.Tensor) -> torch.Tensor:
    return t.to("meta")


def test_integers_of_numpy():
    for a, b in zip(sample(X, tuple(np.array(CELL)), np.int32(2)), sample(X, CELL, 2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample(X[0], CELL), r"x: expected .*\(B, H, W, C\), got \[7, 9, 16\]"),
        (lambda: sample(X.int(), CELL), "x: expected a floating-point map .* torch.int32"),
        (lambda: sample(X[:, :0], CELL), r"x: .* got \[2, 0, 9, 16\]"),
        (lambda: sample(X, (4, 0)), r"cell: expected .* got \(4, 0\)"),
        (lambda: sample(X, 4), "cell: expected .* got 4"),
        (lambda: sample(X[..., :0], (4, 4)), "x: expected a floating-point map"),
        (lambda: sample(X, (4.0, 4)), r"cell: expected .* got \(4.0, 4\)"),
        (lambda: sample(X, (4, 4, 4)), "cell: expected"),
        (lambda: sample(X, (True, 4)), r"cell: expected .* got \(True, 4\)"),
        (lambda: sample(X, CELL, n_iter=True), "n_iter: expected at least 1, got True, which is no integer"),
        (lambda: sample(X, CELL, n_iter=1.0), "n_iter: expected at least 1, got 1.0, which is no integer"),
        (lambda: sample(X, CELL, n_iter="1"), "n_iter: expected at least 1, got '1', which is no integer"),
        (lambda: sample(X, CELL, n_iter=0), "n_iter: expected at least 1, got 0"),
        (lambda: sample(X, CELL, weight=BIAS), "weight, bias: expected both or none"),
        (lambda: sample(X, CELL, weight=BIAS[:8], bias=BIAS), r"weight: expected \[16\], got \[8\]"),
        (lambda: sample(X, CELL, weight=BIAS, bias=on_meta(BIAS)), "bias: expected it on cpu like the rest, got meta"),
        (lambda: sample(X, CELL, differentiable=True, backend="triton"), "backend: expected 'reference'"),
        (
            lambda: sample(X, CELL, backend="cublas"),
            "backend: expected one of .*triton, onednn, reference or None, got .cublas.",
        ),
        (lambda: associate(X, S[..., :8], CELL), r"s: expected \[2, 2, 3, 16\], got \[2, 2, 3, 8\]"),
        (lambda: associate(X, S.permute(0, 3, 1, 2), CELL), r"s: expected \[2, 2, 3, 16\], got \[2, 16, 2, 3\]"),
        (lambda: associate(X, S.double(), CELL), "s: expected torch.float32, got torch.float64"),
        (lambda: associate(X, on_meta(S), CELL), "s: expected it on cpu"),
        (lambda: aggregate(X, Q[:, :, :2], CELL), r"q: expected \[2, 2, 3, 9, 16\], got \[2, 2, 2, 9, 16\]"),
        (lambda: aggregate(X, Q.transpose(3, 4), CELL), r"q: expected \[2, 2, 3, 9, 16\]"),
        (lambda: aggregate(X, Q.half(), CELL), "q: expected torch.float32, got torch.float16"),
        (lambda: aggregate(X, Q.clone().requires_grad_(), CELL), "q: expected a constant"),
        (lambda: spread(S, Q.clone().requires_grad_(), CELL, (7, 9)), "q: expected a constant"),
        (lambda: spread(S, Q, CELL, (7, 13)), r"size: expected H, W of \[2, 3\] cells of \[4, 4\], got \[7, 13\]"),
        (lambda: spread(S, Q, CELL, (0, 9)), "size: expected"),
        (lambda: spread(S, Q[:1], CELL, (7, 9)), r"q: expected \[2, 2, 3, 9, 16\], got \[1, 2, 3, 9, 16\]"),
        (lambda: spread(S, Q, CELL, (7, 9), residual=X[:, 1:]), r"residual: expected \[2, 7, 9, 16\]"),
        (lambda: spread(S, Q, CELL, (7, 9), residual=on_meta(X)), "residual: expected it on cpu"),
        (lambda: depthwise3x3(X.permute(0, 3, 1, 2), WEIGHT, BIAS), r"weight: expected \[9, 1, 3, 3\], got \[16, 1, 3"),
        (lambda: depthwise3x3(X, WEIGHT.flatten(1), BIAS), r"weight: expected \[16, 1, 3, 3\], got \[16, 9\]"),
        (lambda: depthwise3x3(X, WEIGHT, BIAS[:4]), r"bias: expected \[16\], got \[4\]"),
        (lambda: depthwise3x3(X, on_meta(WEIGHT), BIAS), "weight: expected it on cpu"),
        (lambda: bias_gelu_affine(X[0], BIAS, BIAS, BIAS), r"x: expected .* map \(B, H, W, C\), got \[7, 9, 16\]"),
        (lambda: bias_gelu_affine(X, BIAS[:4], BIAS, BIAS), r"bias: expected \[16\], got \[4\]"),
        (lambda: bias_gelu_affine(X, BIAS, BIAS[None], BIAS), r"scale: expected \[16\], got \[1, 16\]"),
        (lambda: bias_gelu_affine(X, BIAS, BIAS, on_meta(BIAS)), "shift: expected it on cpu"),
        (lambda: bias_gelu_affine(X, BIAS, BIAS, BIAS, "triton"), "backend: 'triton' cannot run bias_gelu_affine here"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (X, "x is on cpu, it runs on GPUs|no triton"),
        (torch.empty(1, 4, 4, 16, device="meta"), "x is on meta|no triton"),
    ],
)
def test_a_name_must_serve(x, reason):
    with pytest.raises(ValueError, match=f"backend: 'triton' cannot run sample here: .*({reason})"):
        sample(x, CELL, backend="triton")


def test_differentiable_association_takes_the_reference():
    x = X.clone().requires_grad_()
    _, q = sample(x, CELL, differentiable=True)
    assert q.requires_grad
    y = spread(S, q, CELL, (7, 9), backend="reference")
    aggregate(y, q, CELL, backend="reference")[0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_sample_is_associate_and_aggregate():
    total, mass = aggregate(X, Q, CELL)
    torch.testing.assert_close(S, total / (mass.unsqueeze(-1) + 1e-12))
    padded = torch.nn.functional.pad(X, (0, 0, 0, 3, 0, 1))
    mean = padded.reshape(2, 2, 4, 3, 4, 16).mean((2, 4))
    torch.testing.assert_close(Q, associate(X, mean, CELL))


def test_norm_inside_is_the_norm_before():
    s, q = sample(X, CELL, 2, BIAS, BIAS + 1, 1e-3)
    expected = sample(torch.nn.functional.layer_norm(X, [16], BIAS, BIAS + 1, 1e-3), CELL, 2)
    assert torch.equal(s, expected[0])
    assert torch.equal(q, expected[1])


def test_residual_is_added_in_its_dtype():
    y = spread(S.bfloat16(), Q.bfloat16(), CELL, (7, 9), residual=X)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, X + spread(S, Q, CELL, (7, 9)), rtol=0, atol=0.05)


def test_associate_takes_no_gradient():
    assert not associate(X.clone().requires_grad_(), S, CELL).requires_grad


def test_second_device_and_dtype_of_the_results():
    x = torch.empty(3, 9, 8, 24, device="meta", dtype=torch.bfloat16)
    s, q = sample(x, (4, 3))
    assert (s.shape, q.shape) == ((3, 3, 3, 24), (3, 3, 3, 9, 12))
    assert s.dtype == q.dtype == torch.bfloat16
    assert spread(s, q, (4, 3), (9, 8)).shape == x.shape
    assert ops.choose("sample", x) == "reference"


def test_info(capsys):
    ops.info()
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "cpu      float32  -> reference, not triton: " in out


def test_bias_gelu_affine_is_what_follows_a_convolution():
    conv, norm = torch.nn.Conv2d(16, 24, 3, padding=1), torch.nn.BatchNorm2d(24)
    for t in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(t)
    norm.running_var.uniform_(0.5, 2)
    norm.eval()
    x = X.permute(0, 3, 1, 2)
    expected = norm(torch.nn.functional.gelu(conv(x))).permute(0, 2, 3, 1)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    plain = torch.nn.functional.conv2d(x, conv.weight, padding=1).permute(0, 2, 3, 1).detach()
    parameters = conv.bias, scale, norm.bias - norm.running_mean * scale
    y = bias_gelu_affine(plain, *parameters)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(t.sum(), [conv.bias, norm.weight, norm.bias]) for t in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)
    y = bias_gelu_affine(plain.bfloat16(), *parameters)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), bias_gelu_affine(plain.bfloat16().float(), *parameters), rtol=2**-8, atol=0)


def test_parameters_may_be_wider_than_the_map():
    x = X.bfloat16()
    y = depthwise3x3(x, WEIGHT, BIAS, True)
    s, _ = sample(x, CELL, 1, BIAS, BIAS)
    assert y.dtype == s.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), depthwise3x3(X, WEIGHT, BIAS, True), rtol=0.05, atol=0.2)
