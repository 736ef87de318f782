"""Checks shared by the layers. They stand in functions of their own so that torch.fx takes each as one step."""

import torch


def check_map(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Returns `x` if it is a map (B, channels, H, W) with at least one pixel, else raises a ValueError."""
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x: expected (B, {channels}, H, W) with H and W of at least 1, got {list(x.shape)}")
    return x


def pair(value: int | tuple[int, int] | list[int], name: str) -> tuple[int, int]:
    """`value` as a pair of positive ints: an int counts twice."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or not all(isinstance(v, int) and v >= 1 for v in both):
        raise ValueError(f"{name}: expected a positive int or a pair of them, got {value!r}")
    return both
