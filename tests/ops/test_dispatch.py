import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad as fwAD

from svit.ops import _dispatch, reference, sample

X = torch.randn(1, 6, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def backend(monkeypatch):
    """A backend of its own, which computes by the reference and can be told to fail."""
    module = SimpleNamespace(calls=[], error=None)

    def run(*args):
        module.calls.append(args)
        if module.error:
            raise module.error
        x, cell, n_iter, weight, bias, eps = args
        return reference.sample(x, cell, n_iter, weight, bias, eps)

    module.sample = run
    module.usable = lambda op, x: (x.shape[-1] == 8, "it likes 8 channels")
    monkeypatch.setattr(_dispatch, "BACKENDS", {"other": module})
    monkeypatch.setattr(_dispatch, "failures", {})
    return module


def test_the_first_usable_is_chosen(backend):
    assert _dispatch.choose("sample", X) == "other"
    assert _dispatch.choose("sample", X[..., :4]) == "reference"
    assert _dispatch.choose("sample", X, "reference") == "reference"
    with pytest.raises(ValueError, match="'other' cannot run sample here: it likes 8 channels"):
        _dispatch.choose("sample", X[..., :4], "other")


def test_chosen_backend_runs(backend):
    s, q = sample(X, (2, 3))
    assert len(backend.calls) == 1
    expected = sample(X, (2, 3), backend="reference")
    assert len(backend.calls) == 1
    assert torch.equal(s, expected[0])
    assert torch.equal(q, expected[1])


def test_failure_falls_back_with_one_warning(backend):
    backend.error = RuntimeError("ptxas said no")
    expected = sample(X, (2, 3), backend="reference")[0]
    message = r"other backend is left out for sample of 8 channels in torch.float32.*RuntimeError: ptxas said no"
    with pytest.warns(UserWarning, match=message):
        assert torch.equal(sample(X, (2, 3))[0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sample(X, (2, 3))[0], expected)
    assert len(backend.calls) == 1
    assert _dispatch.usable("other", "sample", X) == (False, "it failed before: RuntimeError: ptxas said no")


def test_failure_of_a_forced_backend_is_raised(backend):
    backend.error = RuntimeError("ptxas said no")
    with pytest.raises(RuntimeError, match="ptxas said no"):
        sample(X, (2, 3), backend="other")
    assert not _dispatch.failures


def test_lack_of_memory_is_no_failure_of_the_backend(backend):
    backend.error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        sample(X, (2, 3))
    assert not _dispatch.failures


def test_gradients_go_through_the_op(backend):
    backend.sample_backward = reference.sample_backward
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sample(x, (2, 3))[0].square().sum(), x)
    (expected,) = torch.autograd.grad(sample(x, (2, 3), backend="reference")[0].square().sum(), x)
    torch.testing.assert_close(grad, expected)


def test_autocast_decides_the_dtype(backend):
    with torch.autocast("cpu", torch.bfloat16):
        s, q = sample(X, (2, 3))
    assert backend.calls[0][0].dtype == torch.bfloat16
    assert s.dtype == q.dtype == torch.bfloat16


def test_traces_take_the_reference(backend):
    traced = torch.jit.trace(lambda x: sample(x, (2, 3), backend="other")[0], X, check_trace=False)
    assert not backend.calls
    assert "svit::" not in str(traced.graph)


def test_only_what_failed_is_left_out(backend):
    backend.error = RuntimeError("no")
    with pytest.warns(UserWarning, match="RuntimeError: no"):
        sample(X, (2, 3))
    backend.error = None
    assert _dispatch.choose("sample", X) == "reference"
    assert _dispatch.choose("spread", X) == "other"
    assert _dispatch.choose("sample", X.half()) == "other"


def test_a_callers_error_is_no_failure_of_the_backend(backend):
    with pytest.raises(ValueError, match="n_iter: expected at least 1, got 0"):
        torch.ops.svit.sample(X, [2, 3], 0, None, None, 1e-6)
    with pytest.raises(ValueError, match="size: expected H, W"):
        torch.ops.svit.spread(*sample(X, (2, 3)), [2, 3], [60, 6], None)
    backend.error = RuntimeError("Triton Error [CUDA]: out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(X, (2, 3))
    assert not _dispatch.failures


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_gradient_of_another_dtype_is_refused(backend, dtype):
    """Backends trust their arguments, and the choice rests on the first of them."""
    s, q, mass = reference.sample(X, (2, 3))
    with pytest.raises(ValueError, match="grad: expected torch.float32, got"):
        torch.ops.svit.sample_backward(s.to(dtype), X, q, mass, [2, 3], None, 1e-6)
    with pytest.raises(ValueError, match="grad: expected torch.float32, got"):
        torch.ops.svit.depthwise3x3_backward(X.to(dtype), X, torch.ones(8, 1, 3, 3), False)


def test_transforms_take_the_reference(backend):
    def f(x):
        return sample(x, (2, 3))[0]

    _, tangent = torch.func.jvp(f, (X,), (X,))
    expected = torch.func.jvp(lambda x: sample(x, (2, 3), backend="reference")[0], (X,), (X,))[1]
    assert torch.equal(tangent, expected)
    assert tangent.abs().sum() > 0
    assert torch.func.grad(lambda x: f(x).sum())(X).shape == X.shape
    with fwAD.dual_level():
        assert fwAD.unpack_dual(f(fwAD.make_dual(X, X))).tangent is not None
    assert not backend.calls
