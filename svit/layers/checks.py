"""Checks shared by the layers. They stand in functions of their own so that torch.fx takes each as one step."""

from collections.abc import Iterable
from typing import Any

import torch

from svit.ops._checks import is_integer


def check_map(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Returns `x` if it is a map (B, channels, H, W) with at least one pixel, else raises a ValueError."""
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x: expected (B, {channels}, H, W) with H and W of at least 1, got {list(x.shape)}")
    return x


def positive_int(value: int, name: str) -> int:
    """`value`, which may be NumPy's, as an int of at least 1."""
    if not is_integer(value):
        raise ValueError(f"{name}: expected at least 1, got {value!r}, which is no integer")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value!r}")
    return int(value)


def plain_ints(values: Iterable[Any]) -> list[Any]:
    """`values`, NumPy's integers among them as int, the only one that TorchScript takes."""
    return [int(v) if is_integer(v) else v for v in values]


def pair(value: int | tuple[int, int] | list[int], name: str) -> tuple[int, int]:
    """`value` as a pair of positive ints: an int counts twice."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or not all(is_integer(v) and v >= 1 for v in both):
        raise ValueError(f"{name}: expected a positive int or a pair of them, got {value!r}")
    return int(both[0]), int(both[1])
