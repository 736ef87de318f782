"""Calls of the ops at the sizes of the published models, and the kernels that a call launches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import svit
from svit.ops import cuda, reference


class Shape(NamedTuple):
    """A map of a stage: C channels, in super-token stages cells and heads."""

    batch: int
    height: int
    width: int
    channels: int
    cell: tuple[int, int] | None = None
    heads: int = 1

    def __str__(self) -> str:
        cell = "" if self.cell is None else f", cell {self.cell[0]}x{self.cell[1]}"
        return f"{self.batch}x{self.height}x{self.width}x{self.channels}{cell}"


SUPER_TOKEN_OPS = ("sample", "sample_backward", "aggregate", "spread", "super_token_attention")
# "gelu": on the hidden channels of the conv-FFN, of which there are four times as many.
OTHER_OPS = (
    "depthwise3x3",
    "depthwise3x3_backward",
    "depthwise3x3 gelu",
    "depthwise3x3_backward gelu",
    "conv_ffn",
)


COMPOSITE_OPS = ("super_token_attention", "conv_ffn")  # half a block, which no Triton kernel has
STEM_OPS = ("bias_gelu_affine",)
REHEARSED_OPS = ("super_token_attention", "depthwise3x3_backward gelu", "conv_ffn")

# Stages 1 and 2 of SViT-S, then of B and L, at 224; then of S at 800 x 1280. Stages 3 and 4 have no super tokens.
SHAPES = {
    Shape(128, 56, 56, 64, (8, 8), 1): SUPER_TOKEN_OPS + OTHER_OPS,
    Shape(128, 28, 28, 128, (4, 4), 2): SUPER_TOKEN_OPS + OTHER_OPS,
    Shape(128, 56, 56, 96, (8, 8), 2): SUPER_TOKEN_OPS + OTHER_OPS,
    Shape(128, 28, 28, 192, (4, 4), 3): SUPER_TOKEN_OPS + OTHER_OPS,
    Shape(128, 14, 14, 320): OTHER_OPS,
    Shape(128, 7, 7, 512): OTHER_OPS,
    Shape(128, 112, 112, 32): STEM_OPS,
    Shape(2, 200, 320, 64, (8, 8), 1): SUPER_TOKEN_OPS + OTHER_OPS,
    Shape(2, 100, 160, 128, (4, 4), 2): SUPER_TOKEN_OPS + OTHER_OPS,
}
TINY = {Shape(1, 4, 6, 8, (4, 4), 1): REHEARSED_OPS}


@dataclass
class Call:
    """An op of torch.ops.svit with its arguments."""

    op: str
    args: tuple

    def fused(self, backend: str) -> Callable[[], object]:
        if self.op in COMPOSITE_OPS and backend == "triton":
            return self.parts
        return lambda: getattr(torch.ops.svit, self.op)(*self.args, backend)

    def parts(self) -> Tensor:
        """What a block runs where no kernel has the whole."""
        if self.op == "conv_ffn":
            return svit.ops.conv_ffn(*self.args, backend="triton")
        *args, scale, heads, _ = self.args
        return svit.ops.super_token_attention(*args, heads, scale, backend="triton")

    def reference(self, compiled: str | None = None) -> Callable[[], object]:
        """PyTorch's operations; `compiled` is a backend of torch.compile."""
        function = getattr(reference, self.op)
        if compiled is not None:
            function = torch.compile(function, backend=compiled, dynamic=False)
        return lambda: function(*self.args)

    def bytes(self) -> int:
        """Least traffic: each tensor that goes in or comes out is moved once."""
        results = self.reference()()
        results = results if isinstance(results, tuple) else (results,)
        return sum(t.nbytes for t in (*self.args, *results) if isinstance(t, Tensor))

    def backends(self) -> list[str]:
        """Those to time: the Triton kernels, and the CUDA C++ kernel where it was built and serves the call."""
        x = self.args[0]
        sizes = {}
        if self.op == "super_token_attention":
            sizes = {"cell": tuple(self.args[1]), "num_heads": self.args[-2]}
        elif self.op == "conv_ffn":
            sizes = {"hidden": self.args[2].shape[0]}
        served = self.op in cuda.BACKEND.OPS and cuda.usable(self.op, x, **sizes)[0]
        return ["triton", "cuda"] if served else ["triton"]


def call_of(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Call:
    """A call of op `name`, one of those of `SHAPES`, on maps of that shape; parameters are float32 as in training."""
    B, H, W, C = shape[:4]
    op, _, gelu = name.partition(" ")
    generator = torch.Generator(device).manual_seed(0)

    def noise(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype)

    if op == "conv_ffn":
        weights = noise(4 * C, C, scale=C**-0.5), noise(4 * C), noise(4 * C, 1, 3, 3, scale=0.3), noise(4 * C)
        maps = (noise(B, H, W, C, dtype=dtype) for _ in range(2))
        return Call(op, (*maps, *weights, noise(C, 4 * C, scale=0.5 * C**-0.5), noise(C)))
    if op == "bias_gelu_affine":
        return Call(op, (noise(B, H, W, C, dtype=dtype), noise(C), noise(C), noise(C)))
    if op.startswith("depthwise3x3"):
        C = 4 * C if gelu else C
        x, taps = noise(B, H, W, C, dtype=dtype), noise(C, 1, 3, 3, scale=0.3)
        if op == "depthwise3x3":
            return Call(op, (x, taps, noise(C), bool(gelu)))
        return Call(op, (noise(B, H, W, C, dtype=dtype), x, taps, bool(gelu)))
    cell = list(shape.cell)
    x, weight, bias = noise(B, H, W, C, dtype=dtype), 1 + noise(C, scale=0.1), noise(C, scale=0.1)
    if op == "super_token_attention":
        qkv, proj = (noise(n * C, C, scale=C**-0.5) for n in (3, 1))
        return Call(op, (x, cell, weight, bias, 1e-6, qkv, noise(3 * C), proj, noise(C), None, shape.heads, False))
    if op == "sample":
        return Call(op, (x, cell, 1, weight, bias, 1e-6))
    s, q, mass = reference.sample(x, cell, 1, weight, bias, 1e-6)
    q = q.contiguous()
    if op == "sample_backward":
        return Call(op, (noise(*s.shape, dtype=dtype), x, q, mass.contiguous(), cell, weight, 1e-6))
    if op == "aggregate":
        return Call(op, (x, q, cell))
    return Call("spread", (s.contiguous(), q, cell, [H, W], x))


class Launch(NamedTuple):
    """A launch of a Triton kernel, to be repeated."""

    kernel: object
    programs: int
    args: tuple
    constants: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def bytes(self) -> int:
        """Least traffic: each tensor is read or written once."""
        return sum(t.nbytes for t in self.args if isinstance(t, Tensor))

    def run(self) -> object:
        """The compiled kernel; None in the interpreter."""
        return self.kernel[(self.programs,)](*self.args, **self.constants)


def launches(call: Call) -> list[Launch]:
    """The Triton kernels that a call launches, in their order."""
    from svit.ops import _kernels

    found, run = [], _kernels.launch

    def record(kernel, programs, like, *args, **constants):
        found.append(Launch(kernel, programs, args, constants))
        run(kernel, programs, like, *args, **constants)

    with mock.patch.object(_kernels, "launch", record):
        call.fused("triton")()
    return found


def largest_error(actual: object, expected: object) -> float:
    """Largest difference of the results, relative to the largest value of each."""
    pairs = zip(*((t,) if isinstance(t, Tensor) else t for t in (actual, expected)), strict=True)
    errors = [0.0]
    for a, e in pairs:
        if a.numel():
            error = ((a.float() - e.float()).abs().max() / e.float().abs().max()).item()
            errors.append(error if error == error else float("inf"))
    return max(errors)
