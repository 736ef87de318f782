"""Exact kernels: each op computed in float64, by the reference, and rounded once, at the end.

In the place of the fused backends they show, without a GPU, that what a test asserts of kernels holds for right ones;
with one that is wrong, that it does not.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from svit.ops import _dispatch, _registration, cuda, reference, triton

PARTS = triton.BACKEND.OPS
COMPOSITE_OPS = cuda.BACKEND.OPS


def kernel(op: str, factor: float = 1.0) -> Callable:
    """A function with the arguments and results of `op`; the first of these comes `factor` times too large."""

    def run(*args):
        meta = getattr(_registration.ops, op)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        args = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
        with torch.autocast("cpu", enabled=False):
            results = getattr(reference, op)(*args)
        if isinstance(results, torch.Tensor):
            return (factor * results).to(meta.dtype).contiguous()
        results = factor * results[0], *results[1:]
        return tuple(result.to(m.dtype).contiguous() for result, m in zip(results, meta, strict=True))

    return run


def install(monkeypatch, **factors: float) -> None:
    """The CPU gets exact kernels: for what Triton serves on a GPU, and by the name of 'cuda' for what that serves.

    `factors` makes some of them wrong, by name.
    """
    monkeypatch.setenv("SVIT_SELF_CHECK", "0")
    parts = {op: kernel(op, factors.get(op, 1.0)) for op in PARTS}
    exact = SimpleNamespace(OPS=PARTS, usable=lambda op, x: (True, ""), **parts)
    monkeypatch.setattr(_dispatch, "BACKENDS", {"cuda": cuda.BACKEND, "exact": exact})
    monkeypatch.setattr(cuda.BACKEND, "usable", lambda op, x, **sizes: (True, ""))
    for op in COMPOSITE_OPS:
        monkeypatch.setattr(cuda.BACKEND, op, kernel(op, factors.get(op, 1.0)))
