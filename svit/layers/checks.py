"""Checks that the layers share. Each is a function, so that torch.fx records it as one step."""

from collections.abc import Iterable
from typing import Any

import torch

from svit.ops._checks import is_integer


def check_map(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Returns `x` if it is a map (B, channels, H, W) with at least one pixel. Otherwise raises a ValueError."""
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x: expected (B, {channels}, H, W) with H and W of at least 1, got {list(x.shape)}")
    return x


def plain_ints(values: Iterable[Any]) -> list[Any]:
    """`values` with NumPy integers as int, since TorchScript takes no other integers."""
    return [int(v) if is_integer(v) else v for v in values]


def pair(value: int | tuple[int, int] | list[int], name: str) -> tuple[int, int]:
    """`value` as a pair of positive ints. A single int stands for both."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or not all(is_integer(v) and v >= 1 for v in both):
        raise ValueError(f"{name}: expected a positive int or a pair of them, got {value!r}")
    return int(both[0]), int(both[1])
