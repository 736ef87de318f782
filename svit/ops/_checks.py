"""Argument checks that the operators share. A ValueError names the argument, the value it got and what is expected."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor


def checked() -> bool:
    """Whether to check shapes. A compiler or tracer would make the comparisons part of the program."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def expect_map(x: Tensor, name: str = "x") -> None:
    if x.dim() != 4 or min(x.shape[1:]) < 1 or not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point map (B, H, W, C), got {list(x.shape)} {x.dtype}")


def is_integer(value: object) -> bool:
    """Whether `value` is a Python or NumPy integer, and not a bool."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def positive_int(value: int, name: str) -> int:
    """`value`, an int or a NumPy integer of at least 1, as an int."""
    if not is_integer(value):
        raise ValueError(f"{name}: expected at least 1, got {value!r}, which is no integer")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value!r}")
    return int(value)


def expect_cell(cell: Sequence[int]) -> None:
    if not isinstance(cell, Sequence) or len(cell) != 2 or not all(is_integer(n) and n >= 1 for n in cell):
        raise ValueError(f"cell: expected a height and a width of at least 1, got {cell!r}")


def expect(t: Tensor, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> None:
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {list(shape)}, got {list(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected it on {like.device} like the rest, got {t.device}")
    if dtype is not None and t.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {t.dtype}")
