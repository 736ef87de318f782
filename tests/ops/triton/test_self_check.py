"""The self-check catches wrong kernels, forward and backward. test_interpreter.py starts a process for this."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch

from svit.ops import _dispatch, _kernels, _self_check, depthwise3x3, reference, sample, spread, triton

# (op, form) -> what is exchanged in the source of its kernels, forward or backward
MUTATIONS = [
    ("sample", "norm", "total = total / (weight + 1e-12)[:, None]", "total = total / (weight + 1)[:, None]"),
    ("sample", "norm", "input_precision=PRECISION) * scale", "input_precision=PRECISION) * scale * 1.5"),
    ("sample", "norm", "mean = tl.sum(v, 1) * (1.0 / C)", "mean = tl.sum(v, 1) * (1.0 / (C + 1))"),
    ("sample", "norm", "dbias += tl.sum(g, 0)", "dbias += tl.sum(g * 1.001, 0)"),
    ("sample", "norm", "dweight += tl.sum(g * v, 0)", "dweight += tl.sum(g, 0)"),
    ("sample", "", "share.to(tl.float32) * factor[:, None]", "share.to(tl.float32) * 0.9"),
    ("spread", "residual", "v += load_map(residual", "v -= load_map(residual"),
    ("depthwise3x3", "", "w4 += 1.0", "w4 += 0.99"),
    ("depthwise3x3", "gelu", "d7 += below * mid", "d7 += above * mid"),
]
CHANNELS, CELL = 64, (4, 4)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("SVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SVIT_SELF_CHECK", raising=False)
    monkeypatch.setattr(_self_check, "verdicts", {})
    monkeypatch.setattr(_dispatch, "failures", {})


def exchange(monkeypatch, tmp_path, old: str, new: str) -> None:
    sources = {sys.modules[getattr(triton.BACKEND, op).__module__].__file__ for op in triton.BACKEND.OPS}
    found = [source for path in sorted(sources) if old in (source := Path(path).read_text())]
    assert found, "the kernels have changed: name what to exchange anew"
    path = tmp_path / "wrong_kernels.py"
    path.write_text(found[0].replace(old, new))
    spec = importlib.util.spec_from_file_location("wrong_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for op in triton.BACKEND.OPS:
        if hasattr(module, f"launch_{op}"):
            monkeypatch.setattr(triton.BACKEND, op, getattr(module, f"launch_{op}"))


def run(op: str, form: str, backend: str | None, device: str) -> list[torch.Tensor]:
    """An op's result and gradients."""

    def random(seed, *shape):
        t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        return t.requires_grad_(backend != "exact")

    x, weight, bias = random(0, 1, 7, 9, CHANNELS), random(1, CHANNELS), random(2, CHANNELS)
    leaves = [x]
    if op == "depthwise3x3":
        leaves += [random(3, CHANNELS, 1, 3, 3), bias]
        y = depthwise3x3(*leaves, gelu=form == "gelu", backend=backend)
    elif op == "spread":
        s, q = sample(x.detach(), CELL, backend="reference")
        y = spread(s, q, CELL, (7, 9), residual=x, backend=backend)
    else:
        leaves += [weight, bias] if form == "norm" else []
        y, _ = sample(x, CELL, 1, *(leaves[1:] or (None, None)), backend=backend)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y) + y.detach())
    return [y.detach(), *gradients]


@pytest.mark.parametrize(("op", "form", "old", "new"), MUTATIONS, ids=[f"{m[0]}-{i}" for i, m in enumerate(MUTATIONS)])
def test_a_wrong_kernel_is_caught(op, form, old, new, device, monkeypatch, tmp_path, launches):
    exchange(monkeypatch, tmp_path, old, new)
    with pytest.warns(UserWarning, match=f"triton backend is left out for {op} of {CHANNELS} .* self-check") as caught:
        results = run(op, form, None, device)
    assert sum("self-check" in str(w.message) for w in caught) == 1
    for result, expected in zip(results, run(op, form, "reference", device), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    launches.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(op, form, None, device)
    assert not launches


@pytest.mark.parametrize(("op", "form"), sorted({m[:2] for m in MUTATIONS}))
def test_right_kernels_pass(op, form, device, launches):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(op, form, None, device)
    assert launches
    assert set(_self_check.verdicts.values()) == {""}


def test_a_kernel_that_does_not_run_is_left_out(device, monkeypatch):
    def broken(*args, **constants):
        raise RuntimeError("ptxas said no")

    monkeypatch.setattr(_kernels, "launch", broken)
    with pytest.warns(UserWarning, match="self-check: RuntimeError: ptxas said no"):
        s, _ = run("sample", "", None, device)
    assert torch.allclose(s, run("sample", "", "reference", device)[0], atol=1e-5)


def test_published_shapes_are_right(device):
    """Of the super-token ops; `svit.ops.self_check()` takes some minutes for all of them in the interpreter."""
    for name, cases in _dispatch.checkable(torch.device(device)).items():
        small = [case for case in cases if case.channels <= 192 and case.op != "depthwise3x3"]
        assert {case.op for case in small} >= {"associate", "aggregate", "spread", "sample"}
        for case in small:
            row = _self_check.check(case, _dispatch.BACKENDS[name], torch.device(device))
            assert row.ok, row


def test_odd_cells_are_checked_too(device):
    x = torch.randn(2, 7, 13, 24, generator=torch.Generator().manual_seed(0)).to(device)
    s, q = sample(x, (3, 5))
    expected = reference.sample(x.double().cpu(), (3, 5))
    torch.testing.assert_close(s.double().cpu(), expected[0], rtol=1e-4, atol=1e-5)
    assert {(case.channels, case.cell) for case, _ in _self_check.verdicts} == {(24, (3, 5))}
